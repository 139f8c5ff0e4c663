"""Counts of activations by latent and by something about the token: which it is, which came before,
where it stands.

Every attribute of a token position is a partition of the rows, so one kind of table serves
statistics, labels and their scores. Per (latent, value) there are nine numbers, all additive:

    n_propose, strong_propose        activations and strong activations on documents where labels
    are
    proposed
    n_choose, strong_choose          the same on documents that decide which label is taken
    n_held, strong_held              the same on held-out documents
    mass_held, near_held             Σa and near-misses on held-out documents
    mass_rest                        Σa on all others

A rule is about all activations or about strong ones (`Counts.about`); then five numbers matter:
activations on each part of the documents, Σa held out, and the negatives that are hardest to tell:
near-misses, or activations that are not strong.

`Counts` is sparse: sorted unique keys `latent · n_values + value`. Entries are counted latent by
latent into one small table (pipeline/describe/loops.py). Tables merge by sums, so chunks, workers
and machines may be joined in any order; since merging costs more than counting, entries are
collected (`Entries.joined`) until there are many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, UInt8, UInt32

from pipeline.describe.corpus import HELD_OUT
from pipeline.describe.encoder import Activations
from pipeline.describe.loops import by_latent, count_values

COLUMNS = (
    "n_propose",
    "strong_propose",
    "n_choose",
    "strong_choose",
    "n_held",
    "strong_held",
    "mass_held",
    "near_held",
    "mass_rest",
)
PROPOSE, CHOOSE, HELD, MASS, NEGATIVE = range(5)
Target = Literal["all", "strong"]
_NEAR = 6
_AT_ONCE = 1 << 20
_DENSE = 1 << 21


@dataclass(frozen=True, kw_only=True, eq=False)
class Counts:
    """Rows sorted by latent, then value. `columns[i]` is COLUMNS[i], or one of the five of a
    target."""

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

    @property
    def n(self) -> Float64[np.ndarray, "pair"]:
        """Activations on all documents."""
        return self.column("n_propose") + self.column("n_choose") + self.column("n_held")

    @property
    def mass(self) -> Float64[np.ndarray, "pair"]:
        """Σa on all documents."""
        return self.column("mass_held") + self.column("mass_rest")

    def totals(self) -> Float64[np.ndarray, "latent column"]:
        """The sums over all values."""
        parts = [
            np.bincount(self.latent, weights=c, minlength=self.n_latents) for c in self.columns
        ]
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
        """The columns PROPOSE, CHOOSE, HELD, MASS, NEGATIVE of rules about all activations, or
        about strong ones."""
        if target == "all":
            names = ("n_propose", "n_choose", "n_held", "mass_held", "near_held")
            chosen = tuple(self.column(name) for name in names)
        else:
            propose, choose, held = (
                self.column(name) for name in ("strong_propose", "strong_choose", "strong_held")
            )
            chosen = (propose, choose, held, np.zeros(len(held)), self.column("n_held") - held)
        return Counts(
            n_latents=self.n_latents, n_values=self.n_values, key=self.key, columns=chosen
        )

    def mapped(self, value_of: Int32[np.ndarray, "value"], n_values: int) -> Counts:
        """The table of a coarser attribute: `value_of[v]` is what v becomes, −1 to drop it."""
        coarse = value_of[self.value]
        keep = slice(None) if coarse.min(initial=0) >= 0 else coarse >= 0
        key = self.latent[keep] * n_values + coarse[keep]
        return _summed(self.n_latents, n_values, key, [c[keep] for c in self.columns])

    def pruned(self, most: int) -> Counts:
        """At most `most` values per latent, the ones with the most activations: what keeps a table
        bounded. Sums over the rest are lost, so it is used only when a table has outgrown its
        limit."""
        order = np.lexsort((self.key, -self.n, self.latent))
        latent = self.latent[order]
        place = np.arange(len(order)) - self.start[latent]
        return self.taken(np.sort(order[place < most]))

    def taken(self, pairs: np.ndarray) -> Counts:
        """Some of the pairs, in order: a mask, or ascending indices."""
        columns = tuple(c[pairs] for c in self.columns)
        return Counts(
            n_latents=self.n_latents, n_values=self.n_values, key=self.key[pairs], columns=columns
        )

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
    """Activations, or near-misses, sorted by latent, with what is known of them whatever the
    attribute they are counted by. `code` is part · 2 + strong for activations, _NEAR for
    near-misses on held-out documents (others count for nothing)."""

    latent: Int32[np.ndarray, "entry"]
    row: UInt32[np.ndarray, "entry"]
    mass: Float32[np.ndarray, "entry"]
    code: UInt8[np.ndarray, "entry"]

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def of_active(
        cls,
        active: Activations,
        part: UInt8[np.ndarray, "row"],
        strong: Float32[np.ndarray, "latent"],
    ) -> Entries:
        """All activations; strong are those of at least `strong[latent]`."""
        code = part[active.row] * np.uint8(2) + (active.value >= strong[active.latent])
        return cls(
            latent=active.latent, row=active.row.astype(np.uint32), mass=active.value, code=code
        )

    @classmethod
    def of_near_misses(cls, near: Activations, part: UInt8[np.ndarray, "row"]) -> Entries:
        """Near-misses on held-out documents."""
        held = part[near.row] == HELD_OUT
        row = near.row[held].astype(np.uint32)
        code = np.full(len(row), _NEAR, dtype=np.uint8)
        return cls(latent=near.latent[held], row=row, mass=near.value[held], code=code)

    def between(self, low: int, high: int) -> Entries:
        """Those of latents from `low` to below `high`."""
        here = slice(*np.searchsorted(self.latent, [low, high]))
        return Entries(
            latent=self.latent[here], row=self.row[here], mass=self.mass[here], code=self.code[here]
        )

    def taken(self, order: Int64[np.ndarray, "entry"]) -> Entries:
        """Some of the entries, in this order."""
        return Entries(
            latent=self.latent[order],
            row=self.row[order],
            mass=self.mass[order],
            code=self.code[order],
        )

    @classmethod
    def joined(cls, parts: Sequence[Entries]) -> Entries:
        """All entries of at least one part, one part after the other."""
        names = ("latent", "row", "mass", "code")
        return cls(
            **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RowValues:
    """An attribute: its value for every row of the corpus, −1 for none, and how many values there
    are."""

    of_row: Int32[np.ndarray, "row"]
    n_values: int


def count(
    parts: Sequence[Entries], attributes: Mapping[str, RowValues], n_latents: int
) -> dict[str, Counts]:
    """The tables of some entries. Latents are taken a range at a time, of so few entries that
    everything stays in the processor's cache and in memory already at hand: fresh memory for large
    arrays costs as much as the counting."""
    pieces: dict[str, list[Counts]] = {name: [] for name in attributes}
    slots = {name: np.full(each.n_values, -1, np.int32) for name, each in attributes.items()}
    for low, high in _latent_ranges(sum(map(len, parts)), n_latents):
        entries = Entries.joined([part.between(low, high) for part in parts])
        start, order = np.zeros(high - low + 1, np.int64), np.empty(len(entries), np.int64)
        by_latent(entries.latent - np.int32(low), start, order)
        entries = entries.taken(order)
        for name, attribute in attributes.items():
            pieces[name].append(_count_range(entries, start, attribute.of_row, slots[name]))
    return {name: _joined(found, n_latents) for name, found in pieces.items()}


def _latent_ranges(n_entries: int, n_latents: int) -> Iterator[tuple[int, int]]:
    """Ranges of latents with about _AT_ONCE entries each."""
    size = max(1, n_latents * _AT_ONCE // max(n_entries, 1))
    return ((low, min(low + size, n_latents)) for low in range(0, n_latents, size))


def _count_range(
    entries: Entries,
    start: Int64[np.ndarray, "latent_and_one"],
    of_row: Int32[np.ndarray, "row"],
    slot: Int32[np.ndarray, "value"],
) -> Counts:
    """The pairs of some latents, numbered from 0, from their entries in order of latents."""
    n_latents, n_values = len(start) - 1, len(slot)
    most = min(len(entries), n_latents * n_values)
    key, columns = np.empty(most, np.int64), np.empty((len(COLUMNS), most))
    n = count_values(start, entries.row, entries.code, entries.mass, of_row, slot, key, columns)
    return Counts(
        n_latents=n_latents, n_values=n_values, key=key[:n], columns=tuple(columns[:, :n])
    )


def _joined(pieces: Sequence[Counts], n_latents: int) -> Counts:
    """Tables of ranges of latents, one after the other."""
    n_values = pieces[0].n_values
    first = np.cumsum([0, *(piece.n_latents for piece in pieces)])
    return Counts(
        n_latents=n_latents,
        n_values=n_values,
        key=np.concatenate(
            [piece.key + f * n_values for piece, f in zip(pieces, first[:-1], strict=True)]
        ),
        columns=tuple(
            np.concatenate(parts)
            for parts in zip(*(piece.columns for piece in pieces), strict=True)
        ),
    )


def _summed(
    n_latents: int, n_values: int, key: np.ndarray, columns: Sequence[np.ndarray]
) -> Counts:
    """The table of pairs that may come several times."""
    if n_latents * n_values <= _DENSE:
        dense = [np.bincount(key, weights=c, minlength=n_latents * n_values) for c in columns]
        key = np.flatnonzero(np.bincount(key, minlength=n_latents * n_values))
        summed: tuple[np.ndarray, ...] = tuple(c[key] for c in dense)
    else:
        narrow = (
            key.astype(np.uint32) if n_latents * n_values < 1 << 32 else key
        )  # sorts in half the time
        order = np.argsort(narrow, kind="stable")
        key = key[order]
        starts = np.flatnonzero(np.diff(key, prepend=-1))
        sums: Callable[[np.ndarray], np.ndarray] = (
            (lambda c: np.add.reduceat(c[order], starts)) if len(key) else lambda c: c
        )
        key, summed = key[starts], tuple(sums(c) for c in columns)
    return Counts(n_latents=n_latents, n_values=n_values, key=key, columns=summed)
