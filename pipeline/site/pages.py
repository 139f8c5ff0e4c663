"""The shards of one site: overview, labels, links, feature cards
(docs/decisions/0003-atlas-shards.md).

Every column of a card shard is a slice of the site's columns, so writing is slicing, gzip and
base64: about 0.4 ms a feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline.describe.columns import Columns
from pipeline.describe.features import Features
from pipeline.describe.labels import METHOD_INDEX, Label
from pipeline.flow.graph import FlowGraph
from pipeline.flow.nodes import CLASSES as NODE_CLASSES
from pipeline.flow.trunks import trunks_of
from pipeline.site.flow_pages import FEWEST_LAYERS, flow_shard
from pipeline.site.shards import Shard, rounded, write_shard

CLASSES = ("unknown", *NODE_CLASSES)
CARDS_PER_SHARD = 256
FLAG_ALIVE, FLAG_LABELLED, FLAG_ONE_TOKEN, FLAG_DENSE, FLAG_DYING, FLAG_TRUNK = 1, 2, 4, 8, 16, 32
_EXAMPLE_COLUMNS = ("example_tab", "example_decile", "example_row", "example_value", "example_gap")
_ACT_COLUMNS = ("act_at", "act_value")
_CSR = (*_EXAMPLE_COLUMNS, *_ACT_COLUMNS, "example_offset", "act_offset")
_BITS = dict.fromkeys(("decile", "example_value", "example_gap"), 12) | dict.fromkeys(
    (
        *("token_share", "token_lift", "previous_share", "previous_lift", "promotes_score"),
        *("suppresses_score", "cofiring_jaccard", "similar_cosine"),
    ),
    10,
)
_LABEL_FIELDS = (
    *("score", "low", "high", "n", "precision", "recall", "mass_recall", "near_miss", "accepted"),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where everything lies, for workers; `made_from` are the digests of what lies there."""

    features: Path
    graph: Path | None
    site_folder: Path
    made_from: tuple[str, ...] = ()


def write_site(job: Job, short: str) -> tuple[str, dict[str, Any]]:
    """Write all shards of a site; returns its name and its numbers for the manifest."""
    features, graph, starts = _opened(job)
    index = [site.short for site in features.sites].index(short)
    frame, columns, labels = features.at(short), features.columns(short), features.labels_at(short)
    overview = overview_shard(frame, columns, graph, index, starts)
    folder = job.site_folder
    write_shard(folder, f"sites/{short}/overview", overview)
    write_shard(folder, f"sites/{short}/labels", labels_shard(frame))
    write_cards(folder, short, columns, labels)
    if graph is not None:
        write_shard(folder, f"sites/{short}/flow", flow_shard(graph, index))
    counted = frame["class"][frame["alive"]].fillna(CLASSES[0]).value_counts()
    classes = {name: int(counted[name]) for name in CLASSES if name in counted}
    return short, {
        "n_latents": len(frame),
        "n_alive": int(frame["alive"].sum()),
        "n_labelled": int(frame["label_accepted"].sum()),
        "n_cards": -(-len(frame) // CARDS_PER_SHARD),
        "classes": {} if graph is None else classes,
        "n_dying": int(((overview.columns["flags"] & FLAG_DYING) > 0).sum()),
    }


def write_cards(folder: Path, short: str, columns: Columns, labels: list[list[Label]]) -> None:
    """Write the card shards of a site into a site folder."""
    for card in range(-(-len(labels) // CARDS_PER_SHARD)):
        shard = card_shard(columns, labels, card * CARDS_PER_SHARD)
        write_shard(folder, f"sites/{short}/cards/{card:03d}", shard)


@lru_cache(maxsize=1)
def _opened(job: Job) -> tuple[Features, FlowGraph | None, np.ndarray]:
    """What the sites share: features, graph, and where a trunk of some layers starts."""
    features = Features(job.features)
    if job.graph is None:
        return features, None, np.zeros(0, np.int64)
    graph = FlowGraph.open(job.graph)
    trunks = trunks_of(graph)
    return features, graph, trunks.feature[trunks.offset[:-1]][trunks.length >= FEWEST_LAYERS]


def overview_shard(
    frame: pd.DataFrame,
    columns: Columns,
    graph: FlowGraph | None,
    index: int,
    trunk_starts: np.ndarray,
) -> Shard:
    known = {name: frame[name].to_numpy() for name in ("density", "max", "alive", "label_accepted")}
    whole = {
        name: frame[name].fillna(missing).clip(upper=65535).to_numpy().astype(np.int64)
        for name, missing in (
            ("birth_layer", -1),
            ("death_layer", -1),
            ("community", 65535),
            ("n_links_in", 0),
            ("n_links_out", 0),
        )
    }
    flags = np.where(known["alive"], FLAG_ALIVE, 0)
    flags |= np.where(known["label_accepted"], FLAG_LABELLED, 0)
    flags |= np.where(columns["token_share"][:, 0] >= 0.9, FLAG_ONE_TOKEN, 0)
    flags |= np.where(known["density"] > 0.1, FLAG_DENSE, 0)
    if graph is not None:
        here = np.arange(*graph.start[index : index + 2])
        flags |= np.where(graph.dying[here] & known["alive"], FLAG_DYING, 0)
        flags |= np.where(np.isin(here, trunk_starts), FLAG_TRUNK, 0)
    kind = frame["class"].fillna(CLASSES[0]).map(CLASSES.index)
    return Shard(
        columns={
            "density": known["density"],
            "max": known["max"],
            "class": kind.to_numpy(np.uint8),
            "birth": whole["birth_layer"].astype(np.int16),
            "death": whole["death_layer"].astype(np.int16),
            "community": whole["community"].astype(np.uint16),
            "n_in": whole["n_links_in"].astype(np.uint16),
            "n_out": whole["n_links_out"].astype(np.uint16),
            "flags": flags.astype(np.uint8),
        }
    )


def labels_shard(frame: pd.DataFrame) -> Shard:
    method = frame["label_method"].map(METHOD_INDEX).fillna(255)
    score = (254 * frame["label_score"]).round().fillna(255)
    return Shard(
        json={"labels": frame["label"].tolist()},
        columns={"method": method.to_numpy(np.uint8), "score": score.to_numpy(np.uint8)},
    )


def card_shard(c: Columns, labels: list[list[Label]], first: int) -> Shard:
    """The cards of 256 latents from `first` on."""
    last = min(first + CARDS_PER_SHARD, len(labels))
    plain = {
        name: _packed(name, np.asarray(a[first:last])) for name, a in c.items() if name not in _CSR
    }
    e0, e1 = int(c["example_offset"][first]), int(c["example_offset"][last])
    a0, a1 = int(c["act_offset"][e0]), int(c["act_offset"][e1])
    return Shard(
        json={
            "first": first,
            "n": last - first,
            "labels": [[label_json(label) for label in own] for own in labels[first:last]],
        },
        columns={
            **plain,
            "example_offset": c["example_offset"][first : last + 1] - np.uint32(e0),
            **{name: _packed(name, c[name][e0:e1]) for name in _EXAMPLE_COLUMNS},
            "act_offset": c["act_offset"][e0 : e1 + 1] - np.uint32(a0),
            **{name: c[name][a0:a1] for name in _ACT_COLUMNS},
        },
    )


def label_json(label: Label) -> dict[str, Any]:
    """A label as a card holds it; `from` and `cosine` only for inherited ones."""
    values = {name: getattr(label, name) for name in _LABEL_FIELDS}
    out = {"text": label.text, "method": METHOD_INDEX[label.method], **values}
    return out | ({} if label.origin is None else {"from": label.origin, "cosine": label.cosine})


def _packed(name: str, values: np.ndarray) -> np.ndarray:
    """A card is read by eye to three digits; the tables hold what is exact."""
    return rounded(values, _BITS[name]) if name in _BITS else values
