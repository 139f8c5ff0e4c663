"""docs/formats.md against what is written, and worked numbers of the shard's bytes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from data.store.layout import TOKEN_COLUMNS
from data.store.shards import shard_index
from data.store.statistics import N_BINS
from data.tokens import FLAG_BOS, FLAG_NON_FINITE, FLAG_PADDING, FLAG_SINK, FLAG_SPECIAL
from tests.data.store.made import RESIDUAL, make_store, planted_layout, planted_rows

TEXT = (
    (Path(__file__).parents[3] / "docs" / "formats.md")
    .read_text(encoding="utf-8")
    .split("## Activation store")[1]
)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_documented_paths_are_those_that_are_written(tmp_path, dtype):
    make_store(tmp_path / "store.zarr", planted_rows(), dtype=dtype)
    documented = {
        each
        for line in TEXT.splitlines()
        if line.startswith("| `") and ("/" in line.split("|")[1])
        for each in re.findall(r"`([a-z]+/[^`]+)`", line.split("|")[1])
        if "int8 only" not in line or dtype == "int8"
    }
    arrays = {
        path.parent.relative_to(tmp_path / "store.zarr").as_posix()
        for path in tmp_path.rglob("zarr.json")
    }
    written = {
        name.replace(RESIDUAL, "<name>")
        for name in arrays
        if name.count("/") == 2 and RESIDUAL in name
    }
    written |= {f"tokens/{column}" for column in TOKEN_COLUMNS}
    written |= {
        "records/<shard, six digits>.json",
        "records/documents.parquet",
        "records/complete.json",
    }
    assert documented == written


def test_the_documented_attributes_and_record_keys_are_those_that_are_written(tmp_path):
    make_store(tmp_path / "store.zarr", planted_rows())
    attributes = json.loads((tmp_path / "store.zarr" / "zarr.json").read_text())["attributes"][
        "featureflow"
    ]
    record = json.loads((tmp_path / "store.zarr" / "records" / "000001.json").read_text())
    complete = json.loads((tmp_path / "store.zarr" / "records" / "complete.json").read_text())
    for key in (*attributes, *record, *complete):
        assert f"`{key}`" in TEXT, key
    assert f"{N_BINS} counts" in TEXT


def test_the_documented_flags_are_those_of_the_code():
    flags = [FLAG_BOS, FLAG_SPECIAL, FLAG_SINK, FLAG_PADDING, FLAG_NON_FINITE]
    assert [
        int(n) for n in re.findall(r"(\d+) (?:BOS|special token|sink|padding|not finite)", TEXT)
    ] == flags


def test_the_bytes_of_a_shard_are_as_worked_by_hand(tmp_path):
    """64 dimensions of 2 bytes, 256 rows a chunk: 32,768 bytes and 4 of checksum; 8 chunks, an
    index of 132 bytes."""
    rows = planted_rows()
    make_store(tmp_path / "store.zarr", rows)
    folder = tmp_path / "store.zarr" / "sites" / RESIDUAL / "rows" / "c"
    assert (folder / "0" / "0").stat().st_size == 8 * 32_772 + 132
    assert (
        folder / "2" / "0"
    ).stat().st_size == 4 * 32_772 + 132  # 904 rows: four chunks, the last one padded
    content = (folder / "0" / "0").read_bytes()
    index = np.frombuffer(content[-132:-4], dtype="<u8").reshape(8, 2)
    assert index.tolist() == [[k * 32_772, 32_772] for k in range(8)]
    second = np.frombuffer(content[32_772 : 32_772 + 128], dtype="<u2")
    assert np.array_equal(second, rows[RESIDUAL][256].bfloat16().view(torch.uint16).numpy())


def test_chunks_that_do_not_exist_are_marked_as_zarr_marks_them():
    layout = planted_layout(planted_rows())
    index = shard_index(layout.rows_array(layout.sites[0]), 3)
    assert index[3:].tolist() == [[2**64 - 1, 2**64 - 1]] * 5
