"""What the steer stage settles before it reports, and on which prompts: no prompt is used for two
of these things.

1. `prompt_split`: development prompts for the screening of features, for the dose, and for ordinary
   text; the prompts to report on are drawn by the seed from the test prompts, without those that
   were read while the stage was made.
2. `ordinary_limits`: text counts as coherent within limits that nine in ten ordinary (unsteered)
   texts keep.
3. `screened`: a plan along each candidate's flow, at the stage's middle dose, continues the prompts
   kept for this. Best first: text that stays coherent at least half of the time before the rest,
   then the gain in top tokens. The features remain selected for being steerable, and that is said.
4. `chosen_dose`: the headline's dose is that of the ladder at which steering along the flow adds
   most top tokens, among the doses that leave at least half of the text coherent; the smallest
   where none does.

Cost: about a hundred unsteered samples, eight a candidate, and eight a feature and dose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.concepts.prompts import read_prompts
from pipeline.steering_run import Steering
from steering.arms import Flow, Scales, along_flow
from steering.dose import NeutralText, calibrate
from steering.generation import Sample, Sampling, generate
from steering.plan import Plan
from steering.reading import CoherenceLimits, is_coherent, limits_passing, read_back
from steering.schedules import Schedule

LEAST_COHERENT = 0.5
N_REPORTABLE = 122
_ORDINARY_SHARE = 0.9
_N_SCREENING, _N_DOSE = 8, 8
# The doses, the arms and how features are chosen were settled by reading what the first test
# prompts gave.
_N_SEEN = 6
_N_NEUTRAL, _TOLERANCE = 5, 0.15


@dataclass(frozen=True, kw_only=True)
class PromptSplit:
    """Disjoint prompts. `screening`, `dose` and `ordinary` to choose on, `report` to report on."""

    screening: tuple[str, ...]
    dose: tuple[str, ...]
    ordinary: tuple[str, ...]
    report: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Screening:
    """How a candidate did: top tokens in 100 without and with steering, share of samples
    coherent."""

    unsteered: float
    steered: float
    coherent: float

    @property
    def merit(self) -> tuple[bool, float]:
        return self.coherent >= LEAST_COHERENT, self.steered - self.unsteered


@dataclass(frozen=True, kw_only=True)
class ScreeningOptions:
    """The way of steering that the stage's headline uses, what it is tried on, and what counts as
    coherent."""

    prompts: tuple[str, ...]
    limits: CoherenceLimits
    dose: float
    schedule: Schedule
    sampling: Sampling
    seed: int


@dataclass(frozen=True, kw_only=True)
class DoseTrial(Screening):
    """One dose of the ladder on development prompts, mean over features."""

    dose: float

    @property
    def merit(self) -> tuple[bool, float]:
        if self.coherent >= LEAST_COHERENT:
            return True, self.steered - self.unsteered
        return False, -self.dose


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One feature's plan at one dose, and the feature's top tokens."""

    dose: float
    plan: Plan
    top_tokens: frozenset[int]


def prompt_split(n_report: int, seed: int) -> PromptSplit:
    """The prompts of a run. Drawn from `data/concepts/prompts.json`."""
    prompts = read_prompts()
    dev, unseen = prompts.dev, prompts.test[_N_SEEN:]
    drawn = np.random.default_rng(seed).permutation(len(unseen))[:n_report]
    return PromptSplit(
        screening=dev[:_N_SCREENING],
        dose=dev[_N_SCREENING : _N_SCREENING + _N_DOSE],
        ordinary=dev[_N_SCREENING + _N_DOSE :],
        report=tuple(unseen[place] for place in sorted(drawn)),
    )


def ordinary_limits(
    steering: Steering, split: PromptSplit, *, sampling: Sampling, seed: int, batch_size: int
) -> CoherenceLimits:
    """Limits from unsteered text of the prompts kept for that, two samples each."""
    made = generate(
        steering.model,
        steering.saes,
        split.ordinary,
        [None],
        n_samples=2,
        seed=seed,
        sampling=sampling,
        batch_size=batch_size,
    )
    readings = read_back(steering.model, steering.saes, made.samples, [], batch_size=48)
    return limits_passing(readings, share=_ORDINARY_SHARE)


def screened(
    steering: Steering, candidates: Sequence[tuple[Flow, frozenset[int]]], options: ScreeningOptions
) -> list[Screening]:
    """One screening a candidate: (its flow, its top tokens)."""
    texts = read_prompts().neutral_texts[-_N_NEUTRAL:]
    neutral = NeutralText.prepare(steering.model, texts, n_tokens=32)
    plans = [_calibrated(steering, flow, neutral, options) for flow, _ in candidates]
    return [
        Screening(**found)
        for found in _tried(
            steering,
            [(plan, own) for plan, (_, own) in zip(plans, candidates, strict=True)],
            options.prompts,
            options.limits,
            sampling=options.sampling,
            seed=options.seed + 2,
            batch_size=104,
        )
    ]


def tried_doses(
    steering: Steering,
    candidates: Sequence[Candidate],
    split: PromptSplit,
    limits: CoherenceLimits,
    *,
    sampling: Sampling,
    seed: int,
    batch_size: int,
) -> list[DoseTrial]:
    """What every dose among the candidates does on the prompts kept for that, smallest first."""
    found = _tried(
        steering,
        [(candidate.plan, candidate.top_tokens) for candidate in candidates],
        split.dose,
        limits,
        sampling=sampling,
        seed=seed,
        batch_size=batch_size,
    )
    trials = []
    for dose in sorted({candidate.dose for candidate in candidates}):
        rows = [row for each, row in zip(candidates, found, strict=True) if each.dose == dose]
        means = {name: _mean(row[name] for row in rows) for name in rows[0]}
        trials.append(DoseTrial(dose=dose, **means))
    return trials


def chosen_dose(trials: Sequence[DoseTrial]) -> float:
    """The dose of the headline; of equals the smaller."""
    return max(sorted(trials, key=lambda trial: trial.dose), key=lambda trial: trial.merit).dose


def choice_record(
    split: PromptSplit, limits: CoherenceLimits, trials: Sequence[DoseTrial], *, seed: int
) -> dict[str, Any]:
    """`choice.json`: every prompt by its use, the limits, the doses tried and the one chosen."""
    return {
        "seed": seed,
        "prompts": dataclasses.asdict(split),
        "coherence_limits": dataclasses.asdict(limits),
        "doses": [dataclasses.asdict(trial) for trial in trials],
        "least_coherent": LEAST_COHERENT,
        "dose": chosen_dose(trials),
    }


def top_token_rate(samples: Sequence[Sample], top_tokens: frozenset[int]) -> float:
    """Top tokens in 100 tokens."""
    n = sum(len(sample.ids) for sample in samples)
    return 100 * sum(token in top_tokens for s in samples for token in s.ids) / max(n, 1)


def _tried(
    steering: Steering,
    plans: Sequence[tuple[Plan, frozenset[int]]],
    prompts: Sequence[str],
    limits: CoherenceLimits,
    *,
    sampling: Sampling,
    seed: int,
    batch_size: int,
) -> list[dict[str, float]]:
    """Per plan (and the top tokens it should write): their rate without and with it, and the share
    coherent with it."""
    made = generate(
        steering.model,
        steering.saes,
        prompts,
        [None, *(plan for plan, _ in plans)],
        seed=seed,
        sampling=sampling,
        batch_size=batch_size,
    )
    unsteered, found = made.of_plan(0), []
    for place, (_, own) in enumerate(plans, 1):
        samples = made.of_plan(place)
        readings = read_back(steering.model, steering.saes, samples, [], batch_size=48)
        found.append(
            {
                "unsteered": top_token_rate(unsteered, own),
                "steered": top_token_rate(samples, own),
                "coherent": _mean(is_coherent(reading, limits) for reading in readings),
            }
        )
    return found


def _calibrated(
    steering: Steering, flow: Flow, neutral: NeutralText, options: ScreeningOptions
) -> Plan:
    scales = Scales(norms=steering.norms, activations={})
    plan = along_flow(flow, scales, schedule=options.schedule, strength=0.2)
    (found,) = calibrate(
        steering.model,
        steering.saes,
        plan,
        neutral,
        [options.dose],
        tolerance=_TOLERANCE,
        monitor=False,
    )
    return plan.with_strength(found.strength, dose=found.measured.kl)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean([float(value) for value in values]))
