"""Features to steer with: which of them read a concept, and what one of them reads.

From texts with a concept and texts of the same kind without it:

1. `read_texts`: per text, the mean vector at a site and the mean activation of every latent, over
   the text's tokens (first token left out).
2. `rank_features`: by AUROC (does the activation tell topical from contrast texts?) and by d′;
   features that are active on fewer than `min_active_rate` of the topical texts are left out.
3. `difference_of_means`: the mean vector of topical texts minus that of contrast texts, per site.

From activations at a site and the tokens there (`profile_features`):

1. `density`: share of tokens where the feature is active; `strong`: the 95th percentile of its
   activation where it is.
2. `top_tokens`: token ids on which it is active at least `min_rate` of the time, common tokens left
   out, by activation mass.
3. `purity`: the share of its activation mass that falls on them. 1 is a feature of a few words.

A feature that reads a topic need not make the model write it: `output_score` in
steering/teacher_forced.py asks that. Cost: one forward pass over the texts, one encoding a site.
Source: Arad et al., input scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.stats import rankdata
from torch import Tensor

from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site
from steering.sequences import (
    Dictionary,
    SteerableModel,
    arriving,
    device_of,
    encoded,
    forward,
    in_batches,
    padded,
)


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """How one feature tells topical from contrast texts."""

    feature: FeatureId
    auroc: float
    d_prime: float
    active_rate: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The input side of one feature."""

    feature: FeatureId
    density: float
    strong: float
    top_tokens: tuple[int, ...]
    purity: float


@dataclass(frozen=True, kw_only=True, eq=False)
class TextStates:
    """Per site: mean vector and, where a dictionary was given, mean activation of every latent, one
    row a text."""

    vectors: Mapping[Site, Float[Tensor, "text d_model"]]
    latents: Mapping[Site, Float[Tensor, "text latent"]]


def read_texts(
    model: SteerableModel,
    saes: Mapping[Site, object],
    texts: Sequence[str],
    *,
    n_tokens: int = 48,
    batch_size: int = 32,
) -> TextStates:
    """Mean vectors and activations of every text at every site of `saes`."""
    if not texts:
        raise UserError("no texts to read", expected="at least one")
    rows = [encoded(model, text)[:n_tokens] for text in texts]
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
    vectors: dict[Site, list[Tensor]] = {site: [] for site in saes}
    latents: dict[Site, list[Tensor]] = {site: [] for site in saes}
    for block in in_batches(order, batch_size):
        batch = padded([rows[place] for place in block], device=device_of(model))
        with arriving(model, tuple(saes)) as seen:
            forward(model, batch, n_last=1)
        for site, h in seen.items():
            mask = (batch.real & (batch.positions() > 0)).float()
            vectors[site].append(_masked_mean(h.float(), mask))
            encode = getattr(saes[site], "encode", None)
            if encode is not None:
                latents[site].append(
                    _masked_mean(
                        encode(h.reshape(-1, h.shape[-1]).float()).view(*mask.shape, -1), mask
                    )
                )
    back = torch.tensor(np.argsort(order))
    return TextStates(
        vectors={site: torch.cat(parts).cpu()[back] for site, parts in vectors.items()},
        latents={site: torch.cat(parts).cpu()[back] for site, parts in latents.items() if parts},
    )


def rank_features(
    states: TextStates,
    is_topic: Sequence[bool],
    *,
    min_active_rate: float = 0.1,
    n_best: int = 50,
    by: Literal["auroc", "d_prime"] = "auroc",
) -> list[Contrast]:
    """The best features of all sites by AUROC or d′, best first; the other decides between
    equals."""
    topic = np.asarray(is_topic, dtype=bool)
    if not topic.any() or topic.all():
        raise UserError(
            "a contrast needs texts of both kinds",
            found=f"{int(topic.sum())} of {len(topic)} are topical",
        )
    found = [
        contrast
        for site, latents in states.latents.items()
        for contrast in _contrasts(site, latents.numpy(), topic, min_active_rate)
    ]
    second: Literal["auroc", "d_prime"] = "d_prime" if by == "auroc" else "auroc"
    return sorted(found, key=lambda c: (-getattr(c, by), -getattr(c, second), str(c.feature)))[
        :n_best
    ]


def difference_of_means(
    states: TextStates, is_topic: Sequence[bool]
) -> dict[Site, Float[Tensor, "d_model"]]:
    """Topical mean minus contrast mean, per site."""
    topic = torch.as_tensor(list(is_topic), dtype=torch.bool)
    return {
        site: rows[topic].mean(0) - rows[~topic].mean(0) for site, rows in states.vectors.items()
    }


def auroc(
    values: Float[np.ndarray, "text feature"], is_topic: np.ndarray
) -> Float[np.ndarray, "feature"]:
    """P(a topical text has the larger value), ties half."""
    ranks = rankdata(values, axis=0)
    n_topic = int(is_topic.sum())
    n_other = len(is_topic) - n_topic
    return (ranks[is_topic].sum(0) - n_topic * (n_topic + 1) / 2) / (n_topic * n_other)


def profile_features(
    sae: Dictionary,
    site: Site,
    blocks: Iterable[Float[Tensor, "token d_model"]],
    ids: Int64[np.ndarray, "token"],
    latents: Sequence[int],
    *,
    min_rate: float = 0.3,
    max_frequency: float = 0.002,
    n_top: int = 30,
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
            n_top,
        )
        for column, latent in enumerate(latents)
    ]


def _contrasts(
    site: Site, latents: np.ndarray, topic: np.ndarray, min_active_rate: float
) -> list[Contrast]:
    active_rate = (latents[topic] > 0).mean(0)
    kept = np.flatnonzero(active_rate >= min_active_rate)
    if not len(kept):
        return []
    values = latents[:, kept]
    score = auroc(values, topic)
    spread = np.sqrt((values[topic].var(0) + values[~topic].var(0)) / 2)
    d_prime = (values[topic].mean(0) - values[~topic].mean(0)) / np.maximum(spread, 1e-9)
    return [
        Contrast(
            feature=FeatureId(site, int(latent)),
            auroc=float(score[place]),
            d_prime=float(d_prime[place]),
            active_rate=float(active_rate[latent]),
        )
        for place, latent in enumerate(kept)
    ]


def _masked_mean(
    values: Float[Tensor, "batch position n"], mask: Float[Tensor, "batch position"]
) -> Tensor:
    return torch.einsum("bpn,bp->bn", values, mask) / mask.sum(-1, keepdim=True).clamp(min=1)


def _profile(
    feature: FeatureId,
    a: Float[np.ndarray, "token"],
    tokens: Int64[np.ndarray, "kind"],
    inverse: Int64[np.ndarray, "token"],
    counts: Int64[np.ndarray, "kind"],
    usable: np.ndarray,
    min_rate: float,
    n_top: int,
) -> Profile:
    active = a > 0
    mass = np.bincount(inverse, weights=a, minlength=len(tokens))
    n_active = np.bincount(inverse[active], minlength=len(tokens))
    own = usable & (n_active >= 2) & (n_active >= min_rate * counts)
    ranked = np.flatnonzero(own)[np.argsort(-mass[own], kind="stable")][:n_top]
    return Profile(
        feature=feature,
        density=float(active.mean()),
        strong=float(np.quantile(a[active], 0.95)) if active.any() else 0.0,
        top_tokens=tuple(int(token) for token in tokens[ranked]),
        purity=float(mass[ranked].sum() / mass.sum()) if mass.sum() > 0 else 0.0,
    )
