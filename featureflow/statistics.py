"""Statistics of paired comparisons: intervals, tests, and corrections for many arms.

- `bootstrap_mean`: percentile interval of a mean by resampling whole groups and, within each, its
  members (concepts → prompts → samples): the groups are the unit, so repeated samples of one prompt
  do not count as independent.
- `sign_flip_p`: two-sided permutation test of a mean of paired differences (exact up to 14 units,
  else sampled).
- `holm`: adjusted p-values. `equivalent`: two one-sided tests by the interval at 1 − 2α.

Everything takes a seed; nothing touches global generators.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from featureflow.errors import UserError

_EXACT_UNITS = 14


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with a percentile interval; `n` counts the innermost values."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def bootstrap_mean(
    values: Sequence[float],
    groups: Sequence[Sequence[object]] = (),
    *,
    seed: int,
    level: float = 0.95,
    n: int = 2000,
) -> Interval:
    """The mean of `values` with a hierarchical bootstrap. `groups` are the levels, outermost first,
    one key a value; without groups every value is a unit. NaN values are left out."""
    array = np.asarray(values, dtype=np.float64)
    if any(len(keys) != len(array) for keys in groups):
        raise UserError("every value needs one key a level", expected=str(len(array)))
    kept = [int(place) for place in np.flatnonzero(np.isfinite(array))]
    if not kept:
        return Interval(mean=float("nan"), low=float("nan"), high=float("nan"), n=0)
    tree = _tree(array[kept], [[keys[place] for place in kept] for keys in groups])
    draws = _resampled_means(tree, n, np.random.default_rng(seed))
    tail = (1 - level) / 2
    return Interval(
        mean=float(_mean(tree)),
        low=float(np.quantile(draws, tail)),
        high=float(np.quantile(draws, 1 - tail)),
        n=len(kept),
    )


def sign_flip_p(differences: Sequence[float], *, seed: int, n: int = 20_000) -> float:
    """P of a mean at least this far from 0 if signs were random; one difference a unit."""
    values = np.asarray(differences, dtype=np.float64)
    values = values[np.isfinite(values)]
    if not len(values):
        return float("nan")
    if len(values) <= _EXACT_UNITS:
        signs = np.array(list(itertools.product((-1.0, 1.0), repeat=len(values))))
        means = np.abs(signs @ values)
        return float((means >= np.abs(values.sum()) * (1 - 1e-12)).mean())
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(n, len(values)))
    means = np.abs(signs @ values)
    return float((1 + (means >= np.abs(values.sum()) * (1 - 1e-12)).sum()) / (n + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def equivalent(interval: Interval, margin: float) -> bool:
    """Whether an interval at level 1 − 2α lies within ±margin: the two one-sided tests at α."""
    return -margin < interval.low and interval.high < margin


_Tree = Float[np.ndarray, "value"] | list["_Tree"]


def _tree(values: Float[np.ndarray, "value"], keys: Sequence[Sequence[object]]) -> _Tree:
    if not keys:
        return values
    places: dict[object, list[int]] = {}
    for place, key in enumerate(keys[0]):
        places.setdefault(key, []).append(place)
    return [
        _tree(values[own], [[level[i] for i in own] for level in keys[1:]])
        for own in places.values()
    ]


def _mean(tree: _Tree) -> float:
    return (
        float(np.mean(tree))
        if isinstance(tree, np.ndarray)
        else float(np.mean([_mean(branch) for branch in tree]))
    )


def _resampled_means(
    tree: _Tree, n: int, generator: np.random.Generator
) -> Float[np.ndarray, "draw"]:
    """Means of `n` resamplings. A branch chosen twice in one draw is resampled twice,
    independently."""
    chosen = generator.integers(len(tree), size=(n, len(tree)))
    if isinstance(tree, np.ndarray):
        return tree[chosen].mean(axis=1)
    means = np.empty(chosen.shape)
    for place, branch in enumerate(tree):
        here = chosen == place
        means[here] = _resampled_means(branch, int(here.sum()), generator)
    return means.mean(axis=1)
