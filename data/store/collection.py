"""Running a model over packed tokens: tokens in, shards of activations out.

The model runs in the calling thread; a second thread encodes, checks, counts and writes what the
model has made, so the disk costs no model time while it keeps up. At most `_AHEAD` batches wait. A
batch never crosses a shard, so that a resumed run computes exactly the batches an uninterrupted one
would, and ends with the same bytes.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from data.store.writer import Rows, StoreWriter
from data.tokens import TokenTable
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
