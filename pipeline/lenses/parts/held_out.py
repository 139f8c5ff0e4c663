"""The rows that SAEs are measured on: whole contexts or blocks of rows, drawn by seed from
one split.

1. `choose_rows` draws blocks of rows until enough of them pass the filters; `iter_rows` reads them
   block by block, so memory does not grow with the store.
2. `choose_contexts` draws whole held-out contexts, for running the model on: every position keeps
   its context.

Held-out documents are never in the train split (the store sees to it), so nothing here was trained
on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data.store import ActivationStore
from data.store.store import Split
from data.tokens import FLAG_BOS, FLAG_PADDING, FLAG_SPECIAL
from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.lenses.base import Sampled
from pipeline.run import Run


@dataclass(frozen=True, kw_only=True, eq=False)
class Contexts:
    """Whole contexts of tokens. `spliced`: positions whose activation may be replaced (BOS,
    special, sink and padding rows are left as they are). `counted`: spliced positions whose next
    token is ordinary, where loss is taken."""

    ids: Int[Tensor, "context position"]
    spliced: Bool[Tensor, "context position"]
    counted: Bool[Tensor, "context position"]
    documents: Int[Tensor, "context position"]


def choose_rows(
    run: Run,
    config: Sampled,
    n_tokens: int,
    *,
    split: Split = "validation",
    sites: Sequence[Site] = (),
) -> list[Int[np.ndarray, "row"]]:
    """Ascending blocks of kept rows, about `n_tokens` in all, fewer when the split has no more.
    `max_norm_ratio` of the filters looks at the norms of `sites`."""
    store = run.store
    kept = store.kept_rows(split, config.filters, sites=sites)
    if not len(kept):
        raise UserError(
            f"the store has no {split} rows that pass the filters",
            where=store.url,
            fix="set collect.validation_fraction above 0 and collect again, or loosen the filters",
        )
    block = max(store.chunk_rows, store.n_context)
    blocks = np.split(kept, np.flatnonzero(np.diff(kept // block)) + 1)
    chosen: list[int] = []
    n = 0
    for index in np.random.default_rng(config.seed).permutation(len(blocks)):
        if n >= n_tokens:
            break
        chosen.append(int(index))
        n += len(blocks[index])
    if (
        n > n_tokens and chosen
    ):  # the last block drawn is cut, so that the number asked for is kept to
        last = chosen[-1]
        blocks[last] = blocks[last][: len(blocks[last]) - (n - n_tokens)]
    return [blocks[index] for index in sorted(chosen)]


def iter_rows(
    store: ActivationStore, site: Site, blocks: list[Int[np.ndarray, "row"]]
) -> Iterator[tuple[Float[Tensor, "token d_model"], Int[Tensor, "token"]]]:
    """Activations and documents of the chosen rows, block by block."""
    documents = store.tokens().document
    for rows in blocks:
        start, stop = int(rows[0]), int(rows[-1]) + 1
        values = store.read(site, start, stop)[rows - start]
        yield torch.from_numpy(values), torch.from_numpy(documents[rows].astype(np.int64))


def choose_contexts(run: Run, config: Sampled, n_tokens: int) -> Contexts:
    """Held-out contexts with about `n_tokens` counted positions. Raises UserError if the store
    holds no contexts."""
    store = run.store
    store.check_language_model()
    tokens, width = store.tokens(), store.n_context
    first, last = -(-store.validation_start // width), store.n_rows // width
    shape = (last - first, width)
    rows = slice(first * width, last * width)
    if last <= first or not (tokens.position[rows].reshape(shape) == np.arange(width)).all():
        raise UserError(
            "the store has no whole held-out contexts to run the model on",
            where=store.url,
            fix="collect with a validation_fraction above 0",
        )
    flags = tokens.flags[rows].reshape(shape)
    spliced = config.filters.keeps(tokens)[rows].reshape(shape)
    ordinary = (flags & (FLAG_BOS | FLAG_SPECIAL | FLAG_PADDING)) == 0
    counted = np.zeros(shape, dtype=bool)
    counted[:, :-1] = spliced[:, :-1] & ordinary[:, 1:]
    order = np.random.default_rng(config.seed).permutation(shape[0])
    needed = int(np.searchsorted(np.cumsum(counted[order].sum(1)), n_tokens)) + 1
    chosen = np.sort(order[:needed])
    return Contexts(
        ids=torch.from_numpy(tokens.id[rows].reshape(shape)[chosen].astype(np.int64)),
        spliced=torch.from_numpy(spliced[chosen]),
        counted=torch.from_numpy(counted[chosen]),
        documents=torch.from_numpy(tokens.document[rows].reshape(shape)[chosen].astype(np.int64)),
    )
