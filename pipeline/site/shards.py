"""Data shards of the site: JSON and typed columns in, one classic script out, and back.

docs/decisions/0003-atlas-shards.md is the normative text. In short:

1. `pack` puts a JSON object and named arrays into one little-endian container, columns at multiples
   of 8 bytes;
2. `write_shard` gzips it (without a time stamp: same data, same bytes), writes
   `FF("<key>","<base64>")`;
3. `read_shard` and `unpack` are the way back, used by tests, `validate` and the Python side of the
   atlas. They parse; nothing in a shard is executed.

Cost: gzip at level 6, about 25 MB/s of payload.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import json
import re
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from featureflow.errors import Command, UserError

MAGIC = b"FFC1"
DTYPES: dict[str, np.dtype[Any]] = {
    "u8": np.dtype("<u1"),
    "u16": np.dtype("<u2"),
    "u32": np.dtype("<u4"),
    "i8": np.dtype("<i1"),
    "i16": np.dtype("<i2"),
    "i32": np.dtype("<i4"),
    "f32": np.dtype("<f4"),
}
_NAME_OF_DTYPE = {dtype: name for name, dtype in DTYPES.items()}
_KEY = re.compile(r"[A-Za-z0-9._/-]+")
_SCRIPT = re.compile(r'FF\("([A-Za-z0-9._/-]+)","([A-Za-z0-9+/]*={0,2})"\)\n?')
_LARGEST_PAYLOAD = 1 << 30


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """One payload: `json` holds strings and small things, `columns` the arrays."""

    json: Mapping[str, Any] = field(default_factory=dict)
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)


def pack(shard: Shard) -> bytes:
    """The container's bytes. Raises TypeError for a dtype that the format does not have."""
    columns, blobs, offset = [], [], 0
    for name, array in shard.columns.items():
        dtype = _NAME_OF_DTYPE.get(array.dtype.newbyteorder("<"))
        if dtype is None:
            raise TypeError(f"column {name}: {array.dtype} is not one of {', '.join(DTYPES)}")
        blob = np.ascontiguousarray(array, DTYPES[dtype]).tobytes()
        columns.append({"name": name, "dtype": dtype, "shape": list(array.shape), "offset": offset})
        blobs.append(blob + bytes(-len(blob) % 8))
        offset += len(blobs[-1])
    header = json.dumps(
        {"json": shard.json, "columns": columns},
        ensure_ascii=False,
        separators=(",", ":"),
        allow_nan=False,
    ).encode("utf-8", errors="replace")
    header += b" " * (-(8 + len(header)) % 8)
    return b"".join([MAGIC, struct.pack("<I", len(header)), header, *blobs])


def unpack(payload: bytes) -> Shard:
    """Parse a container. Raises UserError for anything that is not one."""
    if payload[:4] != MAGIC or len(payload) < 8:
        raise UserError("not an atlas payload", expected="FFC1", found=repr(payload[:4]))
    (length,) = struct.unpack_from("<I", payload, 4)
    try:
        header = json.loads(payload[8 : 8 + length].decode("utf-8"))
        columns = {c["name"]: _column(payload, 8 + length, c) for c in header["columns"]}
        return Shard(json=header["json"], columns=columns)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError("a damaged atlas payload", found=str(error)) from error


def write_shard(site: Path, key: str, shard: Shard) -> Path:
    """Write `site/<key>.js`. The same shard gives the same bytes."""
    if not _KEY.fullmatch(key) or ".." in key:
        raise ValueError(f"{key!r} is not a shard key")
    path = site / f"{key}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = base64.b64encode(gzip.compress(pack(shard), compresslevel=6, mtime=0)).decode("ascii")
    path.write_text(f'FF("{key}","{text}")\n', encoding="ascii")
    return path


def read_shard(site: Path, key: str) -> Shard:
    """Read `site/<key>.js` without executing it. Raises UserError when it is missing, damaged or
    not such a script."""
    path = site / f"{key}.js"
    try:
        text = path.read_text(encoding="ascii")
    except FileNotFoundError as error:
        raise UserError(
            "shard missing", where=str(path), fix=Command("atlas", force=True)
        ) from error
    except UnicodeDecodeError as error:
        raise UserError("a shard is ASCII", where=str(path), found=str(error)) from error
    match = _SCRIPT.fullmatch(text)
    if match is None or match[1] != key:
        raise UserError(
            "not a data shard", where=str(path), expected=f'FF("{key}","<base64>")', found=text[:60]
        )
    try:
        return unpack(_gunzip(base64.b64decode(match[2], validate=True)))
    except (binascii.Error, zlib.error, EOFError) as error:
        raise UserError(
            "a damaged shard", where=str(path), found=str(error), fix=Command("atlas", force=True)
        ) from error
    except UserError as error:
        raise UserError(error.what, where=str(path), found=error.problems[0].found) from error


def narrow(values: np.ndarray, largest: int) -> np.ndarray:
    """Unsigned integers in the smallest dtype that holds `largest`; u16 at least, as token ids and
    latents are."""
    return values.astype(np.uint16 if largest < 0xFFFF else np.uint32)


def rounded(values: np.ndarray, bits: int) -> np.ndarray:
    """float32 with `bits` of the mantissa kept, to nearest, so that it packs well: the error is at
    most a share of 2 ** -(bits + 1). Order is kept; NaN and infinities stay."""
    raw, dropped = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32), 23 - bits
    half = np.uint32((1 << (dropped - 1)) - 1) + ((raw >> np.uint32(dropped)) & np.uint32(1))
    near = ((raw + half) >> np.uint32(dropped) << np.uint32(dropped)).view(np.float32)
    return np.where(np.isfinite(values), near, values).astype(np.float32)


def _column(payload: bytes, base: int, entry: Mapping[str, Any]) -> np.ndarray:
    dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
    count = int(np.prod(shape, dtype=np.int64))
    start = base + entry["offset"]
    if entry["offset"] < 0 or start + count * dtype.itemsize > len(payload):
        raise ValueError(f"column {entry['name']} ends beyond the payload")
    return np.frombuffer(payload, dtype, count, start).reshape(shape)


def _gunzip(blob: bytes) -> bytes:
    """Inflate, but never more than `_LARGEST_PAYLOAD`: a few bytes of gzip may stand for
    gigabytes."""
    inflater = zlib.decompressobj(wbits=31)
    payload = inflater.decompress(blob, _LARGEST_PAYLOAD)
    if not inflater.eof:
        raise EOFError("the gzip stream is cut off or too large")
    return payload
