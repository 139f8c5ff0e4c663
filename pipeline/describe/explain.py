"""Second opinions on chosen features: what a sentence model and a chat model
make of their text.

1. windows: a feature's examples on documents that labels were proposed on are what a chat model is
   shown; those on held-out documents, and held-out windows in which the feature is silent (drawn at
   random, and around near-misses), are what both are scored on;
2. a sentence model says how well windows with the feature belong together, and how well the label
   fits them (pipeline/describe/sentences.py);
3. a chat model writes a label from the shown examples and is scored by telling held-out windows
   apart, and windows marked rightly from ones marked wrongly (pipeline/describe/explainer.py).

Silence is checked with the dictionary itself on stored activations. Cost a site: one reading of
`_CANDIDATES` windows; a feature: some twenty sentence embeddings, or ten questions to the chat
model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64

from data.store import ActivationStore
from featureflow.errors import Command, UserError
from featureflow.files import write_text_atomically
from featureflow.sites import FeatureId, Site, parse_feature
from pipeline.describe.cards import Example
from pipeline.describe.chat import ChatModel
from pipeline.describe.corpus import PROPOSING
from pipeline.describe.explainer import ANSWER_TOKENS, Detection, detect, explain, fuzz, marked
from pipeline.describe.features import Features
from pipeline.describe.sentences import SentenceModel, embedding_score, example_embedding_score
from sae import Sae

OPINIONS = "opinions.json"
REACH, MOST = 16, 10
_CANDIDATES = 64
_ROUNDED = 4


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Texts about one feature: `shown` marked, on documents for proposing; the rest on held-out
    ones. In `near` it was nearly active; `right` and `wrong` are windows of `active`, marked where
    it is active, and on as many other tokens."""

    shown: tuple[str, ...]
    active: tuple[str, ...]
    silent: tuple[str, ...]
    near: tuple[str, ...] = ()
    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Opinions:
    """Who is asked; at least one of them."""

    sentences: SentenceModel | None = None
    chat: ChatModel | None = None
    fuzz: bool = True
    max_tokens: int = ANSWER_TOKENS


class Evidence:
    """Windows of any feature of a run."""

    def __init__(
        self, features: Features, store: ActivationStore, saes: Mapping[Site, Sae], *, seed: int = 0
    ) -> None:
        self.features = features
        self._store = store
        self._saes = saes
        self._corpus = features.corpus
        self._seed = seed
        self._silence = lru_cache(maxsize=2)(self._active_in)

    def windows(self, feature: str) -> Windows:
        """Raises UserError for a feature that the atlas does not have."""
        wanted = parse_feature(feature)
        card = self.features.card(feature)
        held_out, proposing = self._corpus.held_out, self._corpus.part == PROPOSING
        active = {example.row: example for example in card.examples if example.tab != "near_miss"}
        missed = [e.row for e in card.examples if e.tab == "near_miss" and held_out[e.row]]
        in_test = [example for row, example in active.items() if held_out[row]][:MOST]
        generator = np.random.default_rng(self._seed)
        pieces = [self._pieces(example) for example in in_test]
        moved = [(p, _misplaced(p[1], generator)) for p in pieces]
        silent = np.flatnonzero(~self._silence(wanted.site)[:, wanted.latent])[:MOST]
        return Windows(
            shown=tuple(marked(*self._pieces(e)) for row, e in active.items() if proposing[row])[
                :MOST
            ],
            active=tuple(self._text(example.row) for example in in_test),
            silent=tuple(self._text(int(self._candidates[i])) for i in silent),
            near=tuple(self._text(row) for row in missed if not self._active_near(wanted, row)),
            right=tuple(marked(*p) for p, other in moved if other is not None),
            wrong=tuple(marked(p[0], other) for p, other in moved if other is not None),
        )

    def chosen(self, n: int, *, short: str | None = None) -> list[str]:
        """`n` features that are active, drawn from the seed, over all dictionaries or one."""
        features = self.features.table
        alive = features[features["alive"] & ((features["site"] == short) if short else True)][
            "feature"
        ].to_numpy(str)
        if not len(alive):
            raise UserError("no feature is active there", where=short or str(self.features.folder))
        drawn = np.random.default_rng(self._seed).choice(
            len(alive), size=min(n, len(alive)), replace=False
        )
        return [str(alive[i]) for i in sorted(drawn)]

    @property
    def _candidates(self) -> Int64[np.ndarray, "window"]:
        """Held-out rows around which silence is looked for, the same for every feature."""
        rows = np.flatnonzero(self._corpus.held_out & self._corpus.kept)
        generator = np.random.default_rng(self._seed)
        return np.sort(generator.choice(rows, size=min(_CANDIDATES, len(rows)), replace=False))

    @torch.no_grad()
    def _active_in(self, site: Site) -> Bool[np.ndarray, "window latent"]:
        """Which latents are active anywhere in each candidate window."""
        sae = self._saes[site]
        kept = self._corpus.kept
        is_active = []
        for row in self._candidates:
            rows = self._corpus.window(int(row), REACH)
            x = self._store.read(site, int(rows[0]), int(rows[-1]) + 1)[kept[rows]]
            is_active.append((sae.encode(torch.from_numpy(x)) > 0).any(dim=0).numpy())
        return np.stack(is_active)

    @torch.no_grad()
    def _active_near(self, feature: FeatureId, row: int) -> bool:
        """Whether a feature is active anywhere in the window around a row."""
        rows = self._corpus.window(row, REACH)
        kept = self._corpus.kept[rows]
        x = self._store.read(feature.site, int(rows[0]), int(rows[-1]) + 1)[kept]
        return bool(
            (self._saes[feature.site].encode(torch.from_numpy(x))[:, feature.latent] > 0).any()
        )

    def _text(self, row: int) -> str:
        vocabulary = self.features.vocabulary
        token = self._corpus.token[self._corpus.window(row, REACH)].tolist()
        return vocabulary.join([t for t in token if t not in vocabulary.special]).strip()

    def _pieces(self, example: Example) -> tuple[list[str], list[float]]:
        """The window's text in pieces of whole characters, and the largest activation in each."""
        near, vocabulary = _near(example), self.features.vocabulary
        kept = [
            (token, value)
            for token, value in zip(example.tokens[near], example.values[near], strict=True)
            if token not in vocabulary.special
        ]
        values = iter([value for _, value in kept])
        pieces = vocabulary.whole([token for token, _ in kept])
        return [text for text, _ in pieces], [max(islice(values, n)) for _, n in pieces]


def _misplaced(values: Sequence[float], generator: np.random.Generator) -> list[float] | None:
    """As many marks as before, all on pieces where the feature is not active; None where such
    pieces are too few."""
    free = np.flatnonzero(np.array(values) == 0)
    n_active = len(values) - len(free)
    if not 0 < n_active <= len(free):
        return None
    chosen = generator.choice(free, size=n_active, replace=False)
    return [float(i in chosen) for i in range(len(values))]


def second_opinions(
    evidence: Evidence, features: Sequence[str], opinions: Opinions
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Feature by feature what `write_opinions` takes. Where held-out windows are too few a score is
    None."""
    for feature in features:
        windows = evidence.windows(feature)
        found: dict[str, Any] = {}
        if opinions.sentences is not None:
            found |= sentence_scores(
                opinions.sentences, windows, _accepted_label(evidence.features, feature)
            )
        if opinions.chat is not None:
            found |= chat_label(
                opinions.chat, windows, fuzzing=opinions.fuzz, max_tokens=opinions.max_tokens
            )
        yield feature, found


def write_opinions(root: Path, train: str, found: Mapping[str, Mapping[str, Any]]) -> Path:
    """Keep opinions beside the artifacts of a run, in `opinions.json`: earlier ones stay, as long
    as they are of the same SAEs (`train`, the digest). The atlas stage shows them."""
    known = read_opinions(root, train)
    merged = {**known, **{name: {**known.get(name, {}), **new} for name, new in found.items()}}
    document = {"version": 1, "train": train, "features": dict(sorted(merged.items()))}
    path = root / OPINIONS
    write_text_atomically(path, json.dumps(document, ensure_ascii=False, indent=1))
    return path


def read_opinions(root: Path, train: str) -> dict[str, dict[str, Any]]:
    """What `write_opinions` kept, by feature id; nothing when it is of other SAEs. Raises UserError
    when the file is damaged."""
    path = root / OPINIONS
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return dict(document["features"]) if document["train"] == train else {}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "these opinions cannot be read",
            where=str(path),
            found=str(error),
            fix=("remove the file", Command("atlas", "explain")),
        ) from error


def sentence_scores(model: SentenceModel, windows: Windows, label: str | None) -> dict[str, Any]:
    """How well the windows with the feature belong together, and how well a label fits them."""
    vectors = model.encode([*windows.active, *windows.silent, *([] if label is None else [label])])
    active, rest = vectors[: len(windows.active)], vectors[len(windows.active) :]
    silent = rest[: len(windows.silent)]
    return {
        "examples_score": _rounded(example_embedding_score(active, silent)),
        "label_score": None
        if label is None
        else _rounded(embedding_score(rest[-1], active, silent)),
        "n_firing": len(active),
        "n_silent": len(silent),
    }


def chat_label(
    chat: ChatModel, windows: Windows, *, fuzzing: bool = True, max_tokens: int = ANSWER_TOKENS
) -> dict[str, Any]:
    """A label by the chat model with its scores; none when it gave no usable one."""
    text = explain(chat, windows.shown, max_tokens=max_tokens) if windows.shown else None
    if text is None:
        return {"labels": []}
    label: dict[str, Any] = {"text": text, "method": "model", "model": chat.model}
    others = [*windows.silent, *windows.near]
    label |= _scores(detect(chat, text, windows.active, others, max_tokens=max_tokens))
    if fuzzing and windows.right:
        found = fuzz(chat, text, windows.right, windows.wrong, max_tokens=max_tokens)
        label["fuzz"] = _scores(found)
    return {"labels": [label]}


def _scores(found: Detection) -> dict[str, Any]:
    return {name: value for name, value in asdict(found).items() if value is not None}


def _near(example: Example) -> slice:
    """The part of an example's tokens that a window shows."""
    return slice(max(0, example.peak - REACH), example.peak + REACH + 1)


def _accepted_label(features: Features, feature: str) -> str | None:
    row = features.table.iloc[features.number(feature)]
    return str(row["label"]) if bool(row["label_accepted"]) else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, _ROUNDED)
