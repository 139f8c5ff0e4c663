"""The shards of one site: overview, labels, links, feature cards
(docs/decisions/0003-atlas-shards.md).

Every column of a card shard is a slice of the site's columns, so writing is slicing, gzip and
base64: about 0.4 ms a feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.describe.columns import Columns
from pipeline.describe.corpus import Corpus
from pipeline.describe.labels import METHOD_INDEX, Label, shown_text
from pipeline.site.graph import CLASSES, AtlasGraph, flow_shard, overview_columns
from pipeline.site.shards import Shard, rounded, write_shard

CARDS_PER_SHARD = 256
FLAG_ALIVE, FLAG_LABELLED, FLAG_ONE_TOKEN, FLAG_DENSE, FLAG_DYING, FLAG_TRUNK = 1, 2, 4, 8, 16, 32
_EXAMPLE_COLUMNS = ("example_tab", "example_decile", "example_row", "example_value", "example_gap")
_ACT_COLUMNS = ("act_at", "act_value")
_CSR = (*_EXAMPLE_COLUMNS, *_ACT_COLUMNS, "example_offset", "act_offset")
_BITS = dict.fromkeys(("decile", "example_value", "example_gap"), 12) | dict.fromkeys(
    (
        "token_share",
        "token_lift",
        "previous_share",
        "previous_lift",
        "promotes_score",
        "suppresses_score",
        "cofiring_jaccard",
        "similar_cosine",
    ),
    10,
)
_LABEL_FIELDS = (
    "score",
    "low",
    "high",
    "n",
    "precision",
    "recall",
    "mass_recall",
    "near_miss",
    "accepted",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class SitePages:
    """Everything known of one site, ready to be written. `labels[f]` are the labels of latent f,
    best first."""

    index: int
    short: str
    columns: Columns
    labels: list[list[Label]]
    graph: AtlasGraph | None
    trunk_starts: frozenset[int]
    corpus: Corpus

    @property
    def n_latents(self) -> int:
        return len(self.labels)

    @cached_property
    def shown(self) -> list[str]:
        """The one line of every latent."""
        return [
            shown_text(labels, "" if not labels or labels[0].accepted else self._example(latent))
            for latent, labels in enumerate(self.labels)
        ]

    def _example(self, latent: int) -> str:
        """The strongest example as a short text, its token between « »."""
        first, corpus = int(self.columns["example_offset"][latent]), self.corpus
        if first == int(self.columns["example_offset"][latent + 1]):
            return ""
        row = int(self.columns["example_row"][first])
        before, peak, after = corpus.pieces(row, before=6, after=3)
        space = " " * peak.startswith(" ")
        return " ".join(f"{before}{space}«{peak.removeprefix(' ')}»{after}".split())


def write_site(folder: Path, pages: SitePages) -> dict[str, Any]:
    """Write all shards of a site; returns its numbers for the manifest."""
    base = f"sites/{pages.short}"
    overview = overview_shard(pages)
    write_shard(folder, f"{base}/overview", overview)
    write_shard(folder, f"{base}/labels", labels_shard(pages))
    if pages.graph is not None:
        write_shard(folder, f"{base}/flow", flow_shard(pages.graph, pages.index))
    n_cards = -(-pages.n_latents // CARDS_PER_SHARD)
    for card in range(n_cards):
        write_shard(folder, f"{base}/cards/{card:03d}", card_shard(pages, card * CARDS_PER_SHARD))
    flags, classes = overview.columns["flags"], overview.columns["class"]
    alive = (flags & FLAG_ALIVE) > 0
    counted = np.bincount(classes[alive], minlength=len(CLASSES))
    return {
        "n_latents": pages.n_latents,
        "n_alive": int(alive.sum()),
        "n_labelled": int(((flags & FLAG_LABELLED) > 0).sum()),
        "n_cards": n_cards,
        "classes": {}
        if pages.graph is None
        else {n: int(c) for n, c in zip(CLASSES, counted, strict=True) if c},
        "n_dying": int(((flags & FLAG_DYING) > 0).sum()),
    }


def overview_shard(pages: SitePages) -> Shard:
    columns = pages.columns
    density = columns["count"] / max(1, pages.corpus.n_kept)
    return Shard(
        columns={
            "density": density.astype(np.float32),
            "max": columns["max"],
            **overview_columns(pages.graph, pages.index, pages.n_latents),
            "flags": _flags(pages, density),
        }
    )


def labels_shard(pages: SitePages) -> Shard:
    best = [labels[0] if labels else None for labels in pages.labels]
    method = [255 if label is None else METHOD_INDEX[label.method] for label in best]
    score = [
        255 if label is None or label.score is None else round(label.score * 254) for label in best
    ]
    return Shard(
        json={"labels": pages.shown},
        columns={
            "method": np.array(method, dtype=np.uint8),
            "score": np.array(score, dtype=np.uint8),
        },
    )


def card_shard(pages: SitePages, first: int) -> Shard:
    """The cards of 256 latents from `first` on."""
    last = min(first + CARDS_PER_SHARD, pages.n_latents)
    c = pages.columns
    plain = {
        name: _packed(name, np.asarray(a[first:last])) for name, a in c.items() if name not in _CSR
    }
    e0, e1 = int(c["example_offset"][first]), int(c["example_offset"][last])
    a0, a1 = int(c["act_offset"][e0]), int(c["act_offset"][e1])
    return Shard(
        json={
            "first": first,
            "n": last - first,
            "labels": [
                [label_json(label) for label in labels] for labels in pages.labels[first:last]
            ],
        },
        columns={
            **plain,
            "example_offset": c["example_offset"][first : last + 1] - np.uint32(e0),
            **{name: _packed(name, c[name][e0:e1]) for name in _EXAMPLE_COLUMNS},
            "act_offset": c["act_offset"][e0 : e1 + 1] - np.uint32(a0),
            **{name: c[name][a0:a1] for name in _ACT_COLUMNS},
        },
    )


def _packed(name: str, values: np.ndarray) -> np.ndarray:
    """A card is read by eye to three digits; the tables hold what is exact."""
    return rounded(values, _BITS[name]) if name in _BITS else values


def label_json(label: Label) -> dict[str, Any]:
    """A label as a card holds it; `from` and `cosine` only for inherited ones."""
    values = {name: getattr(label, name) for name in _LABEL_FIELDS}
    out = {"text": label.text, "method": METHOD_INDEX[label.method], **values}
    return out | ({} if label.origin is None else {"from": label.origin, "cosine": label.cosine})


def _flags(pages: SitePages, density: np.ndarray) -> np.ndarray:
    c = pages.columns
    flags = np.where(c["count"] > 0, FLAG_ALIVE, 0)
    flags |= np.where(
        [bool(labels) and labels[0].accepted for labels in pages.labels], FLAG_LABELLED, 0
    )
    flags |= np.where(c["token_share"][:, 0] >= 0.9, FLAG_ONE_TOKEN, 0)
    flags |= np.where(density > 0.1, FLAG_DENSE, 0)
    if pages.graph is not None:
        start = int(pages.graph.start[pages.index])
        here = slice(start, start + pages.n_latents)
        flags |= np.where(pages.graph.dying[here] & (c["count"] > 0), FLAG_DYING, 0)
        flags |= np.where(
            [f in pages.trunk_starts for f in range(start, start + pages.n_latents)], FLAG_TRUNK, 0
        )
    return flags.astype(np.uint8)
