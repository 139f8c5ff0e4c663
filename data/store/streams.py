"""Activations of any model into a store: an iterator of rows of unknown length in, shards out.

The token columns of a shard are kept until it is full, because its record needs them; rows wait
with them, so memory is one shard of every site.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from data.store.layout import StoreLayout
from data.store.writer import Rows, StoreWriter
from data.tokens import DocumentRow, TokenTable
from featureflow.errors import UserError


def write_activations(
    url: str | Path,
    batches: Iterable[tuple[Rows, TokenTable | None]],
    *,
    layout: StoreLayout,
    documents: Sequence[DocumentRow] = (),
    allow_non_finite: bool = False,
) -> None:
    """Store activations of any model: batches of rows at named sites, each with a token table or
    None.

    Without a table a row is its own document-less token: id 0, document 0, position 0, no flags.
    `layout.n_rows` may be None. Memory: one shard of every site."""
    writer = StoreWriter.create(url, layout, allow_non_finite=allow_non_finite)
    shard_rows = writer.layout.shard_rows
    n_rows = 0
    for shard, (tokens, parts) in enumerate(_iter_shards(batches, shard_rows)):
        n_rows += len(tokens)
        writer.extend_to(n_rows)
        writer.write_shard(shard, tokens, parts)
    if n_rows == 0:
        raise UserError("there are no activations to store", where=writer.place.url)
    writer.finish(documents)


def _iter_shards(
    batches: Iterable[tuple[Rows, TokenTable | None]], shard_rows: int
) -> Iterator[tuple[TokenTable, list[Rows]]]:
    parts: list[Rows] = []
    tables: list[TokenTable] = []
    n = 0
    for rows, table in batches:
        length = len(next(iter(rows.values())))
        table = table if table is not None else _anonymous(length)
        taken = 0
        while taken < length:
            step = min(length - taken, shard_rows - n)
            parts.append({name: each[taken : taken + step] for name, each in rows.items()})
            tables.append(table.part(taken, taken + step))
            taken, n = taken + step, n + step
            if n == shard_rows:
                yield _joined(tables), parts
                parts, tables, n = [], [], 0
    if n:
        yield _joined(tables), parts


def _anonymous(n: int) -> TokenTable:
    zeros = np.zeros(n, dtype=np.uint32)
    return TokenTable(id=zeros, document=zeros, position=zeros, flags=np.zeros(n, dtype=np.uint8))


def _joined(tables: Sequence[TokenTable]) -> TokenTable:
    return TokenTable(
        id=np.concatenate([each.id for each in tables]),
        document=np.concatenate([each.document for each in tables]),
        position=np.concatenate([each.position for each in tables]),
        flags=np.concatenate([each.flags for each in tables]),
    )
