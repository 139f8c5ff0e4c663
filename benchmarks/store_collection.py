"""What storing costs: collection of many sites against the bare forward pass of the same model,
nothing stored.

    python -m benchmarks.store_collection [--contexts 128] [--pairs 4] [--random] [--sites
    resid_post …]

The control runs the model's blocks over the same batches; the candidate also reads the sites,
encodes, counts, checks and writes them, flushed to disk. A run is one shard; the metadata of the
store, written once, is made before.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.store_measure import compare
from data.model.language_model import LanguageModel
from data.model.spec import Packaged, Random
from data.store import SiteLayout, StoreLayout, StoreWriter, TokenTable
from data.store.collection import collect_shards
from data.store.layout import record_name
from data.store.patterns import parse_sites


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, default=128)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--random", action="store_true", help="a small model with random weights instead of SmolLM2"
    )
    parser.add_argument(
        "--sites", nargs="+", default=["resid_post", "mlp_out:0-29/4", "attn_out:0-29/4"]
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; a temporary folder without it"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    spec = Random(n_layers=30, d_model=64, d_mlp=128) if options.random else Packaged()
    model = LanguageModel.open(spec, device=options.device)
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        measure(model, options, folder)
    finally:
        shutil.rmtree(folder)


def measure(model: LanguageModel, options: argparse.Namespace, folder: Path) -> None:
    n_rows = options.contexts * options.length
    sites = parse_sites(options.sites, model.sites())
    tokens = planted_tokens(n_rows, options.length, model.d_vocab)
    layout = StoreLayout(
        sites=tuple(SiteLayout(name=site.name, width=model.width(site)) for site in sites),
        dtype="bfloat16",
        n_rows=n_rows,
        n_context=options.length,
        shard_rows=-(-n_rows // 1024) * 1024,
        chunk_rows=1024,
    )

    def bare() -> None:
        ids = torch.from_numpy(tokens.id.astype("int64")).reshape(-1, options.length)
        for start in range(0, len(ids), options.batch):
            with torch.no_grad():
                model.hf.base_model(
                    ids[start : start + options.batch].to(options.device), use_cache=False
                )

    writer = StoreWriter.create(folder / "store.zarr", layout)

    def collected() -> None:
        writer.place.remove(record_name(0))
        batch_rows = options.batch * options.length
        collect_shards(
            model, writer, [(0, tokens)], sites, batch_rows=batch_rows, rows_done=lambda n: None
        )

    compare(
        "collection / bare forward pass",
        control=bare,
        candidate=collected,
        units=n_rows,
        unit="tokens",
        n_pairs=options.pairs,
        target=0.85,
        model=model.name,
        n_sites=len(sites),
        n_threads=options.threads,
        batch=f"{options.batch}x{options.length}",
        device=options.device,
    )


def planted_tokens(n_rows: int, length: int, d_vocab: int) -> TokenTable:
    rows = np.arange(n_rows)
    return TokenTable(
        id=np.random.default_rng(0).integers(3, d_vocab, n_rows).astype(np.uint32),
        document=(rows // length).astype(np.uint32),
        position=(rows % length).astype(np.uint32),
        flags=(rows % length == 0).astype(np.uint8),
    )


if __name__ == "__main__":
    main()
