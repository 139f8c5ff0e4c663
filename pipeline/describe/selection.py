"""The examples kept for every latent, in bounded and mergeable state.

A `Selection` keeps, per latent, the `size` entries with the smallest order key:

- top examples and near-misses: the key falls with the value, and entries must be *distinct*: one
  per document (its strongest), then one per digest of the surrounding tokens;
- a uniform sample of activations: the key is a hash of latent and row, so the smallest keys are a
  uniform sample without replacement, whatever the order of the chunks, and two halves merge
  exactly.

With each entry goes the activity of its latent within `reach` rows, as a ratio to the entry's value
(float16). State: latents × size × (2·reach + 20) bytes. Offering n entries costs one sort of those
that beat the worst kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float16, Float32, Int32, Int64, UInt32, UInt64

from pipeline.describe.corpus import Corpus, mix
from pipeline.describe.encoder import Activations

EMPTY = np.uint32(0xFFFFFFFF)


@dataclass(kw_only=True, eq=False)
class Selection:
    """Per latent and place: order key (EMPTY in free places), row, value, gap, and activity
    around."""

    distinct: bool
    key: UInt32[np.ndarray, "latent place"]
    row: Int64[np.ndarray, "latent place"]
    value: Float32[np.ndarray, "latent place"]
    gap: Float32[np.ndarray, "latent place"]
    around: Float16[np.ndarray, "latent place window"]

    @classmethod
    def empty(cls, n_latents: int, size: int, *, reach: int, distinct: bool) -> Selection:
        shape = (n_latents, size)
        return cls(
            distinct=distinct,
            key=np.full(shape, EMPTY, dtype=np.uint32),
            row=np.full(shape, -1, dtype=np.int64),
            value=np.zeros(shape, dtype=np.float32),
            gap=np.full(shape, np.nan, dtype=np.float32),
            around=np.zeros((*shape, 2 * reach + 1), dtype=np.float16),
        )

    @property
    def size(self) -> int:
        return self.key.shape[1]

    @property
    def filled(self) -> Bool[np.ndarray, "latent place"]:
        return self.row >= 0

    def offer(
        self,
        entries: Activations,
        key: UInt32[np.ndarray, "entry"],
        corpus: Corpus,
        active: Activations,
    ) -> None:
        """Let `entries`, of later rows than those offered before, compete for places. `active` are
        the activations of the same rows, for the activity around."""
        chosen = np.flatnonzero(key < self._worst()[entries.latent])
        if self.distinct:
            chosen = chosen[
                _best_of_document(
                    entries.latent[chosen], corpus.document[entries.row[chosen]], key[chosen]
                )
            ]
        else:
            chosen = chosen[_among_smallest(entries.latent[chosen], key[chosen], self.size)]
        latent, row = entries.latent[chosen], entries.row[chosen]
        old_latent, old_place = np.nonzero(self.filled)
        all_latent = np.concatenate([old_latent, latent])
        all_row = np.concatenate([self.row[old_latent, old_place], row])
        all_key = np.concatenate([self.key[old_latent, old_place], key[chosen]])
        # of equal keys the earlier row comes first, since rows are offered in their order
        order = np.argsort((all_latent.astype(np.uint64) << np.uint64(32)) | all_key, kind="stable")
        if self.distinct:
            order = _distinct(order, all_latent, all_row, corpus)
        order, place = _first_places(order, all_latent, self.size)
        self._rebuild(
            order, place, all_latent, old_latent, old_place, entries, chosen, key, corpus, active
        )

    def merge(self, other: Selection, corpus: Corpus) -> Selection:
        """The selection over both sets of rows."""
        merged = Selection.empty(
            len(self.key), self.size, reach=self.around.shape[2] // 2, distinct=self.distinct
        )
        picks: list[tuple[Selection, np.ndarray, np.ndarray]] = []
        for s in (self, other):
            places = np.nonzero(s.filled)
            picks.append((s, places[0], places[1]))
        latent = np.concatenate([p[1] for p in picks])
        row = np.concatenate([s.row[i, j] for s, i, j in picks])
        order = np.lexsort((row, np.concatenate([s.key[i, j] for s, i, j in picks]), latent))
        if self.distinct:
            order = _distinct(order, latent, row, corpus)
        order, place = _first_places(order, latent, self.size)
        for name in ("key", "row", "value", "gap", "around"):
            joined = np.concatenate([getattr(s, name)[i, j] for s, i, j in picks])
            getattr(merged, name)[latent[order], place] = joined[order]
        return merged

    def _worst(self) -> UInt64[np.ndarray, "latent"]:
        """Keys below this may enter; with free places every key may (64 bits, so that EMPTY itself
        may too)."""
        worst = self.key.max(axis=1).astype(np.uint64)
        return np.where(self.filled.all(axis=1), worst, np.uint64(1 << 32))

    def _rebuild(
        self,
        order: np.ndarray,
        place: np.ndarray,
        latent: np.ndarray,
        old_latent: np.ndarray,
        old_place: np.ndarray,
        entries: Activations,
        chosen: np.ndarray,
        key: np.ndarray,
        corpus: Corpus,
        active: Activations,
    ) -> None:
        """Write the winners: old ones move to their new place, new ones come in with the activity
        around them."""
        fresh = Selection.empty(
            len(self.key), self.size, reach=self.around.shape[2] // 2, distinct=self.distinct
        )
        stays = order < len(old_latent)
        source = (old_latent[order[stays]], old_place[order[stays]])
        target = (latent[order[stays]], place[stays])
        for name in ("key", "row", "value", "gap", "around"):
            getattr(fresh, name)[target] = getattr(self, name)[source]
        new = chosen[order[~stays] - len(old_latent)]
        target = (latent[order[~stays]], place[~stays])
        fresh.key[target], fresh.row[target], fresh.value[target] = (
            key[new],
            entries.row[new],
            entries.value[new],
        )
        fresh.gap[target] = entries.gap[new]
        fresh.around[target] = activity_around(
            active,
            entries.latent[new],
            entries.row[new],
            entries.value[new],
            corpus,
            reach=self.around.shape[2] // 2,
        )
        self.__dict__.update(fresh.__dict__)


def falling(value: Float32[np.ndarray, "entry"]) -> UInt32[np.ndarray, "entry"]:
    """A key that orders positive values from the largest down: the complement of their bits."""
    return ~np.ascontiguousarray(value, np.float32).view(np.uint32)


def random_key(entries: Activations, seed: int) -> UInt32[np.ndarray, "entry"]:
    """A key that depends on latent, row and seed only and looks uniform."""
    with np.errstate(over="ignore"):
        x = entries.row.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + entries.latent.astype(
            np.uint64
        )
        return (mix(x + np.uint64(seed) * np.uint64(0xD1342543DE82EF95)) >> np.uint64(33)).astype(
            np.uint32
        )


def activity_around(
    active: Activations,
    latent: Int32[np.ndarray, "example"],
    row: Int64[np.ndarray, "example"],
    value: Float32[np.ndarray, "example"],
    corpus: Corpus,
    *,
    reach: int,
) -> Float16[np.ndarray, "example window"]:
    """The latent's own activations within `reach` rows in the same run, as ratios to `value`."""
    out = np.zeros((len(row), 2 * reach + 1), dtype=np.float16)
    if not len(active) or not len(row):
        return out
    key = (latent.astype(np.int64) << 40) | row
    low = np.searchsorted(active.key, key - reach)
    high = np.searchsorted(active.key, key + reach, side="right")
    example = np.repeat(np.arange(len(row)), high - low)
    entry = (
        np.arange(len(example))
        - np.repeat((high - low).cumsum() - (high - low), high - low)
        + low[example]
    )
    same = (active.latent[entry] == latent[example]) & (
        corpus.run[active.row[entry]] == corpus.run[row[example]]
    )
    example, entry = example[same], entry[same]
    ratio = active.value[entry] / value[example]
    out[example, active.row[entry] - row[example] + reach] = np.minimum(ratio, 60000.0)
    return out


def _best_of_document(
    latent: Int32[np.ndarray, "entry"],
    document: Int32[np.ndarray, "entry"],
    key: UInt32[np.ndarray, "entry"],
) -> Int64[np.ndarray, "best"]:
    """Index of the smallest key in every stretch of one latent and document; the first of
    equals."""
    if not len(latent):
        return np.zeros(0, dtype=np.int64)
    change = np.ones(len(latent), dtype=bool)
    change[1:] = (np.diff(latent) != 0) | (np.diff(document) != 0)
    starts = np.flatnonzero(change)
    smallest = np.minimum.reduceat(key, starts)
    hit = np.flatnonzero(key == smallest[change.cumsum() - 1])
    stretch = (change.cumsum() - 1)[hit]
    return hit[np.concatenate([[True], np.diff(stretch) != 0])]


def _distinct(
    order: Int64[np.ndarray, "entry"],
    latent: np.ndarray,
    row: Int64[np.ndarray, "entry"],
    corpus: Corpus,
) -> Int64[np.ndarray, "kept"]:
    """Of an ordering, what remains when each document, and then each digest, is used once per
    latent."""
    document = (latent.astype(np.uint64) << np.uint64(32)) | corpus.document[row].astype(np.uint64)
    order = order[_first_of(document[order])]
    with np.errstate(over="ignore"):
        digest = mix(corpus.digest[row] + latent.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return order[_first_of(digest[order])]


def _among_smallest(
    latent: Int32[np.ndarray, "entry"], key: UInt32[np.ndarray, "entry"], n: int
) -> Bool[np.ndarray, "entry"]:
    """Marks the n smallest keys of every latent, with all that equal the n-th: most entries need no
    further sorting. `latent` is ascending."""
    if not len(latent):
        return np.zeros(0, dtype=bool)
    packed = (latent.astype(np.uint64) << np.uint64(32)) | key
    packed.sort()
    start = np.searchsorted(latent, np.arange(int(latent[-1]) + 2))
    nth = packed[np.maximum(np.minimum(start[:-1] + n, start[1:]) - 1, 0)].astype(np.uint32)
    return key <= nth[latent]


def _first_of(group: UInt64[np.ndarray, "entry"]) -> Bool[np.ndarray, "entry"]:
    """Marks the first entry of every group, in the given order. Most groups have one entry: a sort
    of the plain numbers finds the others, and only these are looked at by place."""
    first = np.ones(len(group), dtype=bool)
    ordered = np.sort(group)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if not len(repeated):
        return first
    place = np.minimum(np.searchsorted(repeated, group), len(repeated) - 1)
    several = np.flatnonzero(repeated[place] == group)
    order = np.argsort(place[several], kind="stable")
    first[several[order[1:]]] = np.diff(place[several][order]) != 0
    return first


def _first_places(
    order: Int64[np.ndarray, "entry"], latent: np.ndarray, size: int
) -> tuple[Int64[np.ndarray, "kept"], Int64[np.ndarray, "kept"]]:
    """The first `size` entries of every latent, and which place each takes. `order` is sorted by
    latent."""
    sorted_latent = latent[order]
    start = np.searchsorted(
        sorted_latent, np.arange(int(sorted_latent[-1]) + 1 if len(order) else 0)
    )
    place = np.arange(len(order)) - start[sorted_latent]
    keep = place < size
    return order[keep], place[keep]
