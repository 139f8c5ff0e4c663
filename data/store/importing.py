"""Activations that others have stored, into a store: SAELens' cache, safetensors, .npy files, any
Zarr array.

A source is a folder or a file; what it is, is seen from what lies there:

    SAELens     `*.arrow` files of a Hugging Face data set: a column of (context, d) arrays named as
    a hook, `token_ids`
    safetensors `*.safetensors`; each tensor (row, d) or (context, position, d) is a site of that
    name
    .npy        `<site>.npy` files of shape (row, d) or (context, position, d), read by memory map
    Zarr        a folder with `zarr.json` whose arrays (row, d) or (context, position, d) are sites,
    read by zarr-python

Several files of one site follow each other in the order of their numbers. A source that is
incomplete or does not fit together is refused with all that is wrong (`data.store.foreign`).
Nothing is unpickled. Rows are read a part at a time, so memory stays at one shard of every site.
The store's provenance names the source by a digest of its files: a run that is killed goes on,
another source under the same name is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import readable_digest
from data.store.checks import Report, verify_store
from data.store.cluster import Machines
from data.store.foreign import ForeignRows, find_foreign
from data.store.layout import SiteLayout, StoredDtype, StoreLayout
from data.store.writer import write_activations
from data.tokens import FLAG_BOS, DocumentRow, TokenTable
from featureflow.errors import UserError

_PART_ROWS = 8192


def import_activations(
    source: Path,
    url: str | Path,
    context: Machines,
    *,
    dtype: StoredDtype = "bfloat16",
    rename: Mapping[str, str] | None = None,
    ignore: Sequence[str] = (),
    n_context: int | None = None,
    first_is_bos: bool = False,
    validation_fraction: float = 0.05,
    shard_rows: int = 65_536,
    chunk_rows: int = 1024,
    allow_non_finite: bool = False,
) -> Report:
    """Store what lies in `source` and verify it.

    `rename` maps names found there to sites, such as `{"hidden_states": "L12"}`; `ignore` names
    arrays that are left out; `n_context` splits rows into contexts where the source does not say.
    Each context counts as a document, and the last ones are for validation. Raises UserError with
    all problems."""
    found = find_foreign(Path(source), rename or {}, ignore=ignore)
    n_rows = found[0].n_rows
    stated = next((each.n_context for each in found if each.n_context), None)
    if n_context is not None and stated not in (None, n_context):
        raise UserError(
            "the source has contexts of another length",
            where=str(source),
            expected=str(stated),
            found=f"n_context = {n_context}",
        )
    context_rows = n_context or stated or 1
    shard_rows = _whole_shards(shard_rows, chunk_rows, context_rows, n_rows)
    n_contexts = -(-n_rows // context_rows)  # the last one may be short
    n_train = n_contexts - round(validation_fraction * n_contexts)
    layout = StoreLayout(
        sites=tuple(SiteLayout(name=each.name, width=each.width) for each in found),
        dtype=dtype,
        n_rows=n_rows,
        n_context=context_rows,
        shard_rows=shard_rows,
        chunk_rows=chunk_rows,
        validation_start=min(n_rows, n_train * context_rows),
        provenance={
            "imported_from": Path(source).name,
            "format": found[0].format,
            "source": digest_of_source(Path(source)),
        },
    )
    documents = [DocumentRow(source=Path(source).name)] * n_contexts
    write_activations(
        url,
        _iter_parts(
            found,
            n_rows,
            context_rows,
            first_is_bos,
            lambda n: context.progress("import", n, n_rows),
        ),
        layout=layout,
        documents=documents,
        allow_non_finite=allow_non_finite,
    )
    return verify_store(url, full=False, context=context)


def digest_of_source(source: Path) -> str:
    """sha256 over names and contents, so that a source which changed under its name is not taken
    for the one that an earlier run began to store."""
    files = (
        [source]
        if source.is_file()
        else sorted(path for path in source.rglob("*") if path.is_file())
    )
    parts = [f"{path.relative_to(source).as_posix()}:{readable_digest(path)}" for path in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _iter_parts(
    found: Sequence[ForeignRows],
    n_rows: int,
    n_context: int,
    first_is_bos: bool,
    done: Callable[[int], None],
) -> Iterator[tuple[dict[str, Any], TokenTable]]:
    ids = next((each.token_ids for each in found if each.token_ids is not None), None)
    for start in range(0, n_rows, _PART_ROWS):
        stop = min(start + _PART_ROWS, n_rows)
        rows = np.arange(start, stop)
        position = (rows % n_context).astype(np.uint32)
        flags = np.where(first_is_bos & (position == 0), FLAG_BOS, 0).astype(np.uint8)
        tokens = TokenTable(
            id=np.zeros(len(rows), np.uint32)
            if ids is None
            else ids(start, stop).astype(np.uint32),
            document=(rows // n_context).astype(np.uint32),
            position=position,
            flags=flags,
        )
        yield {each.name: each.read(start, stop) for each in found}, tokens
        done(stop)


def _whole_shards(shard_rows: int, chunk_rows: int, n_context: int, n_rows: int) -> int:
    """The smallest multiple of chunk and context that is not less than asked for, or than all
    rows."""
    unit = int(np.lcm(chunk_rows, n_context))
    return -(-min(shard_rows, max(n_rows, 1)) // unit) * unit
