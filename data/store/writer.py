"""Writing a store: activations of one shard after another in, files and shard records out.

1. `StoreWriter.create` writes the metadata, or takes up a store that the same run began; another
   run is refused.
2. `write_shard` claims a shard, and for each inner chunk of rows (a) decodes it as a reader will,
   (b) flags sinks and non-finite rows, (c) adds to the statistics, (d) appends the chunk to the
   shard file of each site.
3. The small arrays follow, then the record, last. `finish` writes the document table and the
   completion record.

Memory: one chunk of every site. Every file is flushed, and gets its name by rename. Deterministic:
the same activations give the same bytes, whatever was interrupted in between.

Activations of any model into a store: an iterator of rows of unknown length in, shards out.

The token columns of a shard are kept until it is full, because its record needs them; rows wait
with them, so memory is one shard of every site.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from torch import Tensor

from data.store.chunks import ChunkStatistics, ShardChunks
from data.store.layout import (
    COMPLETE,
    DOCUMENTS,
    MEND_DAMAGE,
    TOKEN_COLUMNS,
    StoreLayout,
    parse_layout,
    record_name,
)
from data.store.places import LocalPlace, Place, explained_writes, open_place, write_bytes
from data.store.shards import (
    Completion,
    FileSum,
    ShardRecord,
    iter_problems_of_record,
    read_completion,
    read_record,
    sum_of,
    write_chunk_file,
)
from data.tokens import DocumentRow, TokenTable
from featureflow.errors import UserError

Rows = Mapping[str, Tensor | np.ndarray]
"""Activations of the same rows at every site: name of the site to `Float["row d_model"]`."""


class StoreWriter:
    """A store that is being written. Several processes may write different shards of it at the same
    time."""

    def __init__(
        self, place: Place, layout: StoreLayout, *, allow_non_finite: bool = False
    ) -> None:
        self.place = place
        self.layout = layout
        self.allow_non_finite = allow_non_finite

    @classmethod
    def create(
        cls, url: str | Path, layout: StoreLayout, *, allow_non_finite: bool = False
    ) -> StoreWriter:
        """Begin a store, or take up the one that lies there if the same run began it.

        Raises UserError if another run's store is there, or if the place cannot be written."""
        place = open_place(url)
        writer = cls(place, layout, allow_non_finite=allow_non_finite)
        try:
            existing = place.read("zarr.json")
        except FileNotFoundError:
            writer._write_metadata()
            return writer
        found = parse_layout(existing, where=f"{place.url}/zarr.json")
        if found.identity != layout.identity:
            raise UserError(
                "another activation store is in the way",
                where=place.url,
                expected=f"run {layout.identity[:16]}",
                found=f"run {found.identity[:16]}",
                fix="remove that folder or choose another place",
            )
        if read_completion(place) is not None:
            writer.layout = found
        return writer

    @classmethod
    def attach(cls, url: str | Path, *, allow_non_finite: bool = False) -> StoreWriter:
        """Take up a store that `create` began, in another process or on another machine."""
        place = open_place(url)
        layout = parse_layout(place.read("zarr.json"), where=f"{place.url}/zarr.json")
        return cls(place, layout, allow_non_finite=allow_non_finite)

    def missing_shards(self) -> list[int]:
        """Shards that have no record, or whose files do not have the recorded sizes."""
        sizes = self.place.sizes()
        return [shard for shard in range(self.layout.n_shards) if not self._is_sound(shard, sizes)]

    def write_shard(self, shard: int, tokens: TokenTable, batches: Iterable[Rows]) -> ShardRecord:
        """Write one shard from batches of rows in order. `tokens` are the tokens of this shard
        alone.

        A shard that has a sound record already is left as it is. Raises UserError for too few or
        too many rows, rows that are not finite, or another living writer of the same shard."""
        with self.open_shard(shard, tokens) as writing:
            for rows in batches:
                writing.append(rows)
            return writing.commit()

    def open_shard(self, shard: int, tokens: TokenTable) -> ShardWriter:
        """The same in steps, for a caller that pushes: `append` …, `commit`. A context manager."""
        return ShardWriter(self, shard, tokens)

    def finish(
        self, documents: Sequence[DocumentRow] = (), *, validation_start: int | None = None
    ) -> None:
        """Write the document table, the final metadata and the completion record, and remove what
        killed writers left. Refused while shards are missing, or while another process is at it."""
        if missing := self.missing_shards():
            raise UserError(
                "shards are missing", where=self.place.url, found=", ".join(map(str, missing[:20]))
            )
        if validation_start is not None:
            self.layout = replace(self.layout, validation_start=validation_start)
        with explained_writes(self.place.url), self.place.claimed("locks/finish") as held:
            if not held:
                raise UserError(
                    "another process is finishing this store",
                    where=self.place.url,
                    fix="wait for it",
                )
            self.place.remove(COMPLETE)
            self.place.sweep_all()
            self._write_metadata()
            content = _documents_parquet(documents)
            write_bytes(self.place, DOCUMENTS, content)
            write_bytes(self.place, COMPLETE, self._completion(content).to_json())
        self._remove_locks()

    def extend_to(self, n_rows: int) -> None:
        """Let a store over a stream grow. Only the process that writes all of it may call this."""
        self.layout = replace(self.layout, n_rows=n_rows)

    def is_done(self, shard: int) -> bool:
        """Whether the shard has a record and files of the recorded sizes."""
        record = self._record_or_none(shard)
        if record is None:
            return False
        sizes = {name: size for name in record.files if (size := self.place.size(name)) is not None}
        return not any(iter_problems_of_record(record, self.layout, sizes))

    def _is_sound(self, shard: int, sizes: Mapping[str, int]) -> bool:
        record = self._record_or_none(shard)
        return record is not None and not any(iter_problems_of_record(record, self.layout, sizes))

    def _record_or_none(self, shard: int) -> ShardRecord | None:
        with suppress(UserError):
            return read_record(self.place, shard)
        return None

    def _completion(self, documents: bytes) -> Completion:
        return Completion(
            identity=self.layout.identity,
            n_rows=self.layout.n_rows or 0,
            validation_start=self.layout.validation_start,
            records={
                shard: xxhash.xxh3_128_hexdigest(self.place.read(record_name(shard)))
                for shard in range(self.layout.n_shards)
            },
            documents=sum_of(documents),
        )

    def _write_metadata(self) -> None:
        with explained_writes(self.place.url):
            for name, text in self.layout.iter_metadata():
                write_bytes(self.place, name, text.encode())

    def _remove_locks(self) -> None:
        for name in self.place.sizes("locks"):
            self.place.remove(name)
        if isinstance(self.place, LocalPlace):
            with suppress(OSError):
                (self.place.root / "locks").rmdir()


class ShardWriter:
    """One shard being written. Leaving the context without `commit` leaves nothing behind."""

    def __init__(self, store: StoreWriter, shard: int, tokens: TokenTable) -> None:
        self._store = store
        self._shard = shard
        self._tokens = tokens
        self._claim = store.place.claimed(f"locks/{shard:06d}")
        self._chunks: ShardChunks | None = None

    def __enter__(self) -> ShardWriter:
        with explained_writes(self._store.place.url):
            held = self._claim.__enter__()
        if not held:
            self._claim.__exit__(None, None, None)
            raise UserError(
                "another process is writing this shard",
                where=f"{self._store.place.url} (shard {self._shard})",
                fix="wait for it, or stop it; a process that died holds nothing",
            )
        if not self._store.is_done(self._shard):
            with explained_writes(self._store.place.url):
                self._begin()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._chunks is not None:
            self._chunks.abandon()
        self._claim.__exit__(None, None, None)

    def append(self, rows: Rows) -> None:
        """Add the next rows, the same ones for every site; any number of them."""
        if self._chunks is not None:
            with explained_writes(self._store.place.url):
                self._chunks.append(rows)

    def commit(self) -> ShardRecord:
        """Complete every file, then write the record."""
        place = self._store.place
        if self._chunks is None:
            record = read_record(place, self._shard)
            if record is not None:
                return record
            raise UserError("the shard was never begun", where=f"{place.url} (shard {self._shard})")
        with explained_writes(place.url):
            return self._commit(self._chunks)

    def _commit(self, chunks: ShardChunks) -> ShardRecord:
        place, layout = self._store.place, self._store.layout
        files, statistics = chunks.finish()
        start = self._shard * layout.shard_rows
        for column in TOKEN_COLUMNS:
            values = statistics.flags if column == "flags" else getattr(self._tokens, column)
            array = layout.token_array(column)
            files[array.file_of(self._shard)] = write_chunk_file(place, array, self._shard, values)
        record = _record_of(
            layout, self._shard, start, start + len(self._tokens), files, statistics
        )
        self._publish(record)
        return record

    def _begin(self) -> None:
        place, layout = self._store.place, self._store.layout
        place.remove(COMPLETE)
        place.remove(record_name(self._shard))
        place.sweep([array.file_of(self._shard) for array in layout.iter_arrays()])
        self._chunks = ShardChunks(
            place, layout, self._shard, self._tokens, self._store.allow_non_finite
        )

    def _publish(self, record: ShardRecord) -> None:
        place, content = self._store.place, record.to_json()
        if (
            not place.create(record_name(self._shard), content)
            and place.read(record_name(self._shard)) != content
        ):
            raise UserError(
                "two writers wrote different activations into one shard",
                where=f"{place.url}/{record_name(self._shard)}",
                fix=("stop one of them", MEND_DAMAGE),
            )


def _record_of(
    layout: StoreLayout,
    shard: int,
    start: int,
    stop: int,
    files: Mapping[str, FileSum],
    statistics: ChunkStatistics,
) -> ShardRecord:
    return ShardRecord(
        identity=layout.identity,
        shard=shard,
        start=start,
        stop=stop,
        n_kept=statistics.n_kept,
        files=files,
        n_non_finite=statistics.n_non_finite,
        histograms={name: counts.tolist() for name, counts in statistics.histograms.items()},
        variance_lost=dict(statistics.variance_lost) if layout.dtype == "int8" else {},
    )


def _documents_parquet(documents: Sequence[DocumentRow]) -> bytes:
    names = ["source", "title", "label"] + ["image"] * any(each.image for each in documents)
    columns = {name: [getattr(each, name) for each in documents] for name in names}
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def write_activations(
    url: str | Path,
    batches: Iterable[tuple[Rows, TokenTable | None]],
    *,
    layout: StoreLayout,
    documents: Sequence[DocumentRow] = (),
    validation_fraction: float | None = None,
    allow_non_finite: bool = False,
) -> None:
    """Store activations of any model: batches of rows at named sites, each with a token table or
    None.

    Without a table a row is its own document-less token: id 0, document 0, position 0, no flags.
    `layout.n_rows` may be None. `validation_fraction` sets the last documents apart; None: as the
    layout says. Memory: one shard of every site."""
    writer = StoreWriter.create(url, layout, allow_non_finite=allow_non_finite)
    shard_rows = writer.layout.shard_rows
    n_rows, of_rows = 0, []
    for shard, (tokens, parts) in enumerate(_iter_shards(batches, shard_rows)):
        n_rows += len(tokens)
        of_rows.append(tokens.document)
        writer.extend_to(n_rows)
        writer.write_shard(shard, tokens, parts)
    if n_rows == 0:
        raise UserError("there are no activations to store", where=writer.place.url)
    writer.finish(documents, validation_start=_start_of_last(of_rows, validation_fraction))


def _start_of_last(of_rows: Sequence[np.ndarray], fraction: float | None) -> int | None:
    """The first row of the last `fraction` of the documents, which are in order."""
    if fraction is None:
        return None
    document = np.concatenate(of_rows)
    n = int(document[-1]) + 1
    return int(np.searchsorted(document, n - round(fraction * n)))


def _iter_shards(
    batches: Iterable[tuple[Rows, TokenTable | None]], shard_rows: int
) -> Iterator[tuple[TokenTable, list[Rows]]]:
    parts: list[Rows] = []
    tables: list[TokenTable] = []
    n = 0
    for rows, table in batches:
        length = len(next(iter(rows.values())))
        table = table if table is not None else _anonymous(length)
        taken = 0
        while taken < length:
            step = min(length - taken, shard_rows - n)
            parts.append({name: each[taken : taken + step] for name, each in rows.items()})
            tables.append(table.part(taken, taken + step))
            taken, n = taken + step, n + step
            if n == shard_rows:
                yield _joined(tables), parts
                parts, tables, n = [], [], 0
    if n:
        yield _joined(tables), parts


def _anonymous(n: int) -> TokenTable:
    zeros = np.zeros(n, dtype=np.uint32)
    return TokenTable(id=zeros, document=zeros, position=zeros, flags=np.zeros(n, dtype=np.uint8))


def _joined(tables: Sequence[TokenTable]) -> TokenTable:
    return TokenTable(
        id=np.concatenate([each.id for each in tables]),
        document=np.concatenate([each.document for each in tables]),
        position=np.concatenate([each.position for each in tables]),
        flags=np.concatenate([each.flags for each in tables]),
    )
