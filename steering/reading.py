"""Reading generated text back with the unsteered model: is it still language, and is it about the
feature?

For every sample, over its continuation only:

1. `nll`: mean −log p of its tokens under the unsteered model. Too high is gibberish, too low is a
   loop.
2. `activation`, `active`: the feature's mean activation (in units of its scale) and the share of
   tokens where it is active, read at the feature's site by the unsteered model: the text itself
   must carry the concept, no hook is left.
3. `top_tokens`: how many of 100 tokens are the feature's own (those it is active on in the corpus).
4. `repetition`: the share of 3-grams that are repeats; `squeeze`: zlib-compressed length / length.

`coherence_limits` takes them from unsteered samples, `limits_passing` so that a wanted share of
those keeps them all; `is_coherent` judges by them. Cost: one forward pass a sample.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from featureflow.progress import Progress, silent
from featureflow.sites import FeatureId, Site
from steering.generation import Sample
from steering.sequences import (
    Batch,
    Dictionary,
    SteerableModel,
    device_of,
    encoded,
    forward,
    in_batches,
    padded,
)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What a text should become more of: a feature, its scale (a typical strong activation) and its
    top tokens."""

    feature: FeatureId
    scale: float
    top_tokens: frozenset[int]


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Measurements of one sample. `activation`, `active` and `top_tokens` have one entry a
    target."""

    nll: float
    activation: tuple[float, ...]
    active: tuple[float, ...]
    top_tokens: tuple[float, ...]
    repetition: float
    squeeze: float
    n_tokens: int

    def of_target(self, place: int) -> Reading:
        """The reading with the entries of one target only."""
        return replace(
            self,
            activation=(self.activation[place],),
            active=(self.active[place],),
            top_tokens=(self.top_tokens[place],),
        )


@dataclass(frozen=True, kw_only=True)
class CoherenceLimits:
    """What unsteered text looks like."""

    nll_low: float
    nll_high: float
    repetition_high: float
    squeeze_low: float
    least_tokens: int = 10


def read_back(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    samples: Sequence[Sample],
    targets: Sequence[Target],
    *,
    batch_size: int = 16,
    progress: Progress = silent,
) -> list[Reading]:
    """One reading a sample, in order."""
    readings: list[Reading] = []
    for block in in_batches(samples, batch_size):
        readings += _read_block(model, saes, block, targets)
        progress("read back", len(readings), len(samples))
    return readings


def coherence_limits(unsteered: Sequence[Reading], *, tail: float = 0.05) -> CoherenceLimits:
    """1 % of the likelihood and `tail` of its other end, of the repetition and of the
    compressibility of unsteered samples. Three tails of 5 % fail about one ordinary text in seven,
    of 2.5 % one in thirteen."""
    return CoherenceLimits(
        nll_low=float(np.nanquantile([r.nll for r in unsteered], 0.01)),
        nll_high=float(np.nanquantile([r.nll for r in unsteered], 1 - tail)),
        repetition_high=float(np.quantile([r.repetition for r in unsteered], 1 - tail)),
        squeeze_low=float(np.quantile([r.squeeze for r in unsteered], tail)),
    )


def limits_passing(unsteered: Sequence[Reading], *, share: float) -> CoherenceLimits:
    """The tightest limits, by the tail that all have in common, that at least `share` of these
    samples keep."""
    for tail in np.linspace(1 - share, 0.0, 101):
        limits = coherence_limits(unsteered, tail=float(tail))
        if sum(is_coherent(reading, limits) for reading in unsteered) >= share * len(unsteered):
            break
    return limits


def is_coherent(reading: Reading, limits: CoherenceLimits) -> bool:
    return (
        limits.nll_low <= reading.nll <= limits.nll_high
        and reading.repetition <= limits.repetition_high
        and reading.squeeze >= limits.squeeze_low
        and reading.n_tokens >= limits.least_tokens
    )


def _read_block(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    samples: Sequence[Sample],
    targets: Sequence[Target],
) -> list[Reading]:
    prompts = [encoded(model, sample.prompt) for sample in samples]
    batch = padded(
        [[*prompt, *sample.ids] for prompt, sample in zip(prompts, samples, strict=True)],
        device=device_of(model),
    )
    activations, log_probs = _activations_and_log_probs(model, saes, batch, targets)
    readings = []
    for row, sample in enumerate(samples):
        own = slice(batch.ids.shape[1] - len(sample.ids), None)
        readings.append(
            _reading(sample, log_probs[row, own], [a[row, own] for a in activations], targets)
        )
    return readings


def _activations_and_log_probs(
    model: SteerableModel, saes: Mapping[Site, Dictionary], batch: Batch, targets: Sequence[Target]
) -> tuple[list[Tensor], Tensor]:
    """Per target `[batch, column]`, and the log-probability of every token given those before it
    (the first is 0)."""
    by_site: dict[Site, list[int]] = {}
    for place, target in enumerate(targets):
        by_site.setdefault(target.feature.site, []).append(place)
    found: dict[int, Tensor] = {}

    def reader(site: Site, places: list[int]):  # type: ignore[no-untyped-def]
        def read(h: Tensor) -> Tensor:
            latents = [targets[place].feature.latent for place in places]
            a = saes[site].encode_selected(h.reshape(-1, h.shape[-1]).float(), latents)
            for column, place in enumerate(places):
                found[place] = a[:, column].view(h.shape[:-1])
            return h

        return read

    with model.edited({site: reader(site, places) for site, places in by_site.items()}):
        logits = forward(model, batch)
    following = batch.ids[:, 1:, None]
    chosen = logits[:, :-1].gather(2, following).squeeze(2).float()
    normaliser = torch.stack([row.float().logsumexp(-1) for row in logits[:, :-1]])
    log_probs = torch.nn.functional.pad(chosen - normaliser, (1, 0))
    return [found[place] for place in range(len(targets))], log_probs


def _reading(
    sample: Sample, log_probs: Tensor, activations: Sequence[Tensor], targets: Sequence[Target]
) -> Reading:
    n = len(sample.ids)
    return Reading(
        nll=float(-log_probs.mean()) if n else float("nan"),
        activation=tuple(
            float(a.mean()) / t.scale if n else 0.0
            for a, t in zip(activations, targets, strict=True)
        ),
        active=tuple(float((a > 0).float().mean()) if n else 0.0 for a in activations),
        top_tokens=tuple(
            100 * sum(token in t.top_tokens for token in sample.ids) / max(n, 1) for t in targets
        ),
        repetition=repetition(sample.ids),
        squeeze=squeeze(sample.text),
        n_tokens=n,
    )


def repetition(ids: Sequence[int], order: int = 3) -> float:
    """1 − distinct / all n-grams; 0 for a text shorter than one n-gram."""
    grams = [tuple(ids[i : i + order]) for i in range(len(ids) - order + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def squeeze(text: str) -> float:
    """Compressed length / length in bytes: small for text that repeats itself."""
    content = text.encode()
    return len(zlib.compress(content, 9)) / len(content) if content else 0.0
