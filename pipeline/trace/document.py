"""A trace as plain data, with names and texts in place of numbers of tokens and features: what the
terminal prints, the atlas shows, the live server sends and `traces/<name>/trace.json` holds.

    {"version", "prompt", "chat", "tokens", "pieces", "target", "y", "top", "cuts", "options",
     "n_groups", "share_removed",
     "supernodes": [{"id", "name", "label", "promotes", "flow", "token", "first_layer",
                     "last_layer", "peak", "predicted", "removed", "control", "kl", "top",
                     "differs", "breaks", "doses": [[factor, y], …],
                     "members": [{"feature", "z", "score"}, …], "heads": [{…}, …]}, …],
     "edges": [{"source", "target", "predicted", "removed", "drawn"}, …],
     "rest": [{"cut", "kind": "error" | "bias" | "sink", "score": [one a token]}, …],
     "checks": [{"check", "value", "note"}, …],
     "flip": {…} (pipeline/trace/counterfactual.py), if it was asked for}

Supernodes and edges are ordered by their real effect. Numbers that are not known are null.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import pandas as pd

from featureflow.sites import FeatureId, parse_feature
from pipeline.console import table
from pipeline.trace.counterfactual import Flip
from pipeline.trace.stream import FEATURE, Target
from pipeline.trace.trace import Trace

if TYPE_CHECKING:
    from pipeline.run import Run

Document = dict[str, Any]
VERSION = 1
_LATE, _N_PROMOTED, _N_TOP = 2 / 3, 6, 5


def document_of(found: Trace, run: Run, prompt: str, *, chat: bool = False) -> Document:
    """All of a trace, also of one that is not whole yet."""
    text, traced = run.exact_model.tokenizer.token_text, found.traced
    probability = traced.logits.softmax(-1)
    value, token = probability.topk(min(_N_TOP, len(probability)))
    names = _Names(run, found)
    return {
        "version": VERSION,
        "prompt": prompt,
        "chat": chat,
        "tokens": list(traced.ids),
        "pieces": [text(i) for i in traced.ids],
        "target": _target(traced.target, probability, text),
        "y": traced.y,
        "top": _top(token.tolist(), value.tolist(), text),
        "cuts": [site.short for site in traced.cuts],
        "options": asdict(found.options),
        "n_groups": found.n_groups,
        "share_removed": found.share_removed,
        "supernodes": [
            _supernode(row, found, names, text) for row in found.supernodes.to_dict("records")
        ],
        "edges": [_plain(row) for row in found.edges.to_dict("records")],
        "rest": list(_rest(traced.nodes, len(traced.ids))),
        "checks": [_plain(row) for row in found.checks.to_dict("records")],
    }


def with_flip(document: Document, flip: Flip) -> Document:
    """With the counterfactual in `flip`."""
    return {**document, "flip": _plain(asdict(flip))}


def lines_of(document: Document) -> Iterator[str]:
    """The trace as a person reads it in the terminal."""
    pieces, nodes = document["pieces"], document["supernodes"]
    shown = nodes[: document["options"]["n_shown"]]
    yield " | ".join(f"{number} {piece!r}" for number, piece in enumerate(pieces))
    yield headline_of(document)
    yield (
        f"{len(shown)} of {document['n_groups']} supernodes shown; the {len(nodes)} removed hold "
        f"{document['share_removed']:.0%} of the weight. y is the change of y when it is removed; "
        "predicted, by the gradient."
    )
    header = ("", "token", "layers", "y", "predicted", "KL", "says then", "name")
    yield from table([_line(node, document) for node in shown], header=header)
    drawn = [edge for edge in document["edges"] if edge["drawn"]]
    for edge in drawn[: len(shown)]:
        guess = "" if edge["predicted"] is None else f", by gradient {edge['predicted']:+.2f}"
        yield f"S{edge['source']} → S{edge['target']}: {edge['removed']:+.2f}{guess}"
    if "flip" in document:
        yield flip_line(document)
    yield from table(
        [
            (each["check"], "–" if each["value"] is None else f"{each['value']:.2g}", each["note"])
            for each in document["checks"]
        ]
    )


def headline_of(document: Document) -> str:
    """What is explained, in one line."""
    target, y = document["target"], document["y"]
    if "foreign" in document:
        return f"{target['text']} (a graph of {document['foreign']})".strip()
    if "feature" in target:
        return f"{target['feature']} on token {target['token']}: pre-activation {y:.2f}"
    answer, foil = (
        f"{target[name]['text']!r} ({target[name]['probability']:.4f})"
        for name in ("answer", "foil")
    )
    return f"{answer} against {foil}: y = {y:.2f}"


def flip_line(document: Document) -> str:
    """The counterfactual as a sentence."""
    flip, target = document["flip"], document["target"]
    doing = {0.0: "without", 2.0: "with twice"}
    pairs = zip(flip["supernodes"], flip["factors"], strict=True)
    done = ", ".join(f"{doing[factor]} S{number}" for number, factor in pairs)
    foil = target["foil"]["text"]
    result = f"the model says {foil!r}" if flip["flips"] else f"it still does not say {foil!r}"
    return (
        f"smallest change found ({flip['n_tried']} sets tried): {done}, {result} "
        f"({flip['p_foil']:.2f}, answer {flip['p_answer']:.2f}); KL on the rest of the prompt "
        f"{flip['kl_rest']:.2f} (largest {flip['kl_rest_largest']:.2f}); as many random features "
        f"do it in {flip['random_flips']:.0%} of draws"
    )


def _line(node: Mapping[str, Any], document: Document) -> tuple[str, ...]:
    flag = "breaks the text" if node["breaks"] else "≠" if node["differs"] else ""
    says = ", ".join(f"{text!r} {p:.2f}" for text, p in node["top"][:2])
    return (
        f"S{node['id']}",
        f"{node['token']} {document['pieces'][node['token']]!r}",
        f"L{node['first_layer']}–L{node['last_layer']}",
        f"{node['removed']:+.2f}",
        f"{node['predicted']:+.2f} {flag}".rstrip(),
        f"{node['kl']:.2f}",
        "" if "feature" in document["target"] else says,
        node["name"],
    )


class _Names:
    """Accepted labels with their scores, tokens that features are active on, and promoted ones."""

    def __init__(self, run: Run, found: Trace) -> None:
        self._run, self._saes = run, found.traced.saes
        self._late = _LATE * (max(site.layer for site in run.saes) + 1)
        self._labels: dict[str, tuple[str, float]] = {}
        self._tokens: dict[str, list[str]] = {}
        if run.has("describe") and not found.traced.is_linear:
            frame = run.features.table
            shown = {name for names in found.supernodes["features"] for name in names.split(" ")}
            frame = frame[frame["feature"].isin(shown)]
            self._tokens = dict(zip(frame["feature"], frame["tokens"], strict=True))
            frame = frame[frame["label_accepted"].astype(bool)]
            scores = zip(frame["label"], frame["label_score"].fillna(0), strict=True)
            self._labels = dict(zip(frame["feature"], scores, strict=True))

    def label(self, features: Sequence[str]) -> str:
        """The best accepted label of a member; the empty text where there is none."""
        accepted = [self._labels[f] for f in features if f in self._labels]
        return max(accepted, key=lambda each: each[1])[0] if accepted else ""

    def promoted(self, feature: FeatureId) -> list[str]:
        model = self._run.exact_model
        weight, gain = model.unembedding()
        direction = self._saes[feature.site].W_dec[feature.latent].float()
        best = (weight @ (gain * direction)).topk(min(_N_PROMOTED, len(weight))).indices.tolist()
        return [model.tokenizer.token_text(i).strip() for i in best]

    def name(self, first_layer: int, label: str, promoted: Sequence[str], last: str) -> str:
        """Late, what it promotes; before, its label, else the tokens its last member is active on
        (what an early direction promotes says little of it)."""
        tokens = [f"‘{token}’" for token in self._tokens.get(last, ())]
        if first_layer >= self._late or not (label or tokens):
            return f"promotes {', '.join(promoted)}"
        return label or f"active on {', '.join(tokens)}"


def _supernode(row: Mapping[str, Any], found: Trace, names: _Names, text: Any) -> dict[str, Any]:
    members, features = found.members(row["supernode"]), str(row["features"]).split(" ")
    label, promoted = names.label(features), names.promoted(parse_feature(features[-1]))
    heads = found.heads
    if len(heads):
        heads = heads[heads["supernode"] == row["supernode"]].drop(columns="supernode")
    kept = ("flow", "token", "first_layer", "last_layer", "peak", "predicted", "removed")
    later = {"control": None, "kl": None, "differs": False, "breaks": False}
    return {
        "id": row["supernode"],
        "name": names.name(row["first_layer"], label, promoted, features[-1]),
        "label": label,
        "promotes": promoted,
        **_plain({name: row[name] for name in kept}),
        **_plain({name: row.get(name, default) for name, default in later.items()}),
        "top": _top(row.get("top_tokens", []), row.get("top_probabilities", []), text),
        "doses": [list(each) for each in row.get("doses", [])],
        "members": [_plain(each) for each in members[["feature", "z", "score"]].to_dict("records")],
        "heads": [_plain(each) for each in heads.to_dict("records")],
    }


def _target(target: Target, probability: Any, text: Any) -> dict[str, Any]:
    if target.feature is not None:
        return {"feature": str(target.feature), "token": target.token}
    return {
        name: {"id": i, "text": text(i), "probability": float(probability[i])}
        for name, i in (("answer", target.answer), ("foil", target.foil))
    }


def _top(tokens: Sequence[int], probabilities: Sequence[float], text: Any) -> list[list[Any]]:
    return [[text(t), round(float(p), 5)] for t, p in zip(tokens, probabilities, strict=True)]


def _rest(nodes: pd.DataFrame, n_tokens: int) -> Iterator[dict[str, Any]]:
    """Scores of what is no feature: one number a token, null where there is none."""
    others = nodes[nodes["kind"] != FEATURE]
    for (cut, kind), here in others.groupby(["cut", "kind"], sort=False):
        score: list[float | None] = [None] * n_tokens
        for token, value in zip(here["token"], here["score"], strict=True):
            score[token] = round(float(value), 5)
        yield {"cut": cut, "kind": kind, "score": score}


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """Python values; what is not known is None."""
    values = {str(k): v.item() if hasattr(v, "item") else v for k, v in row.items()}
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()
    }
