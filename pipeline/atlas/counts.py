"""Counts of firings by latent and by something about the token: which it is, which came before, where it stands.

Every attribute of a token position is a partition of the rows, so one kind of table serves statistics, labels and their
scores. Per (latent, value) there are seven numbers, all additive:

    n_propose, mass_propose, strong_propose   firings, Σa and strong firings on documents where labels are proposed
    n_held, mass_held, strong_held            the same on held-out documents
    near_held                                 near-misses on held-out documents

A rule is about all firings or about strong ones (`Counts.about`); then four numbers matter: firings on either part of
the documents, Σa held out, and the negatives that are hardest to tell: near-misses, or firings that are not strong.

`Counts` is sparse: sorted unique keys `latent · n_values + value`. Adding entries costs one sort of them; two
tables merge by the same sum, so chunks, workers and machines may be joined in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64

COLUMNS = ("n_propose", "mass_propose", "strong_propose", "n_held", "mass_held", "strong_held", "near_held")
PROPOSE, HELD, MASS, NEGATIVE = range(4)
Target = Literal["all", "strong"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Rows sorted by latent, then value. `columns[:, i]` is COLUMNS[i], or one of the four of a target."""

    n_latents: int
    n_values: int
    key: Int64[np.ndarray, "pair"]
    columns: Float64[np.ndarray, "pair column"]

    @classmethod
    def empty(cls, n_latents: int, n_values: int) -> Counts:
        return cls(
            n_latents=n_latents, n_values=n_values, key=np.zeros(0, np.int64), columns=np.zeros((0, len(COLUMNS)))
        )

    @property
    def latent(self) -> Int64[np.ndarray, "pair"]:
        return self.key // self.n_values

    @property
    def value(self) -> Int64[np.ndarray, "pair"]:
        return self.key % self.n_values

    def column(self, name: str) -> Float64[np.ndarray, "pair"]:
        return self.columns[:, COLUMNS.index(name)]

    def totals(self) -> Float64[np.ndarray, "latent column"]:
        """The sums over all values."""
        parts = [np.bincount(self.latent, weights=c, minlength=self.n_latents) for c in self.columns.T]
        return np.stack(parts, axis=1)

    def plus(self, other: Counts) -> Counts:
        """The table over both sets of rows."""
        return self._summed(np.concatenate([self.key, other.key]), np.concatenate([self.columns, other.columns]))

    def about(self, target: Target) -> Counts:
        """The four columns PROPOSE, HELD, MASS, NEGATIVE of rules about all firings, or about strong ones."""
        if target == "all":
            chosen = [self.column(name) for name in ("n_propose", "n_held", "mass_held", "near_held")]
        else:
            strong, weaker = self.column("strong_held"), self.column("n_held") - self.column("strong_held")
            chosen = [self.column("strong_propose"), strong, np.zeros(len(strong)), weaker]
        return Counts(n_latents=self.n_latents, n_values=self.n_values, key=self.key, columns=np.stack(chosen, axis=1))

    def mapped(self, value_of: Int32[np.ndarray, "value"], n_values: int) -> Counts:
        """The table of a coarser attribute: `value_of[v]` is what v becomes, −1 to drop it."""
        coarse = value_of[self.value]
        keep = coarse >= 0
        empty = Counts.empty(self.n_latents, n_values)
        return empty._summed(self.latent[keep] * n_values + coarse[keep], self.columns[keep])

    def pruned(self, most: int) -> Counts:
        """At most `most` values per latent, the ones with the most firings: what keeps a table bounded. Sums over the
        rest are lost, so it is used only when a table has outgrown its limit."""
        size = self.column("n_propose") + self.column("n_held")
        order = np.lexsort((self.key, -size, self.latent))
        latent = self.latent[order]
        place = np.arange(len(order)) - np.searchsorted(latent, latent)
        kept = np.sort(order[place < most])
        return Counts(n_latents=self.n_latents, n_values=self.n_values, key=self.key[kept], columns=self.columns[kept])

    def at(self, latent: np.ndarray, value: np.ndarray) -> Float64[np.ndarray, "query column"]:
        """The numbers of some pairs; zeros for pairs never seen."""
        if not len(self.key):
            return np.zeros((len(latent), self.columns.shape[1]))
        key = latent.astype(np.int64) * self.n_values + value
        place = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
        return np.where((self.key[place] == key)[:, None], self.columns[place], 0.0)

    def _summed(self, key: Int64[np.ndarray, "pair"], columns: Float64[np.ndarray, "pair column"]) -> Counts:
        order = np.argsort(key, kind="stable")
        key = key[order]
        starts = np.flatnonzero(np.concatenate([[True], np.diff(key) != 0])) if len(key) else np.zeros(0, np.int64)
        summed = np.add.reduceat(columns[order], starts, axis=0) if len(key) else columns
        return Counts(n_latents=self.n_latents, n_values=self.n_values, key=key[starts], columns=summed)


@dataclass(frozen=True, kw_only=True, eq=False)
class Entries:
    """What is known of every entry, firing or near-miss, whatever the attribute it is counted by."""

    mass: Float32[np.ndarray, "entry"]
    held: Bool[np.ndarray, "entry"]
    near: Bool[np.ndarray, "entry"]
    strong: Bool[np.ndarray, "entry"]

    @cached_property
    def columns(self) -> tuple[Float64[np.ndarray, "entry"], ...]:
        """What each entry adds to COLUMNS."""
        columns: list[np.ndarray] = []
        for part in (~self.near & ~self.held, ~self.near & self.held):
            columns += [part, np.where(part, self.mass, 0), part & self.strong]
        return tuple(c.astype(np.float64) for c in (*columns, self.near & self.held))


def count(
    *,
    latent: Int32[np.ndarray, "entry"],
    value: Int32[np.ndarray, "entry"],
    entries: Entries,
    n_latents: int,
    n_values: int,
) -> Counts:
    """The table of some entries; those with a negative value (no token before the first) are left out."""
    if n_latents * n_values <= _DENSE:
        return _count_dense(latent, value, entries, n_latents, n_values)
    dtype = np.uint32 if n_latents * n_values < 1 << 32 else np.int64  # 32-bit keys sort in half the time
    seen = value >= 0
    key = (latent.astype(np.int64) * n_values + value)[seen].astype(dtype)
    order = np.argsort(key)
    key = key[order]
    if not len(key):
        return Counts.empty(n_latents, n_values)
    starts = np.flatnonzero(np.concatenate([[True], key[1:] != key[:-1]]))
    columns = np.stack([np.add.reduceat(c[seen][order], starts) for c in entries.columns], axis=1)
    return Counts(n_latents=n_latents, n_values=n_values, key=key[starts].astype(np.int64), columns=columns)


_DENSE = 1 << 21


def _count_dense(
    latent: np.ndarray,
    value: np.ndarray,
    entries: Entries,
    n_latents: int,
    n_values: int,
) -> Counts:
    """Few possible pairs: count into a dense array, no sort."""
    seen = value >= 0
    key = latent[seen].astype(np.int64) * n_values + value[seen]
    size = n_latents * n_values
    columns = np.stack([np.bincount(key, weights=c[seen], minlength=size) for c in entries.columns], axis=1)
    pairs = np.flatnonzero(columns.any(axis=1))
    return Counts(n_latents=n_latents, n_values=n_values, key=pairs, columns=columns[pairs])
