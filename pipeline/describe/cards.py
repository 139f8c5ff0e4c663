"""A feature's card: labels, numbers and examples as Python values; exports are made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from featureflow.sites import FeatureId
from pipeline.describe.columns import PAD, Columns
from pipeline.describe.corpus import Corpus
from pipeline.describe.examples import NO_DECILE, TABS
from pipeline.describe.labels import Label
from pipeline.describe.survey import REACH


@dataclass(frozen=True, kw_only=True)
class Example:
    """A window of text: token ids, the feature's activation on each (0 where it is silent), and
    where the peak is."""

    tab: str
    decile: int | None
    row: int
    value: float
    gap: float | None
    tokens: tuple[int, ...]
    values: tuple[float, ...]
    peak: int


@dataclass(frozen=True, kw_only=True)
class Card:
    """One feature: its labels, its numbers by name, and its examples in the order of the page."""

    feature: FeatureId
    labels: list[Label]
    numbers: Mapping[str, np.ndarray]
    examples: tuple[Example, ...]

    def ids(self, name: str) -> list[int]:
        """A padded list of ids (tokens, neighbours) without its padding."""
        return [int(i) for i in self.numbers[name] if int(i) != PAD]


def card_of(feature: FeatureId, columns: Columns, labels: list[Label], corpus: Corpus) -> Card:
    """The card of one latent out of the columns of its site."""
    r, skipped = feature.latent, ("example_", "act_")
    first, last = (int(i) for i in columns["example_offset"][r : r + 2])
    largest = float(columns["max"][r])
    return Card(
        feature=feature,
        labels=labels,
        numbers={name: a[r] for name, a in columns.items() if not name.startswith(skipped)},
        examples=tuple(_example(columns, e, largest, corpus) for e in range(first, last)),
    )


def _example(c: Columns, e: int, largest: float, corpus: Corpus) -> Example:
    row = int(c["example_row"][e])
    rows = corpus.window(row, REACH)
    values = np.zeros(len(rows))
    acts = slice(*(int(i) for i in c["act_offset"][e : e + 2]))
    values[row - rows[0] + c["act_at"][acts].astype(int)] = c["act_value"][acts] / 255 * largest
    gap, decile = float(c["example_gap"][e]), int(c["example_decile"][e])
    return Example(
        tab=TABS[c["example_tab"][e]],
        decile=None if decile == NO_DECILE else decile,
        row=row,
        value=float(c["example_value"][e]),
        gap=None if np.isnan(gap) else gap,
        tokens=tuple(corpus.token[rows].tolist()),
        values=tuple(values.tolist()),
        peak=row - int(rows[0]),
    )
