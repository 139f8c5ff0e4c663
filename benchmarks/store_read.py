"""How fast shuffled batches come: ours against an exact shuffle in memory, and against zarr-python
on the same plan.

    python -m benchmarks.store_read [--rows 262144] [--width 576] [--batch 4096] [--batches 3072]
    [--pairs 4]
                                    [--zarr-pairs 2] [--dtypes bfloat16 float16] [--folder DIR]

All are float32 batches of one size over the same rows, epoch after epoch. The exact shuffle
permutes all rows of an array that is in memory, gathers and widens them. A call takes `--batches`
batches (about 5 s at 2.5 million rows a second), after a short call that is not timed, so that
threads and buffers are there when the clock starts. The files are in the page cache, as in every
epoch but the first.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor

from benchmarks.store_measure import compare
from data.store import ActivationStore, RowFilters, SiteLayout, StoreLayout, write_activations
from data.store.windows import EpochPlan

SITE = "blocks.0.hook_resid_post"
EVERYTHING = RowFilters(drop_bos=False, drop_sinks=False, drop_special=False)
WARM_UP = 64
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--batches", type=int, default=3072)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--zarr-pairs", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16", "float16"])
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; a temporary folder without it"
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        for dtype in options.dtypes:
            store = make_store(folder / f"{dtype}.zarr", options.rows, options.width, dtype)
            measure(store, options, with_zarr=dtype == options.dtypes[0])
    finally:
        shutil.rmtree(folder)


def make_store(url: Path, n_rows: int, width: int, dtype: str) -> ActivationStore:
    layout = StoreLayout(
        sites=(SiteLayout(name=SITE, width=width),),
        dtype=dtype,
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


def measure(store: ActivationStore, options: argparse.Namespace, *, with_zarr: bool) -> None:
    array = zarr.open_array(Path(store.url) / "sites" / SITE / "rows", mode="r")
    facts = {
        "units": options.batches * options.batch,
        "unit": "rows",
        "dtype": store.layout.dtype,
        "width": store.width(SITE),
        "batch": options.batch,
        "rows_in_store": store.n_rows,
        "torch_threads": torch.get_num_threads(),
    }
    with store.batches(
        [SITE], batch_size=options.batch, seed=0, filters=EVERYTHING, reuse_buffers=True
    ) as reader:
        ours, exact = (
            (batch[SITE] for batch in reader),
            iter_exact(array[:], store.layout.dtype, options.batch),
        )
        claim = "shuffled batches / exact shuffle in memory"
        compare_streams(
            claim, exact, ours, options.batches, n_pairs=options.pairs, target=0.6, **facts
        )
        if with_zarr:
            plain = iter_by_zarr(array, reader.plan, store.layout.dtype, options.batch)
            claim = "shuffled batches / zarr-python on the same plan"
            compare_streams(
                claim, plain, ours, options.batches, n_pairs=options.zarr_pairs, target=2.0, **facts
            )


def compare_streams(
    claim: str, control: Iterator[Tensor], candidate: Iterator[Tensor], n: int, **facts: object
) -> None:
    """Time `n` batches of each stream in turn; the streams go on where they were."""
    for stream in (control, candidate):
        take(stream, WARM_UP)
    compare(
        claim,
        control=lambda: take(control, n),
        candidate=lambda: take(candidate, n),
        warm_up=False,
        **facts,
    )


def take(batches: Iterator[Tensor], n: int) -> None:
    for batch in islice(batches, n):
        batch[0, 0].item()


def iter_exact(rows: np.ndarray, dtype: str, batch_size: int) -> Iterator[Tensor]:
    """Batches of a full shuffle of an array in memory, without end."""
    gathered, widened = buffers(rows.shape[1], dtype, batch_size)
    for epoch in count():
        order = np.random.default_rng(epoch).permutation(len(rows))
        for start in range(0, len(order) - batch_size + 1, batch_size):
            np.take(rows, order[start : start + batch_size], axis=0, out=gathered, mode="clip")
            yield widened()


def iter_by_zarr(
    array: zarr.Array, plan_of: Callable[[int], EpochPlan], dtype: str, batch_size: int
) -> Iterator[Tensor]:
    """The same blocks and windows as ours, read by indexing a zarr-python array."""
    gathered, widened = buffers(array.shape[1], dtype, batch_size)
    for epoch in count():
        plan = plan_of(epoch)
        size = plan.choices.block_rows
        for window in range(plan.n_windows):
            rows = np.concatenate(
                [array[b * size : (b + 1) * size] for b in plan.blocks_of(window)]
            )
            slots = plan.slots_of(window)
            for start in range(0, len(slots) - batch_size + 1, batch_size):
                np.take(rows, slots[start : start + batch_size], axis=0, out=gathered, mode="clip")
                yield widened()


def buffers(width: int, dtype: str, batch_size: int) -> tuple[np.ndarray, Callable[[], Tensor]]:
    """Where rows as stored are gathered, and what widens them into a tensor that is used again."""
    stage, out = (
        torch.empty((batch_size, width), dtype=DTYPES[dtype]),
        torch.empty((batch_size, width)),
    )
    return (stage.view(torch.uint16) if dtype == "bfloat16" else stage).numpy(), lambda: out.copy_(
        stage
    )


if __name__ == "__main__":
    main()
