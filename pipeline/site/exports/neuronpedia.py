"""Feature cards → Neuronpedia's formats.

`export_upload_batches`: bodies of `POST /api/feature/upload-batch`, at most 128 features each (its
public upload API). `export_bulk`: `features/`, `activations/`, `explanations/batch-N.jsonl.gz`, as
its own export buckets hold them.

Numbers come from the numbers of the survey, never from formatted text, so rare features keep their
density. The groups of activations are the top examples (bin −1, as Neuronpedia writes it) and the
ten deciles; a decile holds activations only.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.describe.cards import Card, Example
from pipeline.describe.columns import PAGE_BINS
from pipeline.describe.features import Features
from pipeline.describe.survey import LOG2_LOW

UPLOAD_FEATURES, BULK_FEATURES = 128, 1024
_TEXT_LIMIT = 512


def export_upload_batches(
    features: Features, short: str, out: Path, *, model_id: str, source: str
) -> list[Path]:
    """Write one JSON file a batch of a site's living features; returns the paths."""
    out.mkdir(parents=True, exist_ok=True)
    living = (card for card in features.cards_at(short) if card.numbers["count"])
    made = [_upload_feature(features, card) for card in living]
    paths = []
    for i in range(0, len(made), UPLOAD_FEATURES):
        body = {"modelId": model_id, "source": source, "features": made[i : i + UPLOAD_FEATURES]}
        path = out / f"{source}-{i // UPLOAD_FEATURES:04d}.json"
        path.write_text(json.dumps(body, ensure_ascii=False), encoding="utf-8", errors="replace")
        paths.append(path)
    return paths


def export_bulk(
    features: Features, short: str, out: Path, *, model_id: str, source: str
) -> list[Path]:
    """Write `{model}/{source}/{features,activations,explanations}/batch-N.jsonl.gz`; returns the
    paths."""
    base = out / model_id / source
    living = [card for card in features.cards_at(short) if card.numbers["count"]]
    paths = []
    for i in range(0, len(living), BULK_FEATURES):
        part = living[i : i + BULK_FEATURES]
        for kind, make in _BULK.items():
            path = base / kind / f"batch-{i // BULK_FEATURES}.jsonl.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = (
                json.dumps(row, ensure_ascii=False)
                for card in part
                for row in make(features, card, model_id, source)
            )
            text = "".join(line + "\n" for line in lines).encode("utf-8", errors="replace")
            path.write_bytes(gzip.compress(text, compresslevel=5, mtime=0))
            paths.append(path)
    return paths


def _upload_feature(features: Features, card: Card) -> dict[str, Any]:
    return {
        "index": _index(card),
        "density": _density(features, card),
        "topLogits": _logits(features, card, "promotes"),
        "bottomLogits": _logits(features, card, "suppresses"),
        "explanations": [
            {"text": label.text[:_TEXT_LIMIT], "methodName": f"featureflow_{label.method}"}
            for label in card.labels
        ],
        "activations": [
            _upload_activation(features, card, e)
            for e in card.examples
            if e.tab in ("top", "decile")
        ],
    }


def _upload_activation(features: Features, card: Card, example: Example) -> dict[str, Any]:
    window = {"tokens": _texts(features, example), "values": [round(v, 5) for v in example.values]}
    if example.tab == "top" or example.decile is None:
        return window
    low, high = (float(card.numbers["decile"][example.decile + i]) for i in (0, 1))
    return {**window, "quantileMin": low, "quantileMax": high, "quantileFraction": 0.1}


def _bulk_features(
    features: Features, card: Card, model_id: str, source: str
) -> Iterator[dict[str, Any]]:
    numbers = card.numbers
    filled = numbers["histogram"].nonzero()[0]
    edges = [2.0 ** (LOG2_LOW + int(b) * 32 / PAGE_BINS) for b in filled]
    yield {
        "modelId": model_id,
        "layer": source,
        "index": str(_index(card)),
        "sourceSetName": source.split("-", 1)[-1],
        "maxActApprox": float(numbers["max"]),
        "frac_nonzero": _density(features, card),
        "pos_str": [t["token"] for t in _logits(features, card, "promotes")],
        "pos_values": [t["value"] for t in _logits(features, card, "promotes")],
        "neg_str": [t["token"] for t in _logits(features, card, "suppresses")],
        "neg_values": [t["value"] for t in _logits(features, card, "suppresses")],
        "freq_hist_data_bar_values": edges,
        "freq_hist_data_bar_heights": [int(numbers["histogram"][b]) for b in filled],
        "topkCosSimIndices": card.ids("similar"),
        "topkCosSimValues": [
            round(float(v), 5) for v in numbers["similar_cosine"][: len(card.ids("similar"))]
        ],
        "correlated_features_indices": card.ids("cofiring"),
        "hookName": card.feature.site.name,
        "hasVector": False,
        "vector": [],
    }


def _bulk_activations(
    features: Features, card: Card, model_id: str, source: str
) -> Iterator[dict[str, Any]]:
    for i, example in enumerate(card.examples):
        if example.tab not in ("top", "decile"):
            continue
        low, high, inside = -1.0, float(card.numbers["max"]), -1.0
        if example.tab == "decile" and example.decile is not None:
            low, high = (float(card.numbers["decile"][example.decile + k]) for k in (0, 1))
            inside = 0.1
        yield {
            "id": hashlib.sha256(f"{model_id}/{source}/{card.feature}/{i}".encode()).hexdigest()[
                :25
            ],
            "modelId": model_id,
            "layer": source,
            "index": str(_index(card)),
            "tokens": _texts(features, example),
            "values": [round(v, 5) for v in example.values],
            "maxValue": max(example.values),
            "maxValueTokenIndex": max(range(len(example.values)), key=example.values.__getitem__),
            "minValue": 0.0,
            "dataIndex": str(example.row),
            "binMin": low,
            "binMax": high,
            "binContains": inside,
            "qualifyingTokenIndex": example.peak,
        }


def _bulk_labels(
    features: Features, card: Card, model_id: str, source: str
) -> Iterator[dict[str, Any]]:
    for i, label in enumerate(card.labels):
        yield {
            "id": hashlib.sha256(
                f"{model_id}/{source}/{card.feature}/label/{i}".encode()
            ).hexdigest()[:25],
            "modelId": model_id,
            "layer": source,
            "index": str(_index(card)),
            "description": label.text[:_TEXT_LIMIT],
            "typeName": f"featureflow_{label.method}",
            "explanationModelName": "featureflow",
        }


_BULK = {"features": _bulk_features, "activations": _bulk_activations, "explanations": _bulk_labels}


def _index(card: Card) -> int:
    return card.feature.latent


def _density(features: Features, card: Card) -> float:
    return float(card.numbers["count"]) / max(1, features.corpus.n_kept)


def _logits(features: Features, card: Card, name: str) -> list[dict[str, Any]]:
    scores = card.numbers[f"{name}_score"]
    return [
        {"token": features.vocabulary.text(token), "value": round(float(s), 5)}
        for token, s in zip(card.ids(name), scores, strict=False)
    ]


def _texts(features: Features, example: Example) -> list[str]:
    return [features.vocabulary.text(token).replace("\0", " ") for token in example.tokens]
