"""Small stores with planted rows, for the tests of the store."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.store import (
    FLAG_BOS,
    ActivationStore,
    DocumentRow,
    SiteLayout,
    StoreLayout,
    StoreWriter,
    TokenTable,
)

RESIDUAL = "blocks.0.hook_resid_post"
MLP = "blocks.1.hook_mlp_out"
N_CONTEXT = 128


def planted_rows(n: int = 5000, width: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """Residual-like rows: dimensions of different mean and spread, and a first token of every
    context far from all."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(torch.randn(width, generator=generator))
    residual = torch.randn(n, width, generator=generator) * spread + 3 * torch.randn(
        width, generator=generator
    )
    residual[::N_CONTEXT] *= 100
    return {RESIDUAL: residual, MLP: torch.randn(n, width // 2, generator=generator)}


def planted_tokens(n: int) -> TokenTable:
    rows = np.arange(n)
    return TokenTable(
        id=rows.astype(np.uint32),
        document=(rows // 300).astype(np.uint32),
        position=(rows % N_CONTEXT).astype(np.uint32),
        flags=np.where(rows % N_CONTEXT == 0, FLAG_BOS, 0).astype(np.uint8),
    )


def planted_layout(rows: dict[str, Tensor], **choices: object) -> StoreLayout:
    n = len(next(iter(rows.values())))
    defaults = {
        "dtype": "bfloat16",
        "shard_rows": 2048,
        "chunk_rows": 256,
        "validation_start": 4096,
        "provenance": {"corpus": "planted"},
    }
    return StoreLayout(
        sites=tuple(SiteLayout(name=name, width=each.shape[1]) for name, each in rows.items()),
        n_rows=n,
        n_context=N_CONTEXT,
        **{**defaults, **choices},
    )


def fill_shards(writer: StoreWriter, rows: dict[str, Tensor], tokens: TokenTable) -> None:
    for shard in writer.missing_shards():
        start, stop = writer.layout.rows_of_shard(shard)
        parts = (
            {k: v[i : min(i + 100, stop)] for k, v in rows.items()} for i in range(start, stop, 100)
        )
        writer.write_shard(shard, tokens.part(start, stop), parts)


def planted_documents(n: int) -> list[DocumentRow]:
    return [DocumentRow(source="planted", title=f"document {i}") for i in range(-(-n // 300))]


def make_store(url: Path | str, rows: dict[str, Tensor], **choices: object) -> ActivationStore:
    layout = planted_layout(rows, **choices)
    writer = StoreWriter.create(url, layout)
    fill_shards(writer, rows, planted_tokens(layout.n_rows))
    writer.finish(planted_documents(layout.n_rows))
    return ActivationStore.open(url)
