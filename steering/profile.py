"""What a feature reads and what it writes: from activations on text, and from the model's output.

Input side (`profile_features`), from activations at a site and the tokens there:

1. `density`: share of tokens where it fires; `strong`: the 95th percentile of its activation where it fires.
2. `own_tokens`: token ids on which it fires at least `min_rate` of the time, common tokens left out, by activation
   mass.
3. `purity`: the share of its activation mass that falls on them. 1 is a feature of a few words.

Output side (`output_scores`): add the feature's direction to neutral prompts and see how much probability its own
tokens gain at the next token. A feature that reads a word does not always make the model write it; both are needed to
steer.

Cost: one encoding of the text a site; one short forward pass a feature. Source: Arad et al., input and output scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from data.sites import FeatureId, Site
from sae.errors import UserError
from steering.applied import RowPlan, applied
from steering.edits import Add
from steering.plan import Node, Plan
from steering.protocols import Dictionary, SteerableModel
from steering.sequences import device_of, encoded, forward, in_batches, padded

_RARE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The input side of one feature."""

    feature: FeatureId
    density: float
    strong: float
    own_tokens: tuple[int, ...]
    purity: float


@dataclass(frozen=True, kw_only=True)
class OutputScore:
    """The output side: probability of the feature's own tokens next, unsteered and steered, mean over prompts."""

    feature: FeatureId
    before: float
    after: float

    @property
    def gain(self) -> float:
        return self.after - self.before

    @property
    def information(self) -> float:
        """`after · log(after / before)`, nats: large when the tokens become likely *and* were not so before, so that
        function words, likely anyway, do not win."""
        return self.after * math.log((self.after + _RARE) / (self.before + _RARE))


def profile_features(
    sae: Dictionary,
    site: Site,
    blocks: Iterable[Float[Tensor, "token d_model"]],
    ids: Int64[np.ndarray, "token"],
    latents: Sequence[int],
    *,
    min_rate: float = 0.3,
    max_frequency: float = 0.002,
    n_own: int = 30,
) -> list[Profile]:
    """Profiles of `latents`; `ids` are the tokens of all blocks, in order."""
    parts = [sae.encode_selected(block.float(), list(latents)).cpu().numpy() for block in blocks]
    activations = np.concatenate(parts) if parts else np.zeros((0, len(latents)), dtype=np.float32)
    if len(activations) != len(ids) or not len(ids):
        raise UserError("tokens and activations differ in number", expected=str(len(ids)), found=str(len(activations)))
    tokens, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    usable = counts <= max(max_frequency * len(ids), 8)
    return [
        _profile(FeatureId(site, latent), activations[:, column], tokens, inverse, counts, usable, min_rate, n_own)
        for column, latent in enumerate(latents)
    ]


def _profile(
    feature: FeatureId,
    a: Float[np.ndarray, "token"],
    tokens: Int64[np.ndarray, "kind"],
    inverse: Int64[np.ndarray, "token"],
    counts: Int64[np.ndarray, "kind"],
    usable: np.ndarray,
    min_rate: float,
    n_own: int,
) -> Profile:
    fires = a > 0
    mass = np.bincount(inverse, weights=a, minlength=len(tokens))
    fired = np.bincount(inverse[fires], minlength=len(tokens))
    own = usable & (fired >= 2) & (fired >= min_rate * counts)
    ranked = np.flatnonzero(own)[np.argsort(-mass[own], kind="stable")][:n_own]
    return Profile(
        feature=feature,
        density=float(fires.mean()),
        strong=float(np.quantile(a[fires], 0.95)) if fires.any() else 0.0,
        own_tokens=tuple(int(token) for token in tokens[ranked]),
        purity=float(mass[ranked].sum() / mass.sum()) if mass.sum() > 0 else 0.0,
    )


def output_scores(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    profiles: Sequence[Profile],
    norms: Mapping[Site, float],
    prompts: Sequence[str],
    *,
    strength: float = 0.5,
    batch_size: int = 64,
) -> list[OutputScore]:
    """One score a profile: its direction is added at its site, `strength` × the median norm there."""
    rows = [encoded(model, prompt) for prompt in prompts]
    base = _next_probabilities(model, rows)
    per_batch = max(1, batch_size // len(rows))
    scores: list[OutputScore] = []
    for block in in_batches(profiles, per_batch):
        plans = [
            RowPlan(
                plan=Plan(nodes=(Node(at=str(p.feature), scale=norms[p.feature.site]),), edit=Add(), strength=strength),
                rows=tuple(range(k * len(rows), (k + 1) * len(rows))),
            )
            for k, p in enumerate(block)
        ]
        with applied(model, saes, plans):
            steered = _next_probabilities(model, rows * len(block))
        scores += [_score(p, base, part) for p, part in zip(block, steered.split(len(rows)), strict=True)]
    return scores


def _score(
    profile: Profile, base: Float[Tensor, "prompt vocab"], steered: Float[Tensor, "prompt vocab"]
) -> OutputScore:
    own = list(profile.own_tokens)
    return OutputScore(
        feature=profile.feature,
        before=float(base[:, own].sum(-1).mean()) if own else 0.0,
        after=float(steered[:, own].sum(-1).mean()) if own else 0.0,
    )


def _next_probabilities(model: SteerableModel, rows: Sequence[Sequence[int]]) -> Float[Tensor, "row vocab"]:
    batch = padded(rows, device=device_of(model))
    return forward(model, batch, n_last=1)[:, -1].float().softmax(-1)
