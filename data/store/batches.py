"""Shuffled batches for training: a store and a seed in, batches of the same rows at several sites
out.

Two threads read the next window of random blocks (`data.store.windows`) while
two others gather batches from the present one: rows are gathered as stored, 16 bits each, then
widened to float32, or sent to a GPU as they are and widened there. Memory: two windows of every
site. `state()` and `restore()` continue at exactly the next batch.
"""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from data.store.layout import SiteLayout, canonical_json
from data.store.staging import StagingBuffers, keep_to_one_thread
from data.store.windows import READERS, EpochPlan, ShuffleChoices, StoredRows, Windows
from data.tokens import RowFilters
from featureflow.errors import Problem, UserError

if TYPE_CHECKING:
    from featureflow.sites import Site

Batch = dict[Any, Float[Tensor, "batch d_model"]]
_WINDOW_ROWS = 65_536
_MEMORY_BYTES = 1 << 30
_GATHERERS = 2


class BatchReader:
    """An iterator over batches. Use it as a context manager, or `close` it, to stop its threads
    early."""

    def __init__(
        self,
        store: StoredRows,
        sites: Sequence[Site | str],
        *,
        batch_size: int,
        seed: int,
        split: Any = "train",
        filters: RowFilters | None = None,
        n_epochs: int | None = None,
        window_rows: int | None = None,
        rank: int = 0,
        world: int = 1,
        device: str = "cpu",
        prefetch: int = 2,
        reuse_buffers: bool = False,
    ) -> None:
        """`n_epochs` None goes on for ever. `window_rows` is rounded to blocks; by default 65,536,
        or what fits in 1 GiB for two windows of all sites. With `reuse_buffers` a batch is
        overwritten `prefetch` + 2 batches later."""
        self.store = store
        self.sites = tuple(sites)
        self.layouts = [store.site_layout(site) for site in sites]
        self._filters = filters or RowFilters()
        self._split = split
        self.n_epochs = n_epochs
        self._device = torch.device(device)
        self._prefetch = prefetch
        self._reuse_buffers = reuse_buffers
        blocks = max(1, (window_rows or _default_window(store, self.layouts)) // store.chunk_rows)
        self.choices = ShuffleChoices(
            seed=seed,
            batch_size=batch_size,
            window_blocks=blocks,
            block_rows=store.chunk_rows,
            rank=rank,
            world=world,
        )
        self._rows = store.kept_rows(split, self._filters, sites=sites)
        self._position = (0, 0)
        self._pipeline: _Pipeline | None = None
        self._refuse_bad_choices()

    @property
    def n_rows(self) -> int:
        """Rows that the split and the filters leave, over all ranks."""
        return len(self._rows)

    @property
    def n_batches(self) -> int:
        """Batches of the present epoch for each rank."""
        return self.plan(self._position[0]).n_batches

    def plan(self, epoch: int) -> EpochPlan:
        """The order of an epoch."""
        return EpochPlan(self._rows, self.choices, epoch)

    def rows_of(self, epoch: int, batch: int) -> Int64[np.ndarray, "row"]:
        """Which rows of the store a batch holds."""
        return self.plan(epoch).rows_of(batch)

    def state(self) -> dict[str, Any]:
        """Where the next batch is, as JSON values; `restore` continues there."""
        return {**self._identity, "epoch": self._position[0], "batch": self._position[1]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue at a state. Raises UserError if it was taken with another store or other
        choices."""
        problems = [
            Problem(
                what="the state was taken with another choice",
                where=key,
                expected=str(value),
                found=str(state.get(key)),
            )
            for key, value in self._identity.items()
            if state.get(key) != value
        ]
        if problems:
            raise UserError("the reader cannot continue from this state", problems=tuple(problems))
        self.close()
        self._position = (int(state["epoch"]), int(state["batch"]))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._pipeline is None:
            self._pipeline = _Pipeline(self, self._position)
        item = self._pipeline.next()
        if item is None:
            self.close()
            raise StopIteration
        self._position, batch = item
        return batch

    def __enter__(self) -> BatchReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_pipeline", None) is not None:
            self.close()

    def close(self) -> None:
        """Stop the threads. Iterating again goes on at the next batch."""
        if self._pipeline is not None:
            self._pipeline.stop()
            self._pipeline = None

    @cached_property
    def _identity(self) -> dict[str, Any]:
        return {
            "store": self.store.layout.identity,
            "split": self._split,
            "filters": canonical_json(self._filters.model_dump()),
            **dataclasses.asdict(self.choices),
        }

    def _refuse_bad_choices(self) -> None:
        choices, problems = self.choices, []
        if choices.batch_size < 1:
            problems.append(
                Problem(
                    what="impossible batch size",
                    found=str(choices.batch_size),
                    expected="at least 1",
                )
            )
        if not 0 <= choices.rank < choices.world:
            problems.append(
                Problem(what="impossible rank", found=f"{choices.rank} of {choices.world}")
            )
        if self._split not in ("train", "validation"):
            problems.append(
                Problem(what="unknown split", found=str(self._split), expected="train, validation")
            )
        if not problems and self.plan(0).n_batches == 0:
            what = f"the {self._split} split has too few rows for one batch"
            problems.append(
                Problem(
                    what=what,
                    where=self.store.url,
                    found=f"{len(self._rows)} rows for {choices.world} ranks",
                    expected=f"at least {choices.batch_size} a rank",
                )
            )
        if problems:
            raise UserError("these batches cannot be read", problems=tuple(problems))


class _Pipeline:
    """A thread that hands out the work, those that read ahead, and those that gather batches."""

    def __init__(self, reader: BatchReader, position: tuple[int, int]) -> None:
        self._reader = reader
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=reader._prefetch)
        self._stopped = threading.Event()
        ring = reader._prefetch + 2 if reader._reuse_buffers or reader._device.type == "cuda" else 0
        self._buffers = StagingBuffers(
            reader.layouts,
            reader.store.layout.dtype,
            reader.choices.batch_size,
            reader._device,
            ring,
        )
        self._ended = False
        self._thread = threading.Thread(
            target=self._run, args=(position,), name="store-batches", daemon=True
        )
        self._thread.start()

    def next(self) -> tuple[tuple[int, int], Batch] | None:
        """The next batch and the position after it; None at the end. Errors of the threads are
        raised here."""
        if self._ended:
            return None
        item = self._queue.get()
        if item is None or isinstance(item, BaseException):
            self._ended = True
        if isinstance(item, BaseException):
            raise item
        if item is None:
            return None
        after, staged, parts = item
        for part in parts:
            part.result()
        return after, dict(zip(self._reader.sites, self._buffers.delivered(staged), strict=True))

    def stop(self) -> None:
        self._stopped.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)

    def _run(self, position: tuple[int, int]) -> None:
        try:
            with (
                ThreadPoolExecutor(READERS, thread_name_prefix="store-reader") as readers,
                ThreadPoolExecutor(_GATHERERS, "store-gather", keep_to_one_thread) as gatherers,
            ):
                try:
                    self._produce(position, readers, gatherers)
                finally:
                    readers.shutdown(
                        wait=False, cancel_futures=True
                    )  # a window nobody will ask for
            self._put(None)
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def _produce(
        self, position: tuple[int, int], readers: ThreadPoolExecutor, gatherers: ThreadPoolExecutor
    ) -> None:
        epoch, first = position
        windows = Windows(self._reader, readers)
        while self._reader.n_epochs is None or epoch < self._reader.n_epochs:
            plan = windows.begin(epoch)
            for batch in range(first, plan.n_batches):
                staged, parts, n = self._buffers.begin(), [], 0
                for index, start, stop in plan.spans_of(batch):
                    window = windows.at(index)
                    slots = window.slots()[start:stop]
                    parts.append(
                        gatherers.submit(self._buffers.gather, staged, window.rows, slots, at=n)
                    )
                    window.gathering.append(parts[-1])
                    n += len(slots)
                after = (epoch, batch + 1) if batch + 1 < plan.n_batches else (epoch + 1, 0)
                if not self._put((after, staged, parts)):
                    return
            epoch, first = epoch + 1, 0

    def _put(self, item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


def _default_window(store: StoredRows, sites: Sequence[SiteLayout]) -> int:
    """65,536 rows, or what two windows of all sites may take of the memory allowed."""
    item = {"bfloat16": 2, "float16": 2}.get(store.layout.dtype, 4)
    fits = _MEMORY_BYTES // (2 * item * sum(site.width for site in sites))
    return min(_WINDOW_ROWS, fits)
