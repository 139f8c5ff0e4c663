"""Intervals, tests, and corrections for many tests. Everything takes a seed; nothing touches global
generators.

- `bootstrap`: percentile intervals of any statistic that is a function of sums over independent
  units; `bootstrap_ratio` is the one of a ratio of two sums. Documents are the units where tokens
  are counted, because tokens of one document are not independent. A resample is a row of weights,
  so that a statistic is a matrix product (`scipy.stats.bootstrap` would copy every unit).
- `mean_over`: the mean of rows with an interval over the units that they belong to.
- `bootstrap_mean`: percentile interval of a mean by resampling whole groups and, within each, its
  members (concepts → prompts → samples): the groups are the unit, so repeated samples of one prompt
  do not count as independent.
- `p_values`: against a sample of the null. `q_values` (Benjamini and Hochberg, 1995): adjusted;
  `accepted_p`: the largest p-value that a false-discovery rate accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy
from jaxtyping import Float, Int

from featureflow.errors import UserError

_DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with a percentile interval; `n` counts what was measured: units of `bootstrap`,
    the innermost values of `bootstrap_mean`. NaN on both sides for fewer than two units."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap(
    statistic: Callable[[Float[np.ndarray, "draw unit"]], Float[np.ndarray, "draw"]],
    n_units: int,
    *,
    seed: int,
    level: float = 0.95,
    n: int = _DRAWS,
) -> Interval:
    """The statistic of all units, with its interval when units are drawn with replacement.
    `statistic` gets how often each unit counts, one row a draw; draws that give NaN are left
    out."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = float(statistic(np.ones((1, n_units)))[0]) if n_units else float("nan")
        if n_units < 2:
            return Interval(mean=mean, low=float("nan"), high=float("nan"), n=n_units)
        generator = np.random.default_rng(seed)
        weights = generator.multinomial(n_units, np.full(n_units, 1 / n_units), size=n)
        draws = statistic(weights.astype(np.float64))
    draws = draws[np.isfinite(draws)]
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail]) if len(draws) else (np.nan, np.nan)
    return Interval(mean=mean, low=float(low), high=float(high), n=n_units)


def bootstrap_ratio(
    numerator: Float[np.ndarray, "unit"],
    denominator: Float[np.ndarray, "unit"],
    *,
    seed: int,
    level: float = 0.95,
    n: int = _DRAWS,
) -> Interval:
    """`numerator.sum() / denominator.sum()` over resampled units, such as documents."""

    def ratio(weights: Float[np.ndarray, "draw unit"]) -> Float[np.ndarray, "draw"]:
        return (weights @ numerator) / (weights @ denominator)

    return bootstrap(ratio, len(numerator), seed=seed, level=level, n=n)


def mean_over(
    values: Float[np.ndarray, "row"], unit: Int[np.ndarray, "row"], *, seed: int
) -> Interval:
    """The mean of rows, with an interval over their units, such as documents. Rows with NaN are
    left out; `n` counts units."""
    kept = np.isfinite(values)
    _, place, count = np.unique(unit[kept], return_inverse=True, return_counts=True)
    total = np.bincount(place, values[kept].astype(np.float64), minlength=len(count))
    return bootstrap_ratio(total, count.astype(np.float64), seed=seed)


def named(name: str, interval: Interval) -> dict[str, float]:
    """An interval as three columns of a table: `name`, `name_low`, `name_high`."""
    return {name: interval.mean, f"{name}_low": interval.low, f"{name}_high": interval.high}


def ranged(row: Any, name: str, form: str = ".2f") -> str:
    """Those three columns of a row in words: `0.62 [0.48, 0.79]`."""
    value, low, high = (
        format(getattr(row, column) if isinstance(row, tuple) else row[column], form)
        for column in (name, f"{name}_low", f"{name}_high")
    )
    return f"{value} [{low}, {high}]"


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


def p_values(
    observed: Float[np.ndarray, "test"], null: Float[np.ndarray, "sample"]
) -> Float[np.ndarray, "test"]:
    """(1 + number of null values at or above) / (1 + number of null values): never zero, honest
    about the sample's size."""
    ordered = np.sort(null)
    at_least = len(ordered) - np.searchsorted(ordered, observed, side="left")
    return (1 + at_least) / (1 + len(ordered))


def q_values(
    p: Float[np.ndarray, "test"], family: Float[np.ndarray, "test"] | None = None
) -> Float[np.ndarray, "test"]:
    """The smallest false-discovery rate at which each `p` is accepted, judged among the tests of
    `family` (itself): q(p) = n·p / number of the family's p-values ≤ p, made monotone."""
    tests = np.sort(p if family is None else family)
    if not len(tests):
        return np.ones_like(p)
    accepted = np.searchsorted(tests, p, side="right")
    own = len(tests) * p / np.maximum(accepted, 1)
    later = np.append(scipy.stats.false_discovery_control(tests), np.inf)[accepted]
    return np.minimum(np.minimum(own, later), 1.0)


def accepted_p(p: Float[np.ndarray, "test"], rate: float) -> float | None:
    """The largest p-value that false-discovery rate `rate` accepts in this family; None when it
    accepts none."""
    accepted = int((q_values(p) <= rate).sum())
    return rate * accepted / len(p) if accepted else None


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
