"""The order of an epoch: kept rows and a seed in, windows of random blocks and batches of rows out.
Arithmetic only.

1. A block is one inner chunk of the store. The blocks that hold kept rows are permuted; rank r of W
   takes every W-th.
2. `window_blocks` blocks in a row make a window, which is what is in memory; its kept rows are
   permuted.
3. The rows of all windows make one sequence; batch i is the i-th stretch of it, so a batch may span
   two windows. The last, incomplete batch is left out, and every rank has the same number of
   batches.

Random blocks in a window of 16–64 thousand rows train dictionaries as well as a full shuffle (FVU
within 2 %, measured on synthetic activations with 256-token documents), while reading only what a
disk reads fast.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True, kw_only=True)
class ShuffleChoices:
    """What fixes the order of the rows."""

    seed: int
    batch_size: int
    window_blocks: int
    block_rows: int
    rank: int = 0
    world: int = 1


class EpochPlan:
    """One epoch of one rank over `rows` (ascending row numbers)."""

    def __init__(self, rows: Int64[np.ndarray, "row"], choices: ShuffleChoices, epoch: int) -> None:
        self.choices = choices
        self.epoch = epoch
        self._rows = rows
        block_of_row = rows // choices.block_rows
        starts = np.flatnonzero(
            np.diff(block_of_row, prepend=-1)
        )  # rows ascend, so nothing needs sorting
        blocks, bounds = block_of_row[starts], np.append(starts, len(rows))
        order = np.random.default_rng([choices.seed, epoch]).permutation(len(blocks))
        sizes = np.diff(bounds)
        self.n_batches = min(
            int(sizes[order[rank :: choices.world]].sum()) // choices.batch_size
            for rank in range(choices.world)
        )
        mine = order[choices.rank :: choices.world]
        self._blocks, self._begin, self._end = blocks[mine], bounds[:-1][mine], bounds[1:][mine]
        window_of_block = np.arange(len(mine)) // choices.window_blocks
        per_window = np.bincount(window_of_block, weights=sizes[mine]).astype(np.int64)
        self._window_bounds = np.concatenate([[0], np.cumsum(per_window)])

    @property
    def n_windows(self) -> int:
        return len(self._window_bounds) - 1

    @property
    def last_window(self) -> int:
        """The window with the end of the last batch; what lies behind it is left out of this
        epoch."""
        return self.spans_of(self.n_batches - 1)[-1][0]

    def blocks_of(self, window: int) -> Int64[np.ndarray, "block"]:
        """The blocks of a window, in the order in which they lie in its buffer."""
        return self._blocks[self._part(window)]

    def slots_of(self, window: int) -> Int64[np.ndarray, "row"]:
        """Where the rows of a window lie in its buffer, in the order in which batches take them."""
        block_rows = self.choices.block_rows
        part = self._part(window)
        slots = [
            self._rows[begin:end] - block * block_rows + k * block_rows
            for k, (block, begin, end) in enumerate(
                zip(self._blocks[part], self._begin[part], self._end[part], strict=True)
            )
        ]
        together = np.concatenate(slots)
        seed = [self.choices.seed, self.epoch, self.choices.rank, window]
        return together[np.random.default_rng(seed).permutation(len(together))]

    def spans_of(self, batch: int) -> list[tuple[int, int, int]]:
        """The stretches of a batch as (window, from, to), in the window's own order."""
        start, stop = batch * self.choices.batch_size, (batch + 1) * self.choices.batch_size
        window = int(np.searchsorted(self._window_bounds, start, side="right")) - 1
        spans = []
        while start < stop:
            begin, end = int(self._window_bounds[window]), int(self._window_bounds[window + 1])
            step = min(stop, end) - start
            if step:
                spans.append((window, start - begin, start - begin + step))
            start += step
            window += 1
        return spans

    def rows_of(self, batch: int) -> Int64[np.ndarray, "row"]:
        """The row numbers of a batch. For tests and for looking up tokens; batches are not read
        this way."""
        block_rows = self.choices.block_rows
        parts = []
        for window, start, stop in self.spans_of(batch):
            slots = self.slots_of(window)[start:stop]
            parts.append(
                self.blocks_of(window)[slots // block_rows] * block_rows + slots % block_rows
            )
        return np.concatenate(parts)

    def _part(self, window: int) -> slice:
        return slice(window * self.choices.window_blocks, (window + 1) * self.choices.window_blocks)
