"""Statistics of one site: gathered chunk by chunk while a store is written, merged when it is read.

Moments are merged by Chan's rule, exact in any grouping up to rounding; the order is fixed (chunks
within a shard, shards within a store), so a resumed run gives the same bytes. Norms go into a
histogram of quarter octaves and are stored a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64

N_BINS = 160
_FIRST_OCTAVE = -16.0


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Count, mean and sum of squared deviations of each dimension."""

    n: int
    mean: Float[np.ndarray, "d_model"]
    m2: Float[np.ndarray, "d_model"]

    @property
    def variance(self) -> Float[np.ndarray, "d_model"]:
        """Population variance; zeros for fewer than two rows."""
        return self.m2 / max(self.n, 1)

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of rows together (Chan, Golub and LeVeque 1979)."""
        if not self.n or not other.n:
            return self if self.n else other
        n = self.n + other.n
        delta = other.mean - self.mean
        return Moments(
            n=n,
            mean=self.mean + delta * (other.n / n),
            m2=self.m2 + other.m2 + delta**2 * (self.n * other.n / n),
        )


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """What a site looks like over its kept rows (flags = 0: no BOS, special, padding, sink or
    non-finite row).

    `mean` and `variance` are per dimension, norms are L2; `n_non_finite` counts numbers over all
    rows.
    """

    n: int
    mean: Float[np.ndarray, "d_model"]
    variance: Float[np.ndarray, "d_model"]
    n_non_finite: int
    median_norm: float
    norm_quantiles: dict[float, float]
    norm_histogram: Int64[np.ndarray, "bin"]

    @property
    def total_variance(self) -> float:
        return float(self.variance.sum())


def empty_moments(width: int) -> Moments:
    return Moments(n=0, mean=np.zeros(width), m2=np.zeros(width))


def moments_of(values: Float[np.ndarray, "row d_model"], kept: np.ndarray) -> Moments:
    """Moments over the kept rows. `values` is used as scratch space."""
    n = int(kept.sum())
    if n == 0:
        return empty_moments(values.shape[1])
    if n < len(values):
        values[~kept] = 0
    mean = values.sum(axis=0, dtype=np.float32) / np.float32(n)
    values -= mean
    if n < len(values):
        values[~kept] = 0
    residual = values.sum(axis=0, dtype=np.float32) / np.float32(n)
    np.multiply(values, values, out=values)
    m2 = values.sum(axis=0, dtype=np.float32).astype(np.float64)
    exact = mean.astype(np.float64) + residual
    return Moments(n=n, mean=exact, m2=np.maximum(m2 - n * residual.astype(np.float64) ** 2, 0))


def norms_of(values: Float[np.ndarray, "row d_model"]) -> Float[np.ndarray, "row"]:
    """L2 norm of each row; not finite exactly where the row is not finite (squares of float32 up to
    1e19 fit)."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.sqrt(np.einsum("rd,rd->r", values, values))


def histogram_edges() -> Float[np.ndarray, "edge"]:
    return np.exp2(_FIRST_OCTAVE + np.arange(N_BINS + 1) / 4)


def histogram_of(norms: Float[np.ndarray, "row"]) -> Int64[np.ndarray, "bin"]:
    """Counts of norms in quarter octaves from 2^-16 to 2^24; what lies outside is counted in the
    outermost bins."""
    with np.errstate(divide="ignore"):
        octave = np.log2(norms.astype(np.float64))
    index = np.clip(np.floor((octave - _FIRST_OCTAVE) * 4), 0, N_BINS - 1).astype(np.int64)
    return np.bincount(index, minlength=N_BINS)
