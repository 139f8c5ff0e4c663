"""Putting batches together: rows as stored are gathered, then widened to float32 here or on the GPU.

On a CPU a batch is a fresh tensor, or one of a ring that is overwritten. For a GPU the gathered 16-bit rows lie in a
ring of pinned buffers; the copy to the device is asynchronous, and a buffer is filled again only when it is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from data.store.layout import SiteLayout

_GPU_RING = 4


@dataclass(kw_only=True)
class Staged:
    """One batch in the making: `rows` are gathered rows, `values` the float32 batches (CPU only)."""

    rows: list[np.ndarray]
    values: list[Tensor] = field(default_factory=list)
    pinned: list[Tensor] = field(default_factory=list)
    n: int = 0
    copied: torch.cuda.Event | None = None


class StagingBuffers:
    """Buffers of one pipeline. `begin`, `gather` …, `complete` run in its thread, `delivered` in the consumer's."""

    def __init__(
        self, sites: Sequence[SiteLayout], dtype: str, batch_size: int, device: torch.device, ring: int
    ) -> None:
        self._widths = [site.width for site in sites]
        self._is_bfloat16 = dtype == "bfloat16"
        self._torch_dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(dtype, torch.float32)
        self._batch_size = batch_size
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._stage = [] if self._on_gpu else [self._plain(width) for width in self._widths]
        n_ring = max(ring, _GPU_RING) if self._on_gpu else ring
        self._ring = [self._fresh() for _ in range(n_ring)]
        self._turn = 0

    def begin(self) -> Staged:
        """An empty batch; waits until a reused buffer has left for the GPU."""
        if not self._ring:
            return self._fresh()
        staged = self._ring[self._turn % len(self._ring)]
        self._turn += 1
        if staged.copied is not None:
            staged.copied.synchronize()
        staged.n = 0
        return staged

    def gather(self, staged: Staged, windows: Sequence[np.ndarray], slots: np.ndarray) -> None:
        """Add the rows at `slots` of each site's window."""
        part = slice(staged.n, staged.n + len(slots))
        for window, rows in zip(windows, staged.rows, strict=True):
            np.take(window, slots, axis=0, out=rows[part], mode="clip")  # mode="clip": no second buffer inside numpy
        staged.n += len(slots)

    def complete(self, staged: Staged) -> None:
        """Widen on the CPU; on a GPU this is left to `delivered`."""
        for rows, values in zip(staged.rows, staged.values, strict=False):
            self._widen(rows, values.numpy())

    def delivered(self, staged: Staged) -> list[Tensor]:
        if not self._on_gpu:
            return staged.values
        moved = [each.to(self._device, non_blocking=True).to(torch.float32) for each in staged.pinned]
        staged.copied = torch.cuda.Event()
        staged.copied.record()
        return moved

    def _fresh(self) -> Staged:
        if self._on_gpu:
            shapes = [(self._batch_size, width) for width in self._widths]
            pinned = [torch.empty(shape, dtype=self._torch_dtype, pin_memory=True) for shape in shapes]
            rows = [each.view(torch.uint16).numpy() if self._is_bfloat16 else each.numpy() for each in pinned]
            return Staged(rows=rows, pinned=pinned)
        values = [torch.empty((self._batch_size, width), dtype=torch.float32) for width in self._widths]
        return Staged(rows=self._stage, values=values)

    def _plain(self, width: int) -> np.ndarray:
        dtype = np.uint16 if self._is_bfloat16 else torch.empty(0, dtype=self._torch_dtype).numpy().dtype
        return np.empty((self._batch_size, width), dtype=dtype)

    def _widen(self, rows: np.ndarray, values: np.ndarray) -> None:
        if self._is_bfloat16:
            np.left_shift(rows, 16, out=values.view(np.uint32), dtype=np.uint32)
        else:
            values[...] = rows
