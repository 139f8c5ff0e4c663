"""Shard records: the authority on which rows of a store exist.

A record is written after every file of its shard is flushed and named, so a shard without one is
not there, whatever lies in the folders. It holds no time and no machine: a resumed run writes the
same bytes as an uninterrupted one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import xxhash

from data.store.layout import COMPLETE, MEND_DAMAGE, StoreLayout, canonical_json, record_name
from data.store.places import Place
from data.store.shards import FileSum
from featureflow.errors import Problem, UserError


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
