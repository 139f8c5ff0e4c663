"""Vocabulary and corpus of the synthetic atlas as shards."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.browser.synthetic.shards import write_shard
from tests.browser.synthetic.world import HOSTILE_TEXTS, World


def write_texts(folder: Path, world: World) -> None:
    sizes, rng = world.sizes, world.rng
    lengths = np.array([len(token) for token in world.vocabulary])
    offset = np.concatenate([[0], lengths.cumsum()]).astype(np.uint32)
    data = np.frombuffer(b"".join(world.vocabulary), np.uint8)
    write_shard(
        folder, "vocab", {"n_tokens": len(lengths), "special": [0]}, offset=offset, bytes=data
    )
    n_rows = sizes.n_documents * sizes.n_context
    tokens = rng.zipf(1.3, n_rows) % len(lengths)
    split = rng.integers(0, n_rows - 2, n_rows // 40)
    tokens[split], tokens[split + 1] = 4, 5  # one character made of two tokens
    world.tokens = tokens.astype(np.uint16)
    for shard in range(-(-n_rows // sizes.rows_per_shard)):
        part = world.tokens[shard * sizes.rows_per_shard : (shard + 1) * sizes.rows_per_shard]
        write_shard(folder, f"corpus/{shard:03d}", {}, token=part)
    documents = np.arange(sizes.n_documents)
    titles = [
        HOSTILE_TEXTS[d % len(HOSTILE_TEXTS)] if d % 9 == 0 and sizes.hostile else f"Document {d}"
        for d in documents
    ]
    write_shard(
        folder,
        "corpus/documents",
        {"titles": titles},
        run_row=(np.arange(sizes.n_documents + 1) * sizes.n_context).astype(np.uint32),
        run_document=documents.astype(np.uint32),
        run_position=np.zeros(sizes.n_documents, np.uint32),
        source=(documents % 3).astype(np.uint8),
        label=np.where(documents % 5 == 0, 255, documents % 2).astype(np.uint8),
    )
