"""Putting batches together: rows as stored are gathered, then widened to float32 here or on the
GPU.

On a CPU a batch is a fresh tensor, or one of a ring that is overwritten. For a GPU the gathered
16-bit rows lie in a ring of pinned buffers; the copy to the device is asynchronous, and a buffer is
filled again only when it is done.

Measured, 576 numbers a row on two cores: widening by torch costs a fifth of numpy's cast for
float16 and two thirds for bfloat16, but only while torch keeps to the calling thread
(`keep_to_one_thread`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from data.store.layout import SiteLayout

_GPU_RING = 4
_PIECE_NUMBERS = 1 << 20  # gathered, then widened while they are in the cache


@dataclass(kw_only=True)
class Staged:
    """One batch in the making: `values` are float32 batches for a CPU, `pinned` rows on their way
    to a GPU."""

    values: list[Tensor] = field(default_factory=list)
    pinned: list[Tensor] = field(default_factory=list)
    copied: torch.cuda.Event | None = None


class StagingBuffers:
    """Buffers of one pipeline. `begin` runs in its thread, `gather` in several at a time for
    different rows, `delivered` in the consumer's."""

    def __init__(
        self,
        sites: Sequence[SiteLayout],
        dtype: str,
        batch_size: int,
        device: torch.device,
        ring: int,
    ) -> None:
        self._widths = [site.width for site in sites]
        self._is_bfloat16 = dtype == "bfloat16"
        self._torch_dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(
            dtype, torch.float32
        )
        self._batch_size = batch_size
        self._device = device
        self._on_gpu = device.type == "cuda"
        self._local = threading.local()
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
        return staged

    def gather(
        self, staged: Staged, windows: Sequence[np.ndarray], slots: np.ndarray, *, at: int
    ) -> None:
        """Put the rows at `slots` of each site's window into the batch at `at`, widened unless they
        go to a GPU."""
        part = slice(at, at + len(slots))
        for k, window in enumerate(windows):
            if self._on_gpu:
                _take(window, slots, self._as_numpy(staged.pinned[k])[part])
            else:
                self._gather_widened(window, slots, staged.values[k][part], self._pieces()[k])

    def delivered(self, staged: Staged) -> list[Tensor]:
        """The batch on its device, float32."""
        if not self._on_gpu:
            return staged.values
        moved = [
            each.to(self._device, non_blocking=True).to(torch.float32) for each in staged.pinned
        ]
        staged.copied = torch.cuda.Event()
        staged.copied.record()
        return moved

    def _gather_widened(
        self, window: np.ndarray, slots: np.ndarray, values: Tensor, piece: Tensor
    ) -> None:
        if window.dtype == np.float32:
            _take(window, slots, values.numpy())
            return
        bits = self._as_numpy(piece)
        for start in range(0, len(slots), len(piece)):
            stop = min(start + len(piece), len(slots))
            _take(window, slots[start:stop], bits[: stop - start])
            values[start:stop].copy_(piece[: stop - start])

    def _fresh(self) -> Staged:
        shapes = [(self._batch_size, width) for width in self._widths]
        if self._on_gpu:
            return Staged(
                pinned=[
                    torch.empty(shape, dtype=self._torch_dtype, pin_memory=True) for shape in shapes
                ]
            )
        return Staged(values=[torch.empty(shape, dtype=torch.float32) for shape in shapes])

    def _pieces(self) -> list[Tensor]:
        """Each thread's own buffer for every site."""
        if not hasattr(self._local, "pieces"):
            shapes = [(max(1, _PIECE_NUMBERS // width), width) for width in self._widths]
            self._local.pieces = [torch.empty(shape, dtype=self._torch_dtype) for shape in shapes]
        return self._local.pieces

    def _as_numpy(self, tensor: Tensor) -> np.ndarray:
        return tensor.view(torch.uint16).numpy() if self._is_bfloat16 else tensor.numpy()


def _take(window: np.ndarray, slots: np.ndarray, out: np.ndarray) -> None:
    np.take(
        window, slots, axis=0, out=out, mode="clip"
    )  # mode="clip": no second buffer inside numpy


def keep_to_one_thread() -> None:
    """From now on torch shares no work of the calling thread out to others. Without it each thread
    that widens gets an OpenMP team of its own, which spins for work beside the trainer's; other
    threads keep what they have."""
    # torch sets a thread's number at its first use, so before it is limited
    torch.get_num_threads()
    ThreadpoolController().select(user_api="openmp").limit(limits=1)
