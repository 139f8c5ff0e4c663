"""Audition: which candidates make the model write their own words, and leave it coherent, when
steered along the flow?

1. Lay a plan along each candidate's flow and calibrate it to the stage's middle dose on a little
   neutral text.
2. Continue the openers kept for this with every plan at once; read back with the unsteered model.
3. Best first: text that stays coherent at least half of the time before the rest, then the gain in
   own words.

These openers are used for nothing else (pipeline/lenses/steering/choice.py), so what the stage
reports afterwards is not what was selected on; the features remain selected for being steerable,
and that is said. Cost: three short passes and a few lines a candidate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.concepts.prompts import read_prompts
from data.model.language_model import LanguageModel
from featureflow.sites import Site
from pipeline.lenses.steering.choice import LEAST_COHERENT, own_rate
from sae import Sae
from steering.arms import Flow, Scales, flow_additive
from steering.dose import NeutralText, calibrate
from steering.generation import Sampling, generate
from steering.plan import Plan
from steering.reading import CoherenceLimits, is_coherent, read_back
from steering.schedules import Schedule

_N_NEUTRAL, _TOLERANCE = 5, 0.15


@dataclass(frozen=True, kw_only=True)
class Audition:
    """How a candidate did: own words per 100 tokens without and with steering, share of samples
    coherent."""

    unsteered: float
    steered: float
    coherent: float

    @property
    def merit(self) -> tuple[bool, float]:
        return self.coherent >= LEAST_COHERENT, self.steered - self.unsteered


@dataclass(frozen=True, kw_only=True)
class AuditionOptions:
    """The way of steering that the stage's headline uses, what it is tried on, and what counts as
    coherent."""

    prompts: tuple[str, ...]
    limits: CoherenceLimits
    dose: float
    schedule: Schedule
    sampling: Sampling
    seed: int


def auditioned(
    model: LanguageModel,
    saes: Mapping[Site, Sae],
    norms: Mapping[Site, float],
    candidates: Sequence[tuple[Flow, frozenset[int]]],
    options: AuditionOptions,
) -> list[Audition]:
    """One audition a candidate: (its flow, its own tokens)."""
    neutral = NeutralText.prepare(model, read_prompts().neutral_texts[-_N_NEUTRAL:], n_tokens=32)
    plans = [_calibrated(model, saes, norms, flow, neutral, options) for flow, _ in candidates]
    made = generate(
        model,
        saes,
        options.prompts,
        [None, *plans],
        seed=options.seed + 2,
        sampling=options.sampling,
        batch_size=104,
    ).samples
    readings = read_back(model, saes, made, [], batch_size=48)
    found = []
    for place, (_, own) in enumerate(candidates, 1):
        coherent = [
            is_coherent(r, options.limits)
            for s, r in zip(made, readings, strict=True)
            if s.plan == place
        ]
        found.append(
            Audition(
                unsteered=own_rate([s for s in made if s.plan == 0], own),
                steered=own_rate([s for s in made if s.plan == place], own),
                coherent=sum(coherent) / len(coherent),
            )
        )
    return found


def _calibrated(
    model: LanguageModel,
    saes: Mapping[Site, Sae],
    norms: Mapping[Site, float],
    flow: Flow,
    neutral: NeutralText,
    options: AuditionOptions,
) -> Plan:
    scales = Scales(norms=norms, activations={feature: 1.0 for feature, _ in flow.steps})
    plan = flow_additive(flow, scales, schedule=options.schedule, strength=0.2)
    (found,) = calibrate(
        model, saes, plan, neutral, [options.dose], tolerance=_TOLERANCE, monitor=False
    )
    return plan.with_strength(found.strength, dose=found.measured.kl)
