"""How fast a shard is written: ours against plain write() of the same bytes, np.memmap and
zarr-python.

python -m benchmarks.store_write [--rows 65536] [--width 576] [--pairs 12] [--folder DIR]
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import zarr

from benchmarks.store_measure import compare
from data.store.layout import SiteLayout, StoreLayout
from data.store.places import LocalPlace
from data.store.shards import ShardFile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=65_536)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to write; a temporary folder without it"
    )
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        measure(folder, options.rows, options.width, options.pairs)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, n_rows: int, width: int, n_pairs: int) -> None:
    rows = np.random.default_rng(0).integers(0, 65_536, (n_rows, width), dtype=np.uint16)
    layout = StoreLayout(
        sites=(SiteLayout(name="site", width=width),),
        dtype="bfloat16",
        n_rows=n_rows,
        n_context=1,
        shard_rows=n_rows,
        chunk_rows=1024,
    )
    array = layout.rows_array(layout.sites[0])
    place = LocalPlace(folder / "ours")

    def ours() -> None:
        shard = ShardFile(place, array, 0)
        for start in range(0, n_rows, 1024):
            shard.append(rows[start : start + 1024])
        shard.finish()

    def raw(sync: bool) -> None:
        with (folder / "raw").open("wb", buffering=0) as stream:
            stream.write(rows.data)
            if sync:
                os.fsync(stream.fileno())

    def memmap() -> None:
        mapped = np.memmap(folder / "mapped", dtype=np.uint16, mode="w+", shape=rows.shape)
        mapped[:] = rows

    def by_zarr() -> None:
        made = zarr.create_array(
            folder / "zarr",
            shape=rows.shape,
            shards=rows.shape,
            chunks=(1024, width),
            dtype="uint16",
            compressors=[zarr.codecs.Crc32cCodec()],
            overwrite=True,
        )
        made[:] = rows

    facts = {"rows": n_rows, "width": width, "durable": "crc32c, xxh3, fsync and rename"}
    units, unit = rows.nbytes / 1e6, "MB"
    common = {"candidate": ours, "units": units, "unit": unit, "n_pairs": n_pairs, **facts}
    compare("durable shard write / write() and fsync", control=lambda: raw(True), **common)
    compare(
        "durable shard write / write() unsynced", control=lambda: raw(False), target=0.3, **common
    )
    compare("durable shard write / np.memmap", control=memmap, **common)
    compare("durable shard write / zarr-python, same layout", control=by_zarr, **common)


if __name__ == "__main__":
    main()
