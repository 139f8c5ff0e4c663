"""How fast shuffled batches come: ours against an exact shuffle in memory, and against zarr-python on the same plan.

    python benchmarks/store_read.py [--rows 262144] [--width 576] [--batch 4096] [--pairs 12] [--folder DIR]

All are float32 batches of the same size; the exact shuffle gathers rows of an array in memory and widens them.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
import zarr
from store_measure import compare

from data.store import ActivationStore, RowFilters, SiteLayout, StoreLayout, write_activations

SITE = "blocks.0.hook_resid_post"
EVERYTHING = RowFilters(drop_bos=False, drop_sinks=False, drop_special=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=None, help="where to write; a temporary folder without it")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        store = make_store(folder / "store.zarr", options.rows, options.width)
        measure(store, options.batch, options.pairs)
    finally:
        shutil.rmtree(folder)


def make_store(url: Path, n_rows: int, width: int) -> ActivationStore:
    layout = StoreLayout(
        sites=(SiteLayout(name=SITE, width=width),),
        dtype="bfloat16",
        n_rows=n_rows,
        n_context=128,
        shard_rows=65_536,
        chunk_rows=1024,
    )
    generator = torch.Generator().manual_seed(0)
    parts = (
        ({SITE: torch.randn(8192, width, generator=generator)[: n_rows - start]}, None)
        for start in range(0, n_rows, 8192)
    )
    write_activations(url, parts, layout=layout)
    return ActivationStore.open(url)


def measure(store: ActivationStore, batch_size: int, n_pairs: int) -> None:
    array = zarr.open_array(Path(store.url) / "sites" / SITE / "rows", mode="r")
    in_memory = array[:]
    out = torch.empty((batch_size, store.width(SITE)))
    seeds = iter(range(10_000))

    def reader() -> object:
        choices = {"batch_size": batch_size, "seed": next(seeds), "filters": EVERYTHING, "n_epochs": 1}
        return store.batches([SITE], reuse_buffers=True, **choices)

    def ours() -> None:
        for batch in reader():
            batch[SITE][0, 0].item()

    def exact() -> None:
        order = np.random.default_rng(next(seeds)).permutation(len(in_memory))
        stage = np.empty((batch_size, in_memory.shape[1]), np.uint16)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            np.take(in_memory, order[start : start + batch_size], axis=0, out=stage, mode="clip")
            out.copy_(torch.from_numpy(stage).view(torch.bfloat16))

    def by_zarr() -> None:
        """The same blocks and windows, read by indexing a zarr-python array."""
        made = reader()
        plan, block = made.plan(0), made.choices.block_rows
        stage = np.empty((batch_size, in_memory.shape[1]), np.uint16)
        for window in range(plan.n_windows):
            rows = np.concatenate([array[b * block : (b + 1) * block] for b in plan.blocks_of(window)])
            slots = plan.slots_of(window)
            for start in range(0, len(slots) - batch_size + 1, batch_size):
                np.take(rows, slots[start : start + batch_size], axis=0, out=stage, mode="clip")
                out.copy_(torch.from_numpy(stage).view(torch.bfloat16))

    common = {
        "units": store.n_rows,
        "unit": "rows",
        "n_pairs": n_pairs,
        "width": store.width(SITE),
        "rows": store.n_rows,
    }
    compare("shuffled batches / exact shuffle in memory", control=exact, candidate=ours, target=0.6, **common)
    compare("shuffled batches / zarr-python on the same plan", control=by_zarr, candidate=ours, target=2.0, **common)


if __name__ == "__main__":
    main()
