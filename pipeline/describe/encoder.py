"""Activations of a dictionary on some rows: which latent, at which row, how strongly; and those
that was nearly active.

1. pre-activations of a block of rows: `(x − b_in) W_encᵀ + b_enc`; the product may run in bfloat16
   (four times faster on
   CPUs that have it; activations are then exact to about 0.4 %), the rest in float32;
2. TopK: the k largest of a row (sae/kernels/select.py) and the few below them, which are the
   near-misses.
   Thresholds: everything above `theta` is active, what lies within `_NEAR` of it nearly. ReLU and
   gated dictionaries have no near-misses, since they are active at the smallest excess;
3. the entries are sorted by latent, then row.

Cost: one product of `row × d_in × latent` and two passes over `row × latent`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from pipeline.describe.loops import by_latent, split_by_rank
from sae import Sae
from sae.activations import Threshold, TopKActivation
from sae.kernels.select import largest_of_rows

Precision = Literal["float32", "bfloat16"]
_NEAR = 0.25
_NEAR_PER_ROW = 8
_BLOCK = 1024  # rows whose activations stay in the cache between the product and the search


@dataclass(frozen=True, kw_only=True, eq=False)
class Activations:
    """Entries sorted by latent, then row. `row` counts in the corpus; `gap` says of near-misses how
    far they stayed below
    what being active takes, as a share of it, and is NaN for activations."""

    latent: Int32[np.ndarray, "entry"]
    row: Int64[np.ndarray, "entry"]
    value: Float32[np.ndarray, "entry"]
    gap: Float32[np.ndarray, "entry"]
    n_latents: int

    @classmethod
    def none(cls, n_latents: int) -> Activations:
        """No entries."""
        whole, real = np.zeros(0, np.int64), np.zeros(0, np.float32)
        return cls(
            latent=whole.astype(np.int32), row=whole, value=real, gap=real, n_latents=n_latents
        )

    def __len__(self) -> int:
        return len(self.row)

    @cached_property
    def start(self) -> Int64[np.ndarray, "latent_and_one"]:
        """Entries of latent f are `start[f] … start[f + 1]`."""
        counts = np.bincount(self.latent, minlength=self.n_latents)
        return np.concatenate([[0], counts.cumsum()])

    @cached_property
    def key(self) -> Int64[np.ndarray, "entry"]:
        """Latent and row in one sorted number, for binary search."""
        return (self.latent.astype(np.int64) << 40) | self.row


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoder:
    """A dictionary made ready to encode many rows: its tensors in the dtype of the product."""

    sae: Sae
    weight: Tensor

    @classmethod
    def of(cls, sae: Sae, precision: Precision) -> Encoder:
        return cls(sae=sae, weight=sae.W_enc.to(getattr(torch, precision)))

    @torch.no_grad()
    def pre_activations(self, x: Float[Tensor, "row d_in"]) -> Float[Tensor, "row latent"]:
        centred = (x.to(self.sae.dtype) - self.sae.b_in).to(self.weight.dtype)
        return F.linear(centred, self.weight).to(torch.float32).add_(self.sae.b_enc)

    def activations(
        self, x: Float32[np.ndarray, "row d_in"], rows: Int64[np.ndarray, "row"]
    ) -> tuple[Activations, Activations]:
        """What is active and what is nearly active; `rows` are the corpus rows of `x`,
        ascending."""
        parts = [self._block(torch.from_numpy(x[a:b]), rows[a:b]) for a, b in _blocks(len(x))]
        return _sorted([active for active, _ in parts], self.sae.n_latents), _sorted(
            [near for _, near in parts], self.sae.n_latents
        )

    def _block(self, x: Tensor, rows: Int64[np.ndarray, "row"]) -> tuple[_Entries, _Entries]:
        pre = self.pre_activations(x)
        match self.sae.activation:
            case TopKActivation(k=k):
                return _top_k(pre, rows, k)
            case Threshold(theta=theta):
                return _above(pre.numpy(), rows, theta.numpy())
            case activation:
                value = activation(pre).numpy()
                row, latent = np.nonzero(value)
                return _Entries(rows[row], latent, value[row, latent]), _Entries(
                    rows[:0], latent[:0], value[:0, 0]
                )


class _Entries(NamedTuple):
    """Entries of a block in any order; `gap` only for near-misses."""

    row: np.ndarray
    latent: np.ndarray
    value: np.ndarray
    gap: np.ndarray | None = None


def threshold_of(sae: Sae) -> Float32[np.ndarray, "latent"]:
    """The activation each latent must exceed, NaN where the architecture has no such number."""
    if isinstance(sae.activation, Threshold):
        return sae.activation.theta.detach().cpu().numpy().astype(np.float32)
    return np.full(sae.n_latents, np.nan, dtype=np.float32)


def _top_k(
    pre: Float[Tensor, "row latent"], rows: Int64[np.ndarray, "row"], k: int
) -> tuple[_Entries, _Entries]:
    """The k largest are active where positive; of the next `_NEAR_PER_ROW`, the positive ones
    nearly are. The last active one says what being active took. Of equals the first wins."""
    wide = min(pre.shape[1], k + _NEAR_PER_ROW)
    value, latent = (part.numpy() for part in largest_of_rows(pre, wide))
    rank, gap = np.empty(value.shape, np.int8), np.empty_like(value)
    split_by_rank(value, k, rank, gap)
    row = np.repeat(rows, wide).reshape(rank.shape)
    active, near = rank == 1, rank == 2
    return (
        _Entries(row[active], latent[active], value[active]),
        _Entries(row[near], latent[near], value[near], gap[near]),
    )


def _above(
    pre: Float32[np.ndarray, "row latent"],
    rows: Int64[np.ndarray, "row"],
    theta: Float32[np.ndarray, "latent"],
) -> tuple[_Entries, _Entries]:
    """Above theta is active; within `_NEAR` below it nearly so (theta 0 has no near-misses)."""
    row, latent = np.nonzero((pre > theta) | ((pre > theta * (1 - _NEAR)) & (theta > 0)))
    value, edge = pre[row, latent], theta[latent]
    is_active = value > edge
    near = ~is_active
    gap = np.divide(edge - value, edge, out=np.zeros_like(value), where=edge > 0)
    return (
        _Entries(rows[row[is_active]], latent[is_active], value[is_active]),
        _Entries(rows[row[near]], latent[near], value[near], gap[near]),
    )


def _sorted(parts: list[_Entries], n_latents: int) -> Activations:
    if not parts:
        return Activations.none(n_latents)
    latent = np.concatenate([p.latent for p in parts])
    start, order = np.zeros(n_latents + 1, np.int64), np.empty(len(latent), np.int64)
    by_latent(latent, start, order)  # rows are ascending already
    gap = [np.full(len(p.row), np.nan, np.float32) if p.gap is None else p.gap for p in parts]
    return Activations(
        latent=np.repeat(np.arange(n_latents, dtype=np.int32), np.diff(start)),
        row=np.concatenate([p.row for p in parts])[order].astype(np.int64, copy=False),
        value=np.concatenate([p.value for p in parts])[order].astype(np.float32, copy=False),
        gap=np.concatenate(gap)[order].astype(np.float32, copy=False),
        n_latents=n_latents,
    )


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    return ((a, min(a + _BLOCK, n)) for a in range(0, n, _BLOCK))
