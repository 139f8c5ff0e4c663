"""Any `torch.nn.Module` → a store of named sites: what chosen submodules give for a set of items.

1. Hooks on the submodules keep their outputs while the module runs over the batches.
2. An output [item, d] is one row an item; [item, position, d] one row a position; a map [item,
   channel, height, width] one row a place, channels last. Maps of different size are averaged down
   to the smallest one, so that a row is the same place at every site.
3. A batch that is a mapping goes to the module by name. Its `attention_mask` leaves out padding
   and its `input_ids` name the rows; without them a row is named by its place.
4. The last documents are set apart for validation; a document is an item.

Cost: the module's forward passes; memory of one shard of all sites.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from data.store.layout import SiteLayout, StoredDtype, StoreLayout
from data.store.store import ActivationStore
from data.store.writer import write_activations
from data.tokens import DocumentRow, TokenTable
from featureflow.errors import Problem, UserError

Batch = Tensor | Mapping[str, Tensor]
_NO_SINKS = 1e9


def store_modules(
    url: str | Path,
    module: nn.Module,
    batches: Iterable[Batch],
    *,
    sites: Sequence[str],
    items: Sequence[DocumentRow] = (),
    vocabulary: Sequence[str] | None = None,
    name: str | None = None,
    validation_fraction: float = 0.1,
    dtype: StoredDtype = "float32",
    shard_rows: int = 65_536,
) -> ActivationStore:
    """Run `module` over the batches and store what the submodules `sites` give, in the order in
    which they are named, which should be that of computation. `items` says what each item is called
    and shows; `vocabulary` what the ids mean. Raises UserError with every site that is wrong."""
    _check_sites(module, sites)
    rows = _iter_rows(module, batches, sites)
    first = next(rows, None)
    if first is None:
        raise UserError("there are no batches to run the module over")
    found, table, places = first
    layout = StoreLayout(
        sites=tuple(SiteLayout(name=site, width=each.shape[1]) for site, each in found.items()),
        dtype=dtype,
        n_rows=None,
        n_context=1,
        shard_rows=shard_rows,
        chunk_rows=min(1024, shard_rows),
        sink_ratio=_NO_SINKS,
        provenance={
            "model": name or type(module).__name__,
            "vocabulary": places if vocabulary is None else list(vocabulary),
        },
    )

    def parts() -> Iterator[tuple[dict[str, Tensor], TokenTable]]:
        yield found, table
        yield from ((more, tokens) for more, tokens, _ in rows)

    write_activations(
        url, parts(), layout=layout, documents=items, validation_fraction=validation_fraction
    )
    return ActivationStore.open(url)


def _check_sites(module: nn.Module, sites: Sequence[str]) -> None:
    known = [name for name, _ in module.named_modules() if name]
    problems = tuple(
        Problem(what="the module has no such submodule", where=site, expected=", ".join(known[:40]))
        for site in sites
        if site not in known
    )
    if problems or not sites:
        raise UserError("these sites cannot be read", problems=problems, found=str(list(sites)))


@torch.no_grad()
def _iter_rows(
    module: nn.Module, batches: Iterable[Batch], sites: Sequence[str]
) -> Iterator[tuple[dict[str, Tensor], TokenTable, list[str]]]:
    """Rows of every site, their tokens, and the names of places, batch by batch."""
    n_items = 0
    was_training = module.training
    module.eval()
    try:
        for batch in batches:
            given = _outputs(module, batch, sites)
            grids = {site: each.shape[1:-1] for site, each in given.items()}
            n = next(iter(given.values())).shape[0]
            if len(set(grids.values())) > 1 or any(len(each) != n for each in given.values()):
                raise UserError(
                    "the sites do not have the same rows",
                    expected="one row an item, or the same positions at every site",
                    found=", ".join(f"{s} {list(each.shape)}" for s, each in given.items()),
                    fix="choose sites of one kind, or pool them before they are stored",
                )
            grid = next(iter(grids.values()))
            table, keep = _tokens(batch, n, grid, n_items)
            n_items += n
            yield {s: each.flatten(0, -2)[keep] for s, each in given.items()}, table, _places(grid)
    finally:
        module.train(was_training)


def _outputs(
    module: nn.Module, batch: Batch, sites: Sequence[str]
) -> dict[str, Float[Tensor, "item *position d"]]:
    """What each site gave in one pass, features last, maps of the size of the smallest."""
    seen: dict[str, Tensor] = {}

    def keep(site: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen[site] = (output[0] if isinstance(output, tuple | list) else output).detach()

        return hook

    with ExitStack() as hooks:
        for site in sites:
            handle = module.get_submodule(site).register_forward_hook(keep(site))
            hooks.callback(handle.remove)
        module(**batch) if isinstance(batch, Mapping) else module(batch)
    if silent := [site for site in sites if site not in seen]:
        raise UserError("these sites did not run", found=", ".join(silent))
    maps = [each.shape[2:] for each in seen.values() if each.ndim == 4]
    size = (min(m[0] for m in maps), min(m[1] for m in maps)) if maps else (1, 1)
    return {site: _features_last(seen[site], size).float().cpu() for site in sites}


def _features_last(output: Tensor, size: tuple[int, int]) -> Tensor:
    if output.ndim != 4:
        return output
    pooled = nn.functional.adaptive_avg_pool2d(output, size)
    return rearrange(pooled, "item channel height width -> item height width channel")


def _tokens(batch: Batch, n: int, grid: torch.Size, first: int) -> tuple[TokenTable, Tensor]:
    """The token table of a batch, and which of its rows are kept."""
    per_item = int(np.prod(grid))
    named = batch if isinstance(batch, Mapping) else {}
    position = torch.arange(per_item).expand(n, per_item)
    fits = "input_ids" in named and named["input_ids"].shape == position.shape
    ids = named["input_ids"].cpu() if fits else position
    document = first + torch.arange(n)[:, None].expand(n, per_item)
    if not grid and not fits:  # one row an item: the item is its own name
        ids = document
    mask = named.get("attention_mask")
    has_mask = mask is not None and mask.shape == position.shape
    keep = mask.cpu().bool() if has_mask and mask is not None else torch.ones_like(position).bool()
    columns = {"id": ids, "document": document, "position": position}
    table = TokenTable(
        flags=np.zeros(int(keep.sum()), dtype=np.uint8),
        documents=(),
        **{name: each[keep].numpy().astype(np.uint32) for name, each in columns.items()},
    )
    return table, keep.flatten()


def _places(grid: torch.Size) -> list[str] | None:
    """The names of the positions of an item; none where an item is one row."""
    if not grid:
        return None
    return [" " + ",".join(str(i + 1) for i in place) for place in np.ndindex(*grid)]
