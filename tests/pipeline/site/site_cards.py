"""Feature cards read back from a site folder: what a page shows, as Python values.

    cards = Cards.open("artifacts/laptop/atlas/site")
    card = cards.card("L12/402")
    card.examples[0].tokens, card.examples[0].values

This is the second reader of the shard format (the app is the first); tests hold it against the
tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from featureflow.errors import Command, UserError
from featureflow.sites import parse_feature
from pipeline.describe.columns import PAD
from pipeline.describe.vocabulary import Vocabulary
from pipeline.site.shards import Shard, read_shard

READABLE = (1, 2)  # format versions; cards are the same in both


@dataclass(frozen=True, kw_only=True)
class Example:
    """A window of text: token ids, the feature's activation on each (0 unless it fires), and where
    the peak is."""

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

    feature: str
    labels: tuple[Mapping[str, Any], ...]
    numbers: Mapping[str, np.ndarray]
    examples: tuple[Example, ...]

    def ids(self, name: str) -> list[int]:
        """A padded list of ids (tokens, neighbours) without its padding."""
        return [int(i) for i in self.numbers[name] if int(i) != PAD]


class Cards:
    """The cards of one site folder. Shards are kept once read, a few dozen at a time."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        self.folder = folder
        self.manifest = manifest
        self._shard = lru_cache(maxsize=64)(lambda key: read_shard(folder, key))

    @classmethod
    def open(cls, folder: str | Path) -> Cards:
        """Open `site/`. Raises UserError when it is no atlas or one of another version."""
        manifest = read_shard(Path(folder), "manifest").json
        if manifest.get("format") != "featureflow-atlas" or manifest.get("version") not in READABLE:
            raise UserError(
                "an atlas of another version",
                where=str(folder),
                expected=f"version {READABLE[-1]}",
                found=str(manifest.get("version")),
                fix=Command("atlas", force=True),
            )
        return cls(Path(folder), manifest)

    @cached_property
    def sites(self) -> dict[str, Mapping[str, Any]]:
        """The manifest's entries by short name."""
        return {site["short"]: site for site in self.manifest["sites"]}

    @cached_property
    def vocabulary(self) -> Vocabulary:
        shard = self._shard("vocab")
        offset, blob = shard.columns["offset"].tolist(), shard.columns["bytes"].tobytes()
        tokens = [blob[a:b] for a, b in pairwise(offset)]
        return Vocabulary(tokens=tokens, special=frozenset(shard.json["special"]))

    def card(self, feature: str) -> Card:
        """One card by feature id. Raises UserError for a feature that the atlas does not have."""
        wanted = parse_feature(feature)
        entry = self.sites.get(wanted.site.short)
        if entry is None or wanted.latent >= entry["n_latents"]:
            raise UserError(f"the atlas has no feature {feature}", expected=", ".join(self.sites))
        size = int(self.manifest["cards_per_shard"])
        shard = self._shard(f"sites/{wanted.site.short}/cards/{wanted.latent // size:03d}")
        return self._card(wanted.site.short, shard, wanted.latent % size)

    def iter_site(self, short: str) -> Iterator[Card]:
        """All cards of a site in order."""
        for latent in range(self.sites[short]["n_latents"]):
            yield self.card(f"{short}/{latent}")

    @cached_property
    def _token(self) -> np.ndarray:
        n = int(self.manifest["corpus"]["n_shards"])
        return np.concatenate([self._shard(f"corpus/{i:03d}").columns["token"] for i in range(n)])

    @cached_property
    def _run_row(self) -> np.ndarray:
        return self._shard("corpus/documents").columns["run_row"].astype(np.int64)

    def _card(self, short: str, shard: Shard, r: int) -> Card:
        c, n = shard.columns, shard.json["n"]
        first, last = int(c["example_offset"][r]), int(c["example_offset"][r + 1])
        skip = ("example_offset", "act_offset")
        return Card(
            feature=f"{short}/{shard.json['first'] + r}",
            labels=tuple(shard.json["labels"][r]),
            numbers={
                k: a[r]
                for k, a in c.items()
                if len(a) == n and k not in skip and not k.startswith(("example_", "act_"))
            },
            examples=tuple(self._example(shard, e, float(c["max"][r])) for e in range(first, last)),
        )

    def _example(self, shard: Shard, e: int, largest: float) -> Example:
        c, reach = shard.columns, int(self.manifest["window"])
        row = int(c["example_row"][e])
        run = int(np.searchsorted(self._run_row, row, side="right")) - 1
        low, high = (
            max(int(self._run_row[run]), row - reach),
            min(int(self._run_row[run + 1]), row + reach + 1),
        )
        values = np.zeros(high - low)
        acts = slice(int(c["act_offset"][e]), int(c["act_offset"][e + 1]))
        values[row - low + c["act_at"][acts].astype(int)] = c["act_value"][acts] / 255 * largest
        gap, decile = float(c["example_gap"][e]), int(c["example_decile"][e])
        return Example(
            tab=self.manifest["example_tabs"][int(c["example_tab"][e])],
            decile=None if decile == 255 else decile,
            row=row,
            value=float(c["example_value"][e]),
            gap=None if np.isnan(gap) else gap,
            tokens=tuple(int(t) for t in self._token[low:high]),
            values=tuple(float(v) for v in values),
            peak=row - low,
        )
