"""One pass over a site: everything the atlas says about its latents, in bounded and mergeable
state.

For every chunk of rows (cut where documents end):

1. read the kept rows, encode them: firings and near-misses  pipeline/describe/firings.py
2. counts, Σa, Σa², maximum, documents; log₂ histogram (four bins an octave)
3. top examples, near-misses just below the threshold, a uniform sample of firings
   pipeline/describe/selection.py
4. firings by token, previous token, next token, position, source and topic
   pipeline/describe/counts.py
5. co-firing inside the dictionary, on a fixed random share of the rows

State: latents × (places × (window + 20 B) + bins) plus the pairs (latent, token) seen, pruned
beyond `MOST_PAIRS`. Surveys of
disjoint rows merge, so a site may be spread over workers. Cost: about one product of `row × d_in ×
latent`; the bookkeeping is
a few sorts of the firings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float32, Float64, Int64

from featureflow.progress import Progress, silent
from pipeline.describe.corpus import ATTRIBUTES, Corpus, mix
from pipeline.describe.counts import Counts, Entries, RowValues, count
from pipeline.describe.firings import Encoder, Firings
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
    """How many examples are kept. `n_uniform` firings also serve the examples by decile."""

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
        """Nothing seen yet. `strong` is from where on each latent's firing counts as strong; None:
        always."""

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

    def add(self, fired: Firings, near: Firings, corpus: Corpus) -> None:
        """Take in the firings and near-misses of rows not seen before."""
        self._add_moments(fired, corpus)
        self.top.offer(fired, falling(fired.value), corpus, fired)
        self.uniform.offer(fired, random_key(fired, self.options.seed), corpus, fired)
        self.near.offer(near, falling(1.0 - near.gap), corpus, fired)  # the closest to firing first
        self._add_counts(fired, near, corpus)
        self._add_cofiring(fired, corpus)

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

    def _add_moments(self, fired: Firings, corpus: Corpus) -> None:
        f, a = fired.latent, fired.value.astype(np.float64)
        self.count += np.diff(fired.start)
        self.total += np.bincount(f, weights=a, minlength=self.n_latents)
        self.squares += np.bincount(f, weights=a * a, minlength=self.n_latents)
        busy = np.flatnonzero(np.diff(fired.start))
        if len(busy):
            self.largest[busy] = np.maximum(
                self.largest[busy], np.maximum.reduceat(fired.value, fired.start[busy])
            )
        bins = np.bincount(
            f.astype(np.int64) * N_BINS + bin_of(fired.value), minlength=self.n_latents * N_BINS
        )
        self.histogram += bins.reshape(self.n_latents, N_BINS)
        if len(fired):
            document = corpus.document[fired.row]
            new = np.concatenate([[True], (np.diff(f) != 0) | (np.diff(document) != 0)])
            self.n_documents += np.bincount(f[new], minlength=self.n_latents)

    def _add_cofiring(self, fired: Firings, corpus: Corpus) -> None:
        share = min(1.0, self.options.cofiring_rows / max(1, corpus.n_kept))
        chosen = (mix(fired.row.astype(np.uint64) + np.uint64(7)) >> np.uint64(11)).astype(
            np.float64
        ) < share * 2.0**53
        rows, index = np.unique(fired.row[chosen], return_inverse=True)
        latent = fired.latent[chosen]
        pattern = sp.csr_matrix(
            (np.ones(len(latent), np.float32), (latent, index)), shape=(self.n_latents, len(rows))
        )
        self.cofiring = (self.cofiring + pattern @ pattern.T).tocsr()
        self.cofiring_count += np.bincount(latent, minlength=self.n_latents)

    def tables(self, corpus: Corpus) -> dict[str, Counts]:
        """Firings by attribute. Entries that wait are counted first."""
        if self._waiting:
            rows = {
                name: RowValues(of_row=corpus.attribute(name), n_values=corpus.n_values(name))
                for name in ATTRIBUTES
            }
            for name, table in count(self._waiting, rows, self.n_latents).items():
                self._grow(name, table)
            self._waiting.clear()
        return self.counted

    def _add_counts(self, fired: Firings, near: Firings, corpus: Corpus) -> None:
        self._waiting += [
            Entries.of_firings(fired, corpus.part, self.strong),
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


def survey_site(
    rows: Rows,
    encoder: Encoder,
    corpus: Corpus,
    options: SurveyOptions,
    *,
    progress: Progress = silent,
    label: str = "survey",
) -> Survey:
    """Survey every kept row of the corpus, chunk by chunk."""
    strong = strong_from(rows, encoder, corpus)
    survey = Survey.empty(encoder.sae.n_latents, corpus, options, strong)
    for start, stop in corpus.chunks(CHUNK_ROWS):
        add_rows(survey, rows, encoder, corpus, start, stop)
        progress(label, stop, len(corpus))
    return survey


def add_rows(
    survey: Survey, rows: Rows, encoder: Encoder, corpus: Corpus, start: int, stop: int
) -> None:
    """Read, encode and take in the kept rows from `start` to `stop`."""
    kept = start + np.flatnonzero(corpus.kept[start:stop])
    x = rows(start, stop)
    if len(kept) != stop - start:
        x = x[kept - start]
    fired, near = encoder.firings(x, kept)
    survey.add(fired, near, corpus)
    survey.n_rows += len(kept)


def strong_from(rows: Rows, encoder: Encoder, corpus: Corpus) -> Float32[np.ndarray, "latent"]:
    """From where on a firing is among its latent's strongest tenth, estimated on PILOT_ROWS rows
    spread over the corpus before the pass; 0, so that every firing counts, for a latent that did
    not fire there."""
    n_parts = 8
    parts = []
    for part in range(n_parts):
        start = part * len(corpus) // n_parts
        stop = min(start + PILOT_ROWS // n_parts, (part + 1) * len(corpus) // n_parts)
        kept = start + np.flatnonzero(corpus.kept[start:stop])
        parts.append(encoder.firings(rows(start, stop)[kept - start], kept)[0])
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
