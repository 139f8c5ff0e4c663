"""A world of planted activations into a store, by the usual writer.

Contexts are drawn one after the other (data/worlds/superposed.py); each is a document, and the last
ones are for validation. Memory: all rows of all layers, float32.
"""

from __future__ import annotations

import hashlib

import numpy as np

from data.store.writer import StoreWriter
from data.text.packing import DocumentRecord, PackedTokens
from data.tokens import FLAG_BOS, FLAG_SPECIAL
from data.worlds.superposed import Superposed
from featureflow.errors import UserError
from featureflow.sites import Site


def planted_tokens(world: Superposed, n_tokens: int, validation_fraction: float) -> PackedTokens:
    """The tokens of as many whole contexts as fit. Raises UserError for fewer than two."""
    n = n_tokens // world.length
    if n < 2:
        raise UserError(
            "fewer tokens are asked for than two contexts hold",
            found=str(n_tokens),
            expected=f"at least {2 * world.length}",
        )
    ids = world.ids(n)
    position = np.tile(np.arange(world.length), n)
    documents = tuple(
        DocumentRecord(
            source=world.kind,
            title=f"{world.kind} {number}",
            label="",
            sha256=hashlib.sha256(row.tobytes()).hexdigest(),
            n_tokens=world.length - 1,
        )
        for number, row in enumerate(ids)
    )
    n_validation = max(1, round(validation_fraction * n)) if validation_fraction else 0
    return PackedTokens(
        n_context=world.length,
        validation_start=(n - n_validation) * world.length,
        id=ids.ravel().astype(np.uint32),
        document=np.repeat(np.arange(n), world.length).astype(np.uint32),
        position=position.astype(np.uint32),
        flags=np.where(position == 0, FLAG_BOS | FLAG_SPECIAL, 0).astype(np.uint8),
        documents=documents,
    )


def plant_shards(
    world: Superposed, writer: StoreWriter, sites: tuple[Site, ...], packed: PackedTokens
) -> int:
    """Write the shards that are missing; returns how many rows that were."""
    table, n_rows = packed.table(), 0
    missing = writer.missing_shards()
    layers = world.activations(packed.n_contexts) if missing else ()
    for shard in missing:
        start, stop = writer.layout.rows_of_shard(shard)
        rows = {site.name: layers[site.layer][start:stop] for site in sites}
        writer.write_shard(shard, table.part(start, stop), [rows])
        n_rows += stop - start
    return n_rows
