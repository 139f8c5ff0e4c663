"""Counts of firings by latent and by something about the token: which it is, which came before, where it stands.

Every attribute of a token position is a partition of the rows, so one kind of table serves statistics, labels and their
scores. Per (latent, value) there are seven numbers, all additive:

    n_propose, mass_propose, strong_propose   firings, Σa and strong firings on documents where labels are proposed
    n_held, mass_held, strong_held            the same on held-out documents
    near_held                                 near-misses on held-out documents

A rule is about all firings or about strong ones (`Counts.about`); then four numbers matter: firings on either part of
the documents, Σa held out, and the negatives that are hardest to tell: near-misses, or firings that are not strong.

`Counts` is sparse: sorted unique keys `latent · n_values + value`. To count entries, each one becomes a single 64-bit
number `key | flags | Σa`, and these are sorted: one sort of plain numbers is several times faster than sorting an
index and gathering seven columns by it. Tables merge by sums, so chunks, workers and machines may be joined in any
order; since merging costs more than counting, entries are collected (`Entries.joined`) until there are many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int32, Int64, UInt8, UInt32, UInt64

COLUMNS = ("n_propose", "mass_propose", "strong_propose", "n_held", "mass_held", "strong_held", "near_held")
PROPOSE, HELD, MASS, NEGATIVE = range(4)
Target = Literal["all", "strong"]
_STRONG, _HELD, _NEAR = 1, 2, 4
_FLAG_BITS, _MASS_BITS = 3, 32
_DENSE = 1 << 21


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Rows sorted by latent, then value. `columns[i]` is COLUMNS[i], or one of the four of a target."""

    n_latents: int
    n_values: int
    key: Int64[np.ndarray, "pair"]
    columns: tuple[Float64[np.ndarray, "pair"], ...]

    @classmethod
    def empty(cls, n_latents: int, n_values: int) -> Counts:
        return cls(
            n_latents=n_latents,
            n_values=n_values,
            key=np.zeros(0, np.int64),
            columns=tuple(np.zeros(0) for _ in COLUMNS),
        )

    @cached_property
    def latent(self) -> Int64[np.ndarray, "pair"]:
        return np.repeat(np.arange(self.n_latents), np.diff(self.start))

    @cached_property
    def value(self) -> Int64[np.ndarray, "pair"]:
        return self.key - self.latent * self.n_values

    @cached_property
    def start(self) -> Int64[np.ndarray, "latent_and_one"]:
        """Pairs of latent f are `start[f] … start[f + 1]`."""
        return np.searchsorted(self.key, np.arange(self.n_latents + 1) * self.n_values)

    def column(self, name: str) -> Float64[np.ndarray, "pair"]:
        return self.columns[COLUMNS.index(name)]

    def totals(self) -> Float64[np.ndarray, "latent column"]:
        """The sums over all values."""
        parts = [np.bincount(self.latent, weights=c, minlength=self.n_latents) for c in self.columns]
        return np.stack(parts, axis=1)

    def plus(self, other: Counts) -> Counts:
        """The table over both sets of rows."""
        both = zip(self.columns, other.columns, strict=True)
        return _summed(
            self.n_latents,
            self.n_values,
            np.concatenate([self.key, other.key]),
            [np.concatenate(pair) for pair in both],
        )

    def about(self, target: Target) -> Counts:
        """The four columns PROPOSE, HELD, MASS, NEGATIVE of rules about all firings, or about strong ones."""
        if target == "all":
            chosen = tuple(self.column(name) for name in ("n_propose", "n_held", "mass_held", "near_held"))
        else:
            strong, weaker = self.column("strong_held"), self.column("n_held") - self.column("strong_held")
            chosen = (self.column("strong_propose"), strong, np.zeros(len(strong)), weaker)
        return Counts(n_latents=self.n_latents, n_values=self.n_values, key=self.key, columns=chosen)

    def mapped(self, value_of: Int32[np.ndarray, "value"], n_values: int) -> Counts:
        """The table of a coarser attribute: `value_of[v]` is what v becomes, −1 to drop it."""
        coarse = value_of[self.value]
        keep = slice(None) if coarse.min(initial=0) >= 0 else coarse >= 0
        key = self.latent[keep] * n_values + coarse[keep]
        return _summed(self.n_latents, n_values, key, [c[keep] for c in self.columns])

    def pruned(self, most: int) -> Counts:
        """At most `most` values per latent, the ones with the most firings: what keeps a table bounded. Sums over the
        rest are lost, so it is used only when a table has outgrown its limit."""
        size = self.column("n_propose") + self.column("n_held")
        order = np.lexsort((self.key, -size, self.latent))
        latent = self.latent[order]
        place = np.arange(len(order)) - self.start[latent]
        return self.taken(np.sort(order[place < most]))

    def taken(self, pairs: np.ndarray) -> Counts:
        """Some of the pairs, in order: a mask, or ascending indices."""
        columns = tuple(c[pairs] for c in self.columns)
        return Counts(n_latents=self.n_latents, n_values=self.n_values, key=self.key[pairs], columns=columns)

    def at(self, latent: np.ndarray, value: np.ndarray) -> tuple[Float64[np.ndarray, "query"], ...]:
        """The numbers of some pairs, column by column; zeros for pairs never seen."""
        if not len(self.key):
            return tuple(np.zeros(len(latent)) for _ in self.columns)
        key = latent.astype(np.int64) * self.n_values + value
        place = np.minimum(np.searchsorted(self.key, key), len(self.key) - 1)
        known = self.key[place] == key
        return tuple(np.where(known, c[place], 0.0) for c in self.columns)


@dataclass(frozen=True, kw_only=True, eq=False)
class Entries:
    """Firings and near-misses in any order, with what is known of them whatever the attribute they are counted by.
    `flags` has _STRONG, _HELD and _NEAR."""

    latent: Int32[np.ndarray, "entry"]
    row: UInt32[np.ndarray, "entry"]
    mass: Float32[np.ndarray, "entry"]
    flags: UInt8[np.ndarray, "entry"]

    @classmethod
    def of(
        cls,
        latent: Int32[np.ndarray, "entry"],
        row: Int64[np.ndarray, "entry"],
        mass: Float32[np.ndarray, "entry"],
        *,
        strong: Bool[np.ndarray, "entry"],
        held: Bool[np.ndarray, "entry"],
        near: Bool[np.ndarray, "entry"],
    ) -> Entries:
        """The entries that count for something: near-misses on documents for proposing do not."""
        flags = (strong * _STRONG + held * _HELD + near * _NEAR).astype(np.uint8)
        keep = held | ~near
        return cls(latent=latent[keep], row=row[keep].astype(np.uint32), mass=mass[keep], flags=flags[keep])

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        """All entries of at least one part."""
        names = ("latent", "row", "mass", "flags")
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def count(entries: Entries, value: Int32[np.ndarray, "entry"], *, n_latents: int, n_values: int) -> Counts:
    """The table of some entries; those with a negative value (no token before the first) are left out."""
    if n_latents * n_values <= _DENSE:
        return _count_dense(entries, value, n_latents, n_values)
    found = []
    for low, high in _latent_ranges(n_latents, n_values):
        if (low, high) == (0, n_latents):
            keep = slice(None) if value.min(initial=0) >= 0 else value >= 0
        else:
            keep = (value >= 0) & (entries.latent >= low) & (entries.latent < high)
        packed = (entries.latent[keep].astype(np.uint64) - np.uint64(low)) * np.uint64(n_values)
        packed += value[keep].astype(np.uint64)
        packed <<= np.uint64(_FLAG_BITS)
        packed |= entries.flags[keep]
        packed <<= np.uint64(_MASS_BITS)
        packed |= entries.mass[keep].view(np.uint32)
        packed.sort()
        found.append(_counted(packed, low * n_values))
    columns = zip(*(columns for _, columns in found), strict=True)
    return Counts(
        n_latents=n_latents,
        n_values=n_values,
        key=np.concatenate([key for key, _ in found]),
        columns=tuple(np.concatenate(parts) for parts in columns),
    )


def _count_dense(entries: Entries, value: np.ndarray, n_latents: int, n_values: int) -> Counts:
    """Few possible pairs: count into an array of all of them, no sort."""
    keep = slice(None) if value.min(initial=0) >= 0 else value >= 0
    size = n_latents * n_values
    group = (entries.latent[keep].astype(np.int64) * n_values + value[keep]) << _FLAG_BITS | entries.flags[keep]
    n = np.bincount(group, minlength=size << _FLAG_BITS).astype(np.float64)
    mass = np.bincount(group, weights=entries.mass[keep], minlength=size << _FLAG_BITS)
    columns = _columns_of(n.reshape(size, -1).T, mass.reshape(size, -1).T)
    pairs = np.flatnonzero(sum(columns))
    return Counts(n_latents=n_latents, n_values=n_values, key=pairs, columns=tuple(c[pairs] for c in columns))


def _latent_ranges(n_latents: int, n_values: int) -> Iterator[tuple[int, int]]:
    """Ranges of latents whose keys fit beside flags and Σa."""
    size = max(1, (1 << (64 - _FLAG_BITS - _MASS_BITS)) // n_values)
    return ((low, min(low + size, n_latents)) for low in range(0, n_latents, size))


def _counted(
    packed: UInt64[np.ndarray, "entry"], first: int
) -> tuple[Int64[np.ndarray, "pair"], tuple[Float64[np.ndarray, "pair"], ...]]:
    """Keys (from `first` on) and columns of sorted entries."""
    if not len(packed):
        return np.zeros(0, np.int64), tuple(np.zeros(0) for _ in COLUMNS)
    mass = packed.astype(np.uint32).view(np.float32)  # the low 32 bits
    group = (packed >> np.uint64(_MASS_BITS)).astype(np.uint32)
    starts = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    n = np.diff(starts, append=len(group)).astype(np.float64)
    total = np.add.reduceat(mass.astype(np.float64), starts)
    key, flags = group[starts] >> np.uint32(_FLAG_BITS), group[starts] & np.uint32((1 << _FLAG_BITS) - 1)
    new = np.concatenate([[True], key[1:] != key[:-1]])
    pair = np.cumsum(new) - 1
    n_pairs = int(pair[-1]) + 1
    by_flags = np.zeros((2, 1 << _FLAG_BITS, n_pairs))
    place = flags.astype(np.int64) * n_pairs + pair  # a pair has at most one group of each combination of flags
    by_flags[0].ravel()[place], by_flags[1].ravel()[place] = n, total
    return key[new].astype(np.int64) + first, _columns_of(by_flags[0], by_flags[1])


def _columns_of(
    n: Float64[np.ndarray, "flags pair"], mass: Float64[np.ndarray, "flags pair"]
) -> tuple[Float64[np.ndarray, "pair"], ...]:
    """COLUMNS from numbers by combination of flags."""
    propose, held, near = 0, _HELD, _HELD | _NEAR
    return (
        n[propose] + n[propose | _STRONG],
        mass[propose] + mass[propose | _STRONG],
        n[propose | _STRONG],
        n[held] + n[held | _STRONG],
        mass[held] + mass[held | _STRONG],
        n[held | _STRONG],
        n[near] + n[near | _STRONG],
    )


def _summed(n_latents: int, n_values: int, key: np.ndarray, columns: Sequence[np.ndarray]) -> Counts:
    """The table of pairs that may come several times."""
    if n_latents * n_values <= _DENSE:
        dense = [np.bincount(key, weights=c, minlength=n_latents * n_values) for c in columns]
        key = np.flatnonzero(np.bincount(key, minlength=n_latents * n_values))
        summed: tuple[np.ndarray, ...] = tuple(c[key] for c in dense)
    else:
        narrow = key.astype(np.uint32) if n_latents * n_values < 1 << 32 else key  # sorts in half the time
        order = np.argsort(narrow, kind="stable")
        key = key[order]
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        sums: Callable[[np.ndarray], np.ndarray] = (
            (lambda c: np.add.reduceat(c[order], starts)) if len(key) else lambda c: c
        )
        key, summed = key[starts], tuple(sums(c) for c in columns)
    return Counts(n_latents=n_latents, n_values=n_values, key=key, columns=summed)
