"""Activations of a dictionary on some rows: which latent, at which row, how strongly; and those
that was nearly active.

1. pre-activations of a block of rows: `(x − b_in) W_encᵀ + b_enc`; the product may run in bfloat16
   (four times faster on
   CPUs that have it; activations are then exact to about 0.4 %), the rest in float32;
2. TopK: a bound from the maxima of groups of latents leaves few candidates, and one sort of these
   gives the k largest and the few below them, which are the near-misses.
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

from sae import Sae
from sae.activations import Threshold, TopKActivation

Precision = Literal["float32", "bfloat16"]
_NEAR = 0.25
_NEAR_PER_ROW = 8
_BLOCK = 1024  # rows whose activations stay in the cache between the product and the search
_LATENT_BITS = 20


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
    n = pre.shape[1]
    wide = min(n, k + _NEAR_PER_ROW)
    values = pre.numpy()
    candidate = np.flatnonzero(values >= _below_the_largest(pre, wide)[:, None])
    value = values.ravel()[candidate]
    candidate, value = candidate[value > 0], value[value > 0]
    row, latent = np.divmod(candidate.astype(np.uint32), np.uint32(n))
    # one number per candidate that sorts by row, then falling value, then latent: sorting it
    # replaces three gathers
    packed = (row.astype(np.uint64) << np.uint64(32 + _LATENT_BITS)) | latent
    packed |= (~value.view(np.uint32)).astype(np.uint64) << np.uint64(_LATENT_BITS)
    packed.sort()
    start = np.searchsorted(row, np.arange(len(pre) + 1))
    place = np.arange(len(row)) - start[row]  # sorting stays inside rows
    latent = (packed & np.uint64((1 << _LATENT_BITS) - 1)).astype(np.int64)
    value = (~(packed >> np.uint64(_LATENT_BITS)).astype(np.uint32)).view(np.float32)
    is_active = place < k
    near = (place >= k) & (place < wide)
    edge = value[start[row[near]] + k - 1]
    return (
        _Entries(rows[row[is_active]], latent[is_active], value[is_active]),
        _Entries(rows[row[near]], latent[near], value[near], (edge - value[near]) / edge),
    )


def _below_the_largest(pre: Float[Tensor, "row latent"], n: int) -> Float32[np.ndarray, "row"]:
    """A number per row that its n largest entries reach and few others: latents are dealt into
    groups, and of the groups' maxima the n-th largest is at most the n-th largest entry."""
    n_groups = 1 << max(7, (3 * n).bit_length())
    whole = pre.shape[1] // n_groups * n_groups
    if whole < 2 * n_groups:
        return np.zeros(len(pre), np.float32)
    maxima = pre[:, :whole].view(len(pre), -1, n_groups).amax(dim=1).numpy()
    return np.partition(maxima, n_groups - n, axis=1)[:, n_groups - n]


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
    narrow = latent.astype(np.uint16) if n_latents <= 0x10000 else latent
    order = np.argsort(
        narrow, kind="stable"
    )  # rows are ascending already; 16-bit keys take the radix sort
    gap = [np.full(len(p.row), np.nan, np.float32) if p.gap is None else p.gap for p in parts]
    return Activations(
        latent=latent[order].astype(np.int32),
        row=np.concatenate([p.row for p in parts])[order].astype(np.int64),
        value=np.concatenate([p.value for p in parts])[order].astype(np.float32),
        gap=np.concatenate(gap)[order].astype(np.float32),
        n_latents=n_latents,
    )


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    return ((a, min(a + _BLOCK, n)) for a in range(0, n, _BLOCK))
