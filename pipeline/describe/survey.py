"""One pass over a site: everything the atlas says about its latents, in bounded and mergeable
state.

For every chunk of rows (cut where documents end):

1. read the kept rows, encode them: activations and near-misses  pipeline/describe/encoder.py
2. counts, Σa, Σa², maximum, documents; log₂ histogram (four bins an octave)
3. top examples, near-misses just below the threshold, a uniform sample of activations
   pipeline/describe/selection.py
4. activations by token, previous token, next token, position, source and topic
   pipeline/describe/counts.py
5. active together inside the dictionary, on a fixed random share of the rows

State: latents × (places × (window + 20 B) + bins) plus the pairs (latent, token) seen, pruned
beyond `MOST_PAIRS`. Surveys of
disjoint rows merge, so a site may be spread over workers. Cost: about one product of `row × d_in ×
latent`; the bookkeeping is
a few sorts of the activations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float32, Float64, Int64

from pipeline.describe.corpus import ATTRIBUTES, Corpus, mix
from pipeline.describe.counts import Counts, Entries, RowValues, count
from pipeline.describe.encoder import Activations, Encoder
from pipeline.describe.selection import Selection, falling, random_key

LOG2_LOW, BINS_PER_OCTAVE, N_BINS = -16, 4, 128
MOST_PAIRS = 24_000_000
COUNTED_AT_ONCE = 8_000_000
PRUNED_VALUES = 512
CHUNK_ROWS = 32768
PILOT_ROWS = 8192
REACH = 24

Rows = Callable[[int, int], Float32[np.ndarray, "row d_in"]]
"""`rows(start, stop)`: the activations of those corpus rows, as `ActivationStore.read` gives
them."""


@dataclass(frozen=True, kw_only=True)
class SurveyOptions:
    """How many examples are kept. `n_uniform` activations also serve the examples by decile."""

    n_top: int = 12
    n_near: int = 4
    n_uniform: int = 64
    cofiring_rows: int = 32768
    seed: int = 0


@dataclass(kw_only=True, eq=False)
class Survey:
    """What is known of every latent of one site after some rows."""

    options: SurveyOptions
    n_latents: int
    n_rows: int = 0
    count: Int64[np.ndarray, "latent"]
    total: Float64[np.ndarray, "latent"]
    squares: Float64[np.ndarray, "latent"]
    largest: Float32[np.ndarray, "latent"]
    n_documents: Int64[np.ndarray, "latent"]
    histogram: Int64[np.ndarray, "latent bin"]
    top: Selection
    near: Selection
    uniform: Selection
    counted: dict[str, Counts]
    strong: Float32[np.ndarray, "latent"]
    cofiring: sp.csr_matrix
    cofiring_count: Int64[np.ndarray, "latent"]
    pruned: list[str] = field(default_factory=list)
    _waiting: list[Entries] = field(default_factory=list)

    @classmethod
    def empty(
        cls,
        n_latents: int,
        corpus: Corpus,
        options: SurveyOptions,
        strong: Float32[np.ndarray, "latent"] | None = None,
    ) -> Survey:
        """Nothing seen yet. `strong` is from where on each latent's activation counts as strong;
        None: always."""

        def selection(size: int, distinct: bool) -> Selection:
            return Selection.empty(n_latents, size, reach=REACH, distinct=distinct)

        return cls(
            options=options,
            n_latents=n_latents,
            strong=np.zeros(n_latents, np.float32) if strong is None else strong,
            count=np.zeros(n_latents, np.int64),
            total=np.zeros(n_latents),
            squares=np.zeros(n_latents),
            largest=np.zeros(n_latents, np.float32),
            n_documents=np.zeros(n_latents, np.int64),
            histogram=np.zeros((n_latents, N_BINS), np.int64),
            top=selection(options.n_top, True),
            near=selection(options.n_near, True),
            uniform=selection(options.n_uniform, False),
            counted={name: Counts.empty(n_latents, corpus.n_values(name)) for name in ATTRIBUTES},
            cofiring=sp.csr_matrix((n_latents, n_latents), dtype=np.float32),
            cofiring_count=np.zeros(n_latents, np.int64),
        )

    def add(self, active: Activations, near: Activations, corpus: Corpus) -> None:
        """Take in the activations and near-misses of rows not seen before."""
        self._add_moments(active, corpus)
        self.top.offer(active, falling(active.value), corpus, active)
        self.uniform.offer(active, random_key(active, self.options.seed), corpus, active)
        self.near.offer(near, falling(1.0 - near.gap), corpus, active)  # the closest first
        self._add_counts(active, near, corpus)
        self._add_cofiring(active, corpus)

    def merge(self, other: Survey, corpus: Corpus) -> Survey:
        """The survey over both sets of rows, which must be disjoint and cut between documents."""
        theirs = other.tables(corpus)
        return Survey(
            options=self.options,
            n_latents=self.n_latents,
            n_rows=self.n_rows + other.n_rows,
            strong=self.strong,
            largest=np.maximum(self.largest, other.largest),
            cofiring=(self.cofiring + other.cofiring).tocsr(),
            pruned=sorted({*self.pruned, *other.pruned}),
            counted={name: table.plus(theirs[name]) for name, table in self.tables(corpus).items()},
            **{n: getattr(self, n) + getattr(other, n) for n in _SUMS},
            **{
                n: getattr(self, n).merge(getattr(other, n), corpus)
                for n in ("top", "near", "uniform")
            },
        )

    def _add_moments(self, active: Activations, corpus: Corpus) -> None:
        f, a = active.latent, active.value.astype(np.float64)
        self.count += np.diff(active.start)
        self.total += np.bincount(f, weights=a, minlength=self.n_latents)
        self.squares += np.bincount(f, weights=a * a, minlength=self.n_latents)
        busy = np.flatnonzero(np.diff(active.start))
        if len(busy):
            self.largest[busy] = np.maximum(
                self.largest[busy], np.maximum.reduceat(active.value, active.start[busy])
            )
        bins = np.bincount(
            f.astype(np.int64) * N_BINS + bin_of(active.value), minlength=self.n_latents * N_BINS
        )
        self.histogram += bins.reshape(self.n_latents, N_BINS)
        if len(active):
            document = corpus.document[active.row]
            new = np.concatenate([[True], (np.diff(f) != 0) | (np.diff(document) != 0)])
            self.n_documents += np.bincount(f[new], minlength=self.n_latents)

    def _add_cofiring(self, active: Activations, corpus: Corpus) -> None:
        share = min(1.0, self.options.cofiring_rows / max(1, corpus.n_kept))
        chosen = (mix(active.row.astype(np.uint64) + np.uint64(7)) >> np.uint64(11)).astype(
            np.float64
        ) < share * 2.0**53
        rows, index = np.unique(active.row[chosen], return_inverse=True)
        latent = active.latent[chosen]
        pattern = sp.csr_matrix(
            (np.ones(len(latent), np.float32), (latent, index)), shape=(self.n_latents, len(rows))
        )
        self.cofiring = (self.cofiring + pattern @ pattern.T).tocsr()
        self.cofiring_count += np.bincount(latent, minlength=self.n_latents)

    def tables(self, corpus: Corpus) -> dict[str, Counts]:
        """Activations by attribute. Entries that wait are counted first."""
        if self._waiting:
            rows = {
                name: RowValues(of_row=corpus.attribute(name), n_values=corpus.n_values(name))
                for name in ATTRIBUTES
            }
            for name, table in count(self._waiting, rows, self.n_latents).items():
                self._grow(name, table)
            self._waiting.clear()
        return self.counted

    def _add_counts(self, active: Activations, near: Activations, corpus: Corpus) -> None:
        self._waiting += [
            Entries.of_active(active, corpus.part, self.strong),
            Entries.of_near_misses(near, corpus.part),
        ]
        if sum(map(len, self._waiting)) > COUNTED_AT_ONCE:
            self.tables(corpus)

    def _grow(self, name: str, table: Counts) -> None:
        grown = self.counted[name].plus(table) if len(self.counted[name].key) else table
        if len(grown.key) > MOST_PAIRS:
            grown = grown.pruned(PRUNED_VALUES)
            self.pruned = sorted({*self.pruned, name})
        self.counted[name] = grown


_SUMS = ("count", "total", "squares", "n_documents", "histogram", "cofiring_count")


def survey_site(rows: Rows, encoder: Encoder, corpus: Corpus, options: SurveyOptions) -> Survey:
    """Survey every kept row of the corpus, chunk by chunk."""
    strong = strong_from(rows, encoder, corpus)
    survey = Survey.empty(encoder.sae.n_latents, corpus, options, strong)
    for start, stop in corpus.chunks(CHUNK_ROWS):
        add_rows(survey, rows, encoder, corpus, start, stop)
    return survey


def add_rows(
    survey: Survey, rows: Rows, encoder: Encoder, corpus: Corpus, start: int, stop: int
) -> None:
    """Read, encode and take in the kept rows from `start` to `stop`."""
    kept = start + np.flatnonzero(corpus.kept[start:stop])
    x = rows(start, stop)
    if len(kept) != stop - start:
        x = x[kept - start]
    active, near = encoder.activations(x, kept)
    survey.add(active, near, corpus)
    survey.n_rows += len(kept)


def strong_from(rows: Rows, encoder: Encoder, corpus: Corpus) -> Float32[np.ndarray, "latent"]:
    """From where on an activation is among its latent's strongest tenth, estimated on PILOT_ROWS
    rows spread over the corpus before the pass; 0, so that every activation counts, for a latent
    that was not active there."""
    n_parts = 8
    parts = []
    for part in range(n_parts):
        start = part * len(corpus) // n_parts
        stop = min(start + PILOT_ROWS // n_parts, (part + 1) * len(corpus) // n_parts)
        kept = start + np.flatnonzero(corpus.kept[start:stop])
        parts.append(encoder.activations(rows(start, stop)[kept - start], kept)[0])
    latent = np.concatenate([p.latent for p in parts])
    value = np.concatenate([p.value for p in parts])
    order = np.lexsort((value, latent))
    first = np.searchsorted(latent[order], np.arange(encoder.sae.n_latents + 1))
    n = np.diff(first)
    place = first[:-1] + np.maximum(np.floor(0.9 * n).astype(np.int64), 0)
    strong = np.zeros(len(n), np.float32)
    strong[n > 0] = value[order][place[n > 0]]
    return strong


def bin_of(value: Float32[np.ndarray, "entry"]) -> Int64[np.ndarray, "entry"]:
    """The histogram bin of each positive value; the end bins are open."""
    bins = np.floor((np.log2(np.maximum(value, 1e-30)) - LOG2_LOW) * BINS_PER_OCTAVE)
    return np.clip(bins, 0, N_BINS - 1).astype(np.int64)
