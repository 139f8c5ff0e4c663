"""Shards: what is written is read back, the file is one call with base64, and nothing else is
accepted."""

from __future__ import annotations

import base64
import gzip
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from featureflow.errors import UserError
from pipeline.site.shards import (
    DTYPES,
    MAGIC,
    Shard,
    pack,
    read_shard,
    rounded,
    unpack,
    write_shard,
)

ARRAYS = st.sampled_from(sorted(DTYPES)).flatmap(
    lambda name: hnp.arrays(
        DTYPES[name], hnp.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=5)
    )
)
TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    json_part=st.dictionaries(TEXTS, TEXTS | st.integers(-5, 5), max_size=3),
    columns=st.dictionaries(TEXTS, ARRAYS, max_size=4),
)
def test_what_is_packed_is_unpacked(json_part, columns):
    back = unpack(pack(Shard(json=json_part, columns=columns)))
    assert back.json == json_part
    assert list(back.columns) == list(columns)
    for name, array in columns.items():
        assert back.columns[name].shape == array.shape
        assert back.columns[name].tobytes() == array.tobytes()


@given(
    values=hnp.arrays(
        np.float32, st.integers(1, 40), elements=st.floats(-(2.0**100), 2.0**100, width=32)
    ),
    bits=st.integers(4, 20),
)
def test_rounded_numbers_are_near_in_order_and_short(values, bits):
    near = rounded(np.append(values, np.float32([np.nan, np.inf])), bits)
    assert np.isnan(near[-2])
    assert np.isposinf(near[-1])
    normal = np.abs(values) >= np.finfo(np.float32).tiny
    error = np.abs(near[:-2].astype(np.float64) - values)
    assert (error <= np.abs(values.astype(np.float64)) * 2.0 ** -(bits + 1))[normal].all()
    assert (np.diff(near[:-2][np.argsort(values)]) >= 0).all()
    assert not (near[:-2].view(np.uint32) & np.uint32((1 << (23 - bits)) - 1)).any()


def test_the_bytes_are_those_the_format_page_describes():
    payload = pack(
        Shard(
            json={"a": "é"},
            columns={"x": np.array([1, 2, 3], np.uint16), "y": np.array([[1.5]], np.float32)},
        )
    )
    length = int.from_bytes(payload[4:8], "little")
    header = json.loads(payload[8 : 8 + length])
    assert payload[:4] == b"FFC1"
    assert (8 + length) % 8 == 0
    assert header["columns"] == [
        {"name": "x", "dtype": "u16", "shape": [3], "offset": 0},
        {"name": "y", "dtype": "f32", "shape": [1, 1], "offset": 8},
    ]
    assert payload[8 + length :] == b"\1\0\2\0\3\0\0\0" + np.float32(1.5).tobytes() + bytes(4)


def test_a_file_is_one_call_whatever_the_text(tmp_path):
    hostile = '</script><script>alert(1)</script>\u2028"\\);FF("'
    path = write_shard(
        tmp_path, "sites/L12.mlp/labels", Shard(json={"labels": [hostile, "\ud800"]})
    )
    text = path.read_text()
    assert re.fullmatch(r'FF\("sites/L12\.mlp/labels","[A-Za-z0-9+/]+={0,2}"\)\n', text)
    assert read_shard(tmp_path, "sites/L12.mlp/labels").json["labels"] == [hostile, "?"]


def test_the_same_shard_gives_the_same_bytes(tmp_path):
    shard = Shard(json={"a": 1}, columns={"x": np.arange(5, dtype=np.uint8)})
    assert (
        write_shard(tmp_path / "a", "k", shard).read_bytes()
        == write_shard(tmp_path / "b", "k", shard).read_bytes()
    )


def _script(payload: bytes, *, cut: int = 0) -> str:
    packed = gzip.compress(payload, mtime=0)
    return f'FF("k","{base64.b64encode(packed[: len(packed) - cut]).decode()}")'


@pytest.mark.parametrize(
    "text",
    [
        "",
        'FF("other","AAAA")',
        'FF("k","AAAA");alert(1)',
        'FF("k","not base64!")',
        'FF("k","AAAA")',
        _script(b"JUNK" * 9),
        _script(MAGIC + bytes(40), cut=9),
        _script(MAGIC + b"\x40\0\0\0{}"),
    ],
)
def test_anything_else_is_refused_with_its_place(tmp_path, text):
    (tmp_path / "k.js").write_text(text)
    with pytest.raises(UserError, match=r"k\.js"):
        read_shard(tmp_path, "k")


def test_a_column_that_ends_beyond_the_payload_is_refused(tmp_path):
    payload = pack(Shard(columns={"x": np.arange(8, dtype=np.uint32)}))
    with pytest.raises(UserError, match="damaged"):
        unpack(payload[:-8])


def test_keys_cannot_leave_the_folder(tmp_path):
    for key in ("../x", "a b", 'a"', "a/../b"):
        with pytest.raises(ValueError, match="shard key"):
            write_shard(tmp_path, key, Shard())
