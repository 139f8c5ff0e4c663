"""The FFC1 container and its script, written from the published format; the package's own writer is
not imported."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np


def container(document: dict[str, Any], **columns: np.ndarray) -> bytes:
    """The FFC1 container of the format."""
    entries, parts, offset = [], [], 0
    for name, value in columns.items():
        array = np.ascontiguousarray(value)
        dtype = {"f": "f", "u": "u", "i": "i"}[array.dtype.kind] + str(8 * array.itemsize)
        entries.append({"name": name, "dtype": dtype, "shape": list(array.shape), "offset": offset})
        data = array.tobytes()
        padded = data + b"\0" * (-len(data) % 8)
        parts.append(padded)
        offset += len(padded)
    header = json.dumps({"json": document, "columns": entries}).encode()
    header += b" " * (-len(header) % 8)
    return b"FFC1" + len(header).to_bytes(4, "little") + header + b"".join(parts)


def write_shard(folder: Path, key: str, document: dict[str, Any], **columns: np.ndarray) -> None:
    write_payload(folder, key, container(document, **columns))


def write_payload(folder: Path, key: str, payload: bytes) -> None:
    path = folder / f"{key}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = base64.b64encode(gzip.compress(payload, 1)).decode()
    path.write_text(f'FF("{key}","{text}")\n')
