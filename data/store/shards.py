"""The bytes of the files of a store: rows in, a valid Zarr v3 shard out, and back with every
checksum compared.

With B bytes a row, I rows an inner chunk, S = I·B, L = S + 4 and k inner chunks a shard, a shard
file holds

    j·L        S bytes   rows j·I … (j+1)·I − 1, C order, little endian
    j·L + S    4 bytes   crc32c of those S bytes
    n·L        16·k      the index: offset j·L and size L of each of the n chunks that exist; 2⁶⁴−1
    twice for the others
    n·L + 16·k 4 bytes   crc32c of the index

The last chunk of the last shard is padded with zeros to I rows. Chunks are appended as they come,
so writing a shard needs the memory of one chunk. Arrays that are not sharded are one chunk a file:
the values and their crc32c.

Cost: one pass of crc32c and one of xxh3 over the bytes, one write, one fsync. A plain writer of the
same bytes through zarr-python costs 5–10 times as much (docs/benchmarks.md), which is why these few
lines exist.

Shard records: the authority on which rows of a store exist.

A record is written after every file of its shard is flushed and named, so a shard without one is
not there, whatever lies in the folders. It holds no time and no machine: a resumed run writes the
same bytes as an uninterrupted one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import google_crc32c
import numpy as np
import xxhash

from data.store.layout import (
    COMPLETE,
    MEND_DAMAGE,
    ArrayLayout,
    StoreLayout,
    canonical_json,
    record_name,
)
from data.store.places import Place
from featureflow.errors import Problem, UserError

_MISSING = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class FileSum:
    """Size and xxh3-128 of a finished file, as its shard record keeps them."""

    size: int
    xxh3: str


class ShardFile:
    """One shard file being written, chunk by chunk, into a temporary file; `finish` publishes
    it."""

    def __init__(self, place: Place, array: ArrayLayout, shard: int) -> None:
        self._place = place
        self._name = array.file_of(shard)
        self._array = array
        self._temporary: Path = place.temporary(self._name)
        self._stream = self._temporary.open("wb", buffering=0)
        self._hash = xxhash.xxh3_128()
        self._n_chunks = 0

    def append(self, rows: np.ndarray) -> None:
        """Add one inner chunk: a contiguous (inner_rows, …) array of the stored dtype."""
        body = _bytes_of(np.ascontiguousarray(rows))
        self._write(body, google_crc32c.value(np.frombuffer(body, np.uint8)).to_bytes(4, "little"))
        self._n_chunks += 1

    def finish(self) -> FileSum:
        """Write the index, flush to disk and publish under the final name."""
        index = shard_index(self._array, self._n_chunks).tobytes()
        self._write(memoryview(index), google_crc32c.value(index).to_bytes(4, "little"))
        size = self._stream.tell()
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._place.publish(self._temporary, self._name)
        return FileSum(size=size, xxh3=self._hash.hexdigest())

    def abandon(self) -> None:
        """Remove the temporary file; safe after `finish`."""
        self._stream.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, body: memoryview, checksum: bytes) -> None:
        parts = [body, memoryview(checksum)]
        for part in parts:
            self._hash.update(part)
        while parts:
            written = os.writev(self._stream.fileno(), parts)
            while parts and written >= len(parts[0]):
                written -= len(parts.pop(0))
            if parts:
                parts[0] = parts[0][written:]


def shard_index(array: ArrayLayout, n_chunks: int) -> np.ndarray:
    """Offset and size of each inner chunk, (chunk, 2) u64; chunks that do not exist are marked as
    Zarr marks them."""
    inner = array.inner_rows or 1
    length = inner * array.row_bytes + 4
    index = np.full((array.chunk[0] // inner, 2), _MISSING, dtype="<u8")
    index[:n_chunks, 0] = np.arange(n_chunks, dtype=np.uint64) * np.uint64(length)
    index[:n_chunks, 1] = length
    return index


def write_chunk_file(place: Place, array: ArrayLayout, index: int, values: np.ndarray) -> FileSum:
    """Write a chunk of an array that is not sharded; fewer values than the chunk holds are padded
    with zeros."""
    chunk = np.zeros(array.chunk, dtype=np.dtype(array.dtype).newbyteorder("<"))
    chunk.reshape(array.chunk)[: len(values)] = values
    body = chunk.tobytes()
    content = body + google_crc32c.value(body).to_bytes(4, "little")
    name = array.file_of(index)
    temporary = place.temporary(name)
    with temporary.open("wb", buffering=0) as stream:
        stream.write(content)
        os.fsync(stream.fileno())
    place.publish(temporary, name)
    return FileSum(size=len(content), xxh3=xxhash.xxh3_128_hexdigest(content))


def read_chunk_file(place: Place, array: ArrayLayout, index: int) -> np.ndarray:
    """Read a chunk of an array that is not sharded, checksum compared."""
    name = array.file_of(index)
    try:
        content = place.read(name)
    except (FileNotFoundError, NotADirectoryError):
        raise damaged(place, array, index, "file missing") from None
    size = array.chunk[0] * array.row_bytes
    if len(content) != size + 4:
        raise damaged(place, array, index, f"size is {len(content)} bytes, not {size + 4}")
    if google_crc32c.value(content[:size]) != int.from_bytes(content[size:], "little"):
        raise damaged(place, array, index, "checksum differs")
    return np.frombuffer(
        content,
        dtype=np.dtype(array.dtype).newbyteorder("<"),
        count=size // np.dtype(array.dtype).itemsize,
    ).reshape(array.chunk)


def read_chunks(place: Place, array: ArrayLayout, shard: int, first: int, out: np.ndarray) -> None:
    """Read whole inner chunks `first`, `first`+1, … of one shard into `out`, a contiguous
    (n·inner_rows, width) array of the stored dtype. Every checksum is compared."""
    inner = array.inner_rows or 1
    n_chunks, body_size = len(out) // inner, inner * array.row_bytes
    view = _bytes_of(out)
    checksums = np.empty(n_chunks, dtype="<u4")
    check_view = _bytes_of(checksums)
    buffers = []
    for j in range(n_chunks):
        buffers += [view[j * body_size : (j + 1) * body_size], check_view[4 * j : 4 * j + 4]]
    try:
        n_read = place.read_into(array.file_of(shard), first * (body_size + 4), buffers)
    except (FileNotFoundError, NotADirectoryError):
        raise damaged(place, array, shard, "file missing") from None
    if n_read != n_chunks * (body_size + 4):
        raise damaged(place, array, shard, "file truncated")
    flat = np.frombuffer(view, np.uint8).reshape(n_chunks, body_size)
    for j in range(n_chunks):
        if google_crc32c.value(flat[j]) != checksums[j]:
            raise damaged(place, array, shard, f"checksum differs in chunk {first + j}")


def _bytes_of(array: np.ndarray) -> memoryview:
    """The memory of a contiguous array, writable where the array is."""
    return memoryview(array.data).cast("B")


def damaged(place: Place, array: ArrayLayout, shard: int, what: str) -> UserError:
    """The error for bytes that cannot be trusted; nothing is ever replaced by zeros."""
    site = array.path.removeprefix("sites/").rpartition("/")[0] or array.path
    return UserError(
        f"the activation store is damaged: {what}",
        where=f"{place.url}/{array.file_of(shard)} (shard {shard}, {site})",
        fix=MEND_DAMAGE,
    )


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One finished shard: its rows, its files with size and xxh3, and per site the counts that the
    statistics need."""

    identity: str
    shard: int
    start: int
    stop: int
    n_kept: int
    files: Mapping[str, FileSum]
    n_non_finite: Mapping[str, int]
    histograms: Mapping[str, list[int]]
    variance_lost: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> bytes:
        document = {
            "identity": self.identity,
            "shard": self.shard,
            "rows": [self.start, self.stop],
            "n_kept": self.n_kept,
            "files": {name: [each.size, each.xxh3] for name, each in self.files.items()},
            "n_non_finite": dict(self.n_non_finite),
            "histograms": dict(self.histograms),
            **({"variance_lost": dict(self.variance_lost)} if self.variance_lost else {}),
        }
        return (canonical_json(document) + "\n").encode()


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What `records/complete.json` says: the whole store, named by the checksums of its records."""

    identity: str
    n_rows: int
    validation_start: int | None
    records: Mapping[int, str]
    documents: FileSum

    def to_json(self) -> bytes:
        document = {
            "identity": self.identity,
            "n_rows": self.n_rows,
            "validation_start": self.validation_start,
            "records": {f"{shard:06d}": each for shard, each in self.records.items()},
            "documents": [self.documents.size, self.documents.xxh3],
        }
        return (canonical_json(document) + "\n").encode()


def parse_record(content: bytes, *, where: str) -> ShardRecord:
    """Read a record. Raises UserError when it is not one."""
    try:
        document = json.loads(content)
        start, stop = document["rows"]
        return ShardRecord(
            identity=document["identity"],
            shard=int(document["shard"]),
            start=int(start),
            stop=int(stop),
            n_kept=int(document["n_kept"]),
            files={
                name: FileSum(size=int(size), xxh3=str(xxh3))
                for name, (size, xxh3) in document["files"].items()
            },
            n_non_finite=document["n_non_finite"],
            histograms=document["histograms"],
            variance_lost=document.get("variance_lost", {}),
        )
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "the shard record is damaged", where=where, found=str(error), fix=MEND_DAMAGE
        ) from error


def read_record(place: Place, shard: int) -> ShardRecord | None:
    """The record of a shard, None when there is none."""
    try:
        content = place.read(record_name(shard))
    except FileNotFoundError:
        return None
    return parse_record(content, where=f"{place.url}/{record_name(shard)}")


def read_completion(place: Place) -> Completion | None:
    """`records/complete.json`, None when the store is not finished."""
    try:
        content = place.read(COMPLETE)
    except FileNotFoundError:
        return None
    try:
        document = json.loads(content)
        size, xxh3 = document["documents"]
        return Completion(
            identity=document["identity"],
            n_rows=int(document["n_rows"]),
            validation_start=document["validation_start"],
            records={int(shard): str(each) for shard, each in document["records"].items()},
            documents=FileSum(size=int(size), xxh3=str(xxh3)),
        )
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        where = f"{place.url}/{COMPLETE}"
        raise UserError(
            "the store's completion record is damaged",
            where=where,
            found=str(error),
            fix=MEND_DAMAGE,
        ) from error


def iter_problems_of_record(
    record: ShardRecord, layout: StoreLayout, sizes: Mapping[str, int]
) -> Iterator[Problem]:
    """What is wrong with a shard as far as names and sizes tell. A short last shard has the files
    of a longer one, with padding, so its rows are compared too."""
    where = record_name(record.shard)
    if record.identity != layout.identity:
        yield Problem(
            what="a record of another run",
            where=where,
            expected=layout.identity[:16],
            found=record.identity[:16],
        )
        return
    rows, wanted = (record.start, record.stop), layout.rows_of_shard(record.shard)
    if rows != wanted:
        yield Problem(
            what="a record of other rows", where=where, expected=str(wanted), found=str(rows)
        )
        return
    expected = {array.file_of(record.shard) for array in layout.iter_arrays()}
    for name in sorted(expected ^ set(record.files)):
        yield Problem(
            what="the record and the layout disagree about this file", where=f"{where}: {name}"
        )
    for name, each in record.files.items():
        found = sizes.get(name)
        if found is None:
            yield Problem(what=f"shard {record.shard}: file missing", where=name)
        elif found != each.size:
            what = f"shard {record.shard}: size differs"
            yield Problem(
                what=what, where=name, expected=f"{each.size} bytes", found=f"{found} bytes"
            )


def sum_of(content: bytes) -> FileSum:
    return FileSum(size=len(content), xxh3=xxhash.xxh3_128_hexdigest(content))
