"""What a feature reads and what it writes: from activations on text, and from the model's output.

Input side (`profile_features`), from activations at a site and the tokens there:

1. `density`: share of tokens where it fires; `strong`: the 95th percentile of its activation where
   it fires.
2. `own_tokens`: token ids on which it fires at least `min_rate` of the time, common tokens left
   out, by activation mass.
3. `purity`: the share of its activation mass that falls on them. 1 is a feature of a few words.

Output side (`output_scores`): steer neutral text with the feature and see how much probability its
own tokens gain, over all positions: after an opener alone, few nouns could come next whatever is
pushed. `on_target_share` is how much of the change of the output, in nats, moves probability to
those tokens; the rest is disruption. A feature that reads a word does not always make the model
write it; both are needed to steer.

Cost: one encoding of the text a site; one short forward pass a feature. Sources: Arad et al., input
and output scores; ActAdd's effectiveness and disruption.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site
from steering.dose import NeutralText, steered_log_probs
from steering.plan import Plan
from steering.protocols import Dictionary, SteerableModel

_RARE = 1e-9


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
    """The output side: probability of the feature's own tokens unsteered and steered, mean over
    positions; the KL of the steered from the unsteered output, and the part of it between own and
    other tokens, nats a token."""

    feature: FeatureId
    before: float
    after: float
    kl: float
    kl_between: float

    @property
    def gain(self) -> float:
        return self.after - self.before

    @property
    def on_target_share(self) -> float:
        """Of the KL; negative when the own tokens become less likely."""
        return math.copysign(self.kl_between, self.gain) / self.kl if self.kl > 0 else 0.0


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
        raise UserError(
            "tokens and activations differ in number",
            expected=str(len(ids)),
            found=str(len(activations)),
        )
    tokens, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    usable = counts <= max(max_frequency * len(ids), 8)
    return [
        _profile(
            FeatureId(site, latent),
            activations[:, column],
            tokens,
            inverse,
            counts,
            usable,
            min_rate,
            n_own,
        )
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
    plans: Sequence[Plan],
    neutral: NeutralText,
) -> list[OutputScore]:
    """One score a profile, steered by the plan of its place."""
    scores = []
    for profile, plan in zip(profiles, plans, strict=True):
        steered = steered_log_probs(model, saes, plan, neutral)
        scores.append(_score(profile, neutral.log_probs, steered))
    return scores


def _score(
    profile: Profile, base: Float[Tensor, "token vocab"], steered: Float[Tensor, "token vocab"]
) -> OutputScore:
    own = list(profile.own_tokens)
    before, after = (
        each[:, own].exp().sum(-1).double().clamp(_RARE, 1 - _RARE) for each in (base, steered)
    )
    between = after * (after / before).log() + (1 - after) * ((1 - after) / (1 - before)).log()
    return OutputScore(
        feature=profile.feature,
        before=float(before.mean()),
        after=float(after.mean()),
        kl=float(torch.linalg.vecdot(steered.exp(), steered - base).double().clamp(min=0).mean()),
        kl_between=float(between.mean()),
    )
