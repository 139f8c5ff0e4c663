"""Running a model over packed tokens: tokens in, shards of activations out.

The model runs in the calling thread; a second thread encodes, checks, counts and writes what the
model has made, so the disk costs no model time while it keeps up. At most `_AHEAD` batches wait. A
batch never crosses a shard, so that a resumed run computes exactly the batches an uninterrupted one
would, and ends with the same bytes.

Collection on a Dask cluster: one task runs the model over one shard's tokens and writes that
shard for all sites.

A worker loads the model once and keeps it. The task carries the token columns (about 13 bytes a
row) and brings back a line; activations go from the model straight to the store, which every worker
must reach under the same path or URL.

Taking over from an earlier store what is sound in it, so that fixing one shard costs one
shard.
"""

from __future__ import annotations

import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.model.language_model import LanguageModel
from data.model.spec import ModelSpec
from data.store.checks import problems_of_shard
from data.store.cluster import Machines, connected, map_shards, threads_of_worker
from data.store.layout import parse_layout, record_name
from data.store.places import LocalPlace
from data.store.shards import ShardRecord, iter_problems_of_record, read_record
from data.store.writer import Rows, StoreWriter
from data.tokens import TokenTable
from featureflow.errors import UserError
from featureflow.sites import Site

_AHEAD = 2
RowsDone = Callable[[int], None]


class ActivationSource(Protocol):
    """What collection needs of a model; `data.model.language_model.LanguageModel` is one."""

    def activations(
        self, ids: Int[Tensor, "batch position"], sites: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "batch position d_model"]]: ...


@dataclass(frozen=True, kw_only=True)
class CollectedShard:
    """What a task tells its caller; the activations never travel."""

    shard: int
    n_rows: int
    seconds: float


def collect_shards(
    model: ActivationSource,
    writer: StoreWriter,
    shards: Sequence[tuple[int, TokenTable]],
    sites: Sequence[Site],
    *,
    batch_rows: int,
    rows_done: RowsDone,
    shard_done: Callable[[CollectedShard], None] = lambda shard: None,
) -> None:
    """Collect shards one after the other, each from its own tokens. Raises what the model or the
    writer raises."""
    with _WriterThread(writer, shard_done) as thread:
        for shard, tokens in shards:
            thread.begin(shard, tokens)
            for rows in _iter_activations(
                model, tokens, sites, writer.layout.n_context, batch_rows
            ):
                thread.put(rows)
                rows_done(len(next(iter(rows.values()))))
            thread.end()


def _iter_activations(
    model: ActivationSource,
    tokens: TokenTable,
    sites: Sequence[Site],
    n_context: int,
    batch_rows: int,
) -> Iterator[dict[str, Tensor]]:
    ids = torch.from_numpy(tokens.id.astype("int64")).reshape(-1, n_context)
    n_batch = max(1, batch_rows // n_context)
    for start in range(0, len(ids), n_batch):
        seen = model.activations(ids[start : start + n_batch], sites)
        yield {site.name: seen[site].flatten(0, 1) for site in sites}


class _Stopped(Exception):
    """The model's side failed: the writer drops the shard it is at."""


class _WriterThread:
    """Writes shards from a short queue. An error in the thread is raised at the next `put`, or at
    the end."""

    def __init__(self, writer: StoreWriter, shard_done: Callable[[CollectedShard], None]) -> None:
        self._writer = writer
        self._shard_done = shard_done
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=_AHEAD)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="store-writer", daemon=True)

    def __enter__(self) -> _WriterThread:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._put(_Stopped if kind is not None else None)
        self._thread.join()
        if kind is None and self._error is not None:
            raise self._error

    def begin(self, shard: int, tokens: TokenTable) -> None:
        self.put((shard, tokens))

    def end(self) -> None:
        self.put(None)

    def put(self, item: Any) -> None:
        if not self._put(item) and self._error is not None:
            raise self._error

    def _put(self, item: Any) -> bool:
        while self._thread.is_alive() and self._error is None:
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None and item is not _Stopped:
                shard, tokens = item
                started = time.monotonic()
                record = self._writer.write_shard(shard, tokens, self._iter_rows())
                seconds = time.monotonic() - started
                self._shard_done(
                    CollectedShard(shard=shard, n_rows=record.stop - record.start, seconds=seconds)
                )
        except _Stopped:
            return
        except BaseException as error:  # handed to the model's thread, which raises it
            self._error = error

    def _iter_rows(self) -> Iterator[Rows]:
        while (item := self._queue.get()) is not None:
            if item is _Stopped:
                raise _Stopped
            yield item


_ONE_SHARD = threading.Lock()
"""A worker has one model, whose hooks serve one shard at a time, whatever its --nthreads."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """What a worker needs to load the model, and to see that it is the same one."""

    spec: ModelSpec
    dtype: str
    device: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to collect."""

    url: str
    shard: int
    tokens: TokenTable
    model: ModelChoice
    sites: tuple[Site, ...]
    batch_rows: int
    n_threads: int | None
    allow_non_finite: bool


def collect_on_cluster(
    writer: StoreWriter,
    shards: Sequence[tuple[int, TokenTable]],
    *,
    model: ModelChoice,
    sites: Sequence[Site],
    batch_rows: int,
    machines: Machines,
) -> Iterator[CollectedShard]:
    """Collect shards on the workers; yields each as it is finished. Raises UserError."""
    tasks = [
        ShardTask(
            url=writer.place.url,
            shard=shard,
            tokens=TokenTable(
                id=table.id, document=table.document, position=table.position, flags=table.flags
            ),
            model=model,
            sites=tuple(sites),
            batch_rows=batch_rows,
            n_threads=threads_of_worker(machines),
            allow_non_finite=writer.allow_non_finite,
        )
        for shard, table in shards
    ]
    with connected(machines) as client:
        yield from map_shards(collect_task, tasks, machines, client=client)


def collect_task(task: ShardTask) -> CollectedShard:
    """Runs on a worker."""
    with _ONE_SHARD:
        return _collect(task)


def _collect(task: ShardTask) -> CollectedShard:
    if task.n_threads is not None:
        torch.set_num_threads(task.n_threads)
    model = _loaded(task.model)
    if model.fingerprint != task.model.fingerprint:
        raise UserError(
            "a worker has another model under this name",
            expected=task.model.fingerprint[:16],
            found=model.fingerprint[:16],
            fix="give every worker the same files and versions",
        )
    done: list[CollectedShard] = []
    writer = StoreWriter.attach(task.url, allow_non_finite=task.allow_non_finite)
    collect_shards(
        model,
        writer,
        [(task.shard, task.tokens)],
        task.sites,
        batch_rows=task.batch_rows,
        rows_done=lambda n: None,
        shard_done=done.append,
    )
    return done[0]


@lru_cache(maxsize=1)
def _loaded(choice: ModelChoice) -> LanguageModel:
    return LanguageModel.open(choice.spec, dtype=choice.dtype, device=choice.device)


def adopt_shards(writer: StoreWriter, earlier: Path) -> list[int]:
    """Link the shards that `earlier`, a store of the same run, has whole into the store being
    written; every byte is compared with its record first. Both must be folders. Returns the shards;
    an unusable store gives none."""
    place = writer.place
    if not isinstance(place, LocalPlace) or not (earlier / "zarr.json").is_file():
        return []
    source = LocalPlace(earlier)
    adopted = []
    for shard in writer.missing_shards():
        record = _sound_record(source, writer, shard)
        if record is not None:
            _link_shard(source, place, record)
            adopted.append(shard)
    return adopted


def _sound_record(source: LocalPlace, writer: StoreWriter, shard: int) -> ShardRecord | None:
    try:
        layout = parse_layout(source.read("zarr.json"), where=source.url)
        record = read_record(source, shard)
    except UserError:
        return None
    if (
        record is None
        or layout.identity != writer.layout.identity
        or layout.n_rows != writer.layout.n_rows
    ):
        return None
    sizes = {name: size for name in record.files if (size := source.size(name)) is not None}
    if any(iter_problems_of_record(record, writer.layout, sizes)):
        return None
    return None if problems_of_shard(source.url, layout, record) else record


def _link_shard(source: LocalPlace, place: LocalPlace, record: ShardRecord) -> None:
    """Files are never changed in place, only replaced, so two stores may share them."""
    for name in record.files:
        temporary = place.temporary(name)
        try:
            os.link(source.root / name, temporary)
        except OSError:
            shutil.copyfile(source.root / name, temporary)
        place.publish(temporary, name)
    place.remove(record_name(record.shard))
    place.create(record_name(record.shard), record.to_json())
