"""Cosines of links and a null sample → p-values, false-discovery rates, and the cosine that a rate
asks for.

1. p(c) = (1 + number of null values ≥ c) / (1 + number of null values): never zero, honest about
   the sample's size.
2. q by Benjamini and Hochberg (1995) over the top-1 links of one pair of dictionaries.
3. A lower-ranked link is judged by the same curve: q(p) = n·p / number of top-1 links with a
   p-value ≤ p, made monotone.

Cost O(n log n).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def p_values(
    observed: Float[np.ndarray, "link"], null: Float[np.ndarray, "sample"]
) -> Float[np.ndarray, "link"]:
    """The share of the null at or above each observed value, counting the observation itself."""
    ordered = np.sort(null)
    at_least = len(ordered) - np.searchsorted(ordered, observed, side="left")
    return (1 + at_least) / (1 + len(ordered))


def q_values(
    p: Float[np.ndarray, "link"], family: Float[np.ndarray, "test"] | None = None
) -> Float[np.ndarray, "link"]:
    """The smallest false-discovery rate at which each `p` is accepted, judged among the tests of
    `family` (itself)."""
    tests = np.sort(p if family is None else family)
    if not len(tests):
        return np.ones_like(p)
    raw = len(tests) * tests / np.arange(1, len(tests) + 1)
    monotone = np.minimum.accumulate(raw[::-1])[::-1]
    accepted = np.searchsorted(tests, p, side="right")
    own = len(tests) * p / np.maximum(accepted, 1)
    later = np.append(monotone, np.inf)[accepted]
    return np.minimum(np.minimum(own, later), 1.0)


def cosine_at_rate(
    p: Float[np.ndarray, "link"], nulls: Sequence[Float[np.ndarray, "sample"]], rate: float
) -> float | None:
    """The cosine from which links of this family are accepted at false-discovery rate `rate`; None
    when none is.

    It is the null's quantile at the largest p-value that Benjamini and Hochberg accept, the largest
    over `nulls`.
    """
    accepted = int((q_values(p) <= rate).sum())
    if not accepted or not nulls:
        return None
    return max(float(np.quantile(null, 1 - rate * accepted / len(p))) for null in nulls)


def hubness(index: np.ndarray, n_possible: int) -> tuple[float, int]:
    """How unequally sources are chosen as best partner: skewness of the counts (0 even, > 1 hubs)
    and the largest."""
    counts = np.bincount(index[index >= 0], minlength=n_possible)
    spread = counts.std()
    skew = float(((counts - counts.mean()) ** 3).mean() / spread**3) if spread > 0 else 0.0
    return skew, int(counts.max(initial=0))
