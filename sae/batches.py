"""Where a trainer's batches come from: a small protocol, and the reader for activations that fit in
memory.

A reader can tell its position and return to it exactly, so a killed run continues with the very
batch it would have seen. `InMemoryBatches` shuffles all rows anew in every epoch, from `(seed,
epoch)` alone; rows left over at the end of an epoch are left out of that epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Raw activations of some tokens; `y` is the other site's activations for a transcoder."""

    x: Float[Tensor, "token d_in"]
    y: Float[Tensor, "token d_out"] | None = None


class Batches(Protocol):
    """An endless, seeded, resumable source of batches."""

    def next_batch(self) -> Batch: ...

    def state(self) -> dict[str, Any]:
        """The position after the last batch, as plain JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None: ...

    def locate(self, rows: Sequence[int]) -> str:
        """Where rows of the last batch come from, in words for an error message."""
        ...


class InMemoryBatches:
    """Batches from tensors held in memory."""

    def __init__(
        self,
        x: Float[Tensor, "row d_in"],
        y: Float[Tensor, "row d_out"] | None = None,
        *,
        batch_size: int,
        seed: int,
        name_of_row: Callable[[int], str] = lambda row: f"row {row}",
    ) -> None:
        if len(x) < batch_size:
            raise UserError(
                "too few activations for one batch",
                expected=f"{batch_size} rows or more",
                found=f"{len(x)} rows",
            )
        self._x, self._y, self._batch_size, self._seed = x, y, batch_size, seed
        self._name_of_row = name_of_row
        self._epoch, self._position = 0, 0
        self._order = self._shuffled(0)

    def next_batch(self) -> Batch:
        if self._position + self._batch_size > len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffled(self._epoch)
        rows = self._order[self._position : self._position + self._batch_size]
        self._position += self._batch_size
        return Batch(x=self._x[rows], y=None if self._y is None else self._y[rows])

    def state(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        self._order = self._shuffled(self._epoch)

    def locate(self, rows: Sequence[int]) -> str:
        last = self._order[self._position - self._batch_size : self._position]
        return ", ".join(self._name_of_row(int(last[row])) for row in rows)

    def _shuffled(self, epoch: int) -> Tensor:
        return torch.from_numpy(
            np.random.default_rng((self._seed, epoch)).permutation(len(self._x))
        )
