"""Windows of random blocks in memory: a plan in, the present window out, while the one after it is
read.

Two windows take turns. When one becomes the present one, the other is read anew, by several threads
and as soon as the last batches gathered from it are done; at the end of an epoch that is the first
window of the next. A reader that waits there instead spends a third of its time waiting, at four
windows an epoch (docs/log.md, 2026-11-23).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from data.store.layout import STORED_AS
from data.store.plans import EpochPlan

if TYPE_CHECKING:
    from data.store.batches import BatchReader

READERS = 2


class Windows:
    """The present window, and the one after it being read: at the end of an epoch, the first of the
    next."""

    def __init__(self, reader: BatchReader, readers: ThreadPoolExecutor) -> None:
        self._reader, self._readers = reader, readers
        self._present, self._next = Window(reader), Window(reader)
        self._plans: dict[int, Future[EpochPlan]] = {}

    def begin(self, epoch: int) -> EpochPlan:
        """The plan of an epoch; the one after it is drawn up meanwhile, which takes seconds for
        very many rows."""
        kept = {each: plan for each, plan in self._plans.items() if each >= epoch}
        n_epochs = self._reader.n_epochs
        wanted = [epoch, epoch + 1] if n_epochs is None or epoch + 1 < n_epochs else [epoch]
        self._plans = {
            each: kept.get(each) or self._readers.submit(self._reader.plan, each) for each in wanted
        }
        self._plan = self._plans[epoch].result()
        return self._plan

    def at(self, index: int) -> Window:
        """A window of the present epoch; the memory of the one before is read into from then on."""
        if self._present.holds != (self._plan.epoch, index):
            if self._next.holds != (self._plan.epoch, index):
                self._next.load(self._plan, index, self._readers)
            self._present, self._next = self._next, self._present
            following = self._plan.epoch + 1
            if index < self._plan.last_window:
                self._next.load(self._plan, index + 1, self._readers)
            elif following in self._plans:
                self._next.load(self._plans[following].result(), 0, self._readers)
        return self._present


class Window:
    """The rows of one window in memory, as stored (int8 as float32), for every site."""

    def __init__(self, reader: BatchReader) -> None:
        n_rows = reader.choices.window_blocks * reader.choices.block_rows
        self.holds = (-1, -1)
        self.gathering: list[Future[None]] = []
        self._reader = reader
        self._is_int8 = reader.store.layout.dtype == "int8"
        dtype = "float32" if self._is_int8 else STORED_AS[reader.store.layout.dtype]
        self.rows = [np.zeros((n_rows, site.width), dtype=dtype) for site in reader.layouts]

    def load(self, plan: EpochPlan, index: int, readers: ThreadPoolExecutor) -> None:
        """Have a window read, each thread its share of the blocks, when all batches from this
        memory are gathered."""
        self.holds, before, self.gathering = (plan.epoch, index), self.gathering, []
        blocks = plan.blocks_of(index)
        shares = np.array_split(np.argsort(blocks, kind="stable"), READERS)
        self._slots = readers.submit(plan.slots_of, index)
        self._loading = [readers.submit(self._read, blocks, share, before) for share in shares]

    def slots(self) -> Int64[np.ndarray, "row"]:
        """Where the rows lie, in the order of the batches; waits until they are there."""
        for share in self._loading:
            share.result()
        return self._slots.result()

    def _read(self, blocks: np.ndarray, share: np.ndarray, before: Sequence[Future[None]]) -> None:
        for each in before:
            each.result()
        store, size = self._reader.store, self._reader.choices.block_rows
        for site, buffer in zip(self._reader.layouts, self.rows, strict=True):
            for k in share:
                part = buffer[k * size : (k + 1) * size]
                if self._is_int8:
                    stored = np.empty(part.shape, dtype=np.int8)
                    store.read_stored(site, int(blocks[k]), stored)
                    part[:] = store.decoded(site, stored, int(blocks[k]) * size)
                else:
                    store.read_stored(site, int(blocks[k]), part)
