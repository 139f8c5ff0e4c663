"""What the steer stage settles before it reports, and on which prompts: no prompt is used for two
of these things.

1. `prompt_split`: development openers for the audition of features, for the dose, and for ordinary
   text; the openers to report on are drawn by the seed from the test openers, without those that
   were read while the stage was made.
2. `ordinary_limits`: text counts as coherent within limits that nine in ten ordinary (unsteered)
   texts keep.
3. `chosen_dose`: the headline's dose is that of the ladder at which steering along the flow adds
   most own words, among the doses that leave at least half of the text coherent; the smallest where
   none does.

Cost: about a hundred unsteered and eight samples a feature and dose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.concepts.prompts import read_prompts
from featureflow.sites import Site
from sae import Sae
from steering.generation import Sample, Sampling, generate
from steering.plan import Plan
from steering.protocols import SteerableModel
from steering.reading import CoherenceLimits, is_coherent, limits_passing, read_back

LEAST_COHERENT = 0.5
N_REPORTABLE = 122
_ORDINARY_SHARE = 0.9
_N_AUDITION, _N_DOSE = 8, 8
# The doses, the arms and how features are chosen were settled by reading what the first test
# openers gave.
_N_SEEN = 6


@dataclass(frozen=True, kw_only=True)
class PromptSplit:
    """Disjoint openers. `audition`, `dose` and `ordinary` to choose on, `report` to report on."""

    audition: tuple[str, ...]
    dose: tuple[str, ...]
    ordinary: tuple[str, ...]
    report: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DoseTrial:
    """One dose of the ladder on development prompts: own words in 100 tokens, mean over features;
    share coherent."""

    dose: float
    unsteered: float
    steered: float
    coherent: float

    @property
    def merit(self) -> tuple[bool, float]:
        return (
            (True, self.steered - self.unsteered)
            if self.coherent >= LEAST_COHERENT
            else (False, -self.dose)
        )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One feature's plan at one dose, and the feature's own tokens."""

    dose: float
    plan: Plan
    own_tokens: frozenset[int]


def prompt_split(n_report: int, seed: int) -> PromptSplit:
    """The openers of a run. Drawn from `data/concepts/prompts.json`."""
    prompts = read_prompts()
    dev, unseen = prompts.dev, prompts.test[_N_SEEN:]
    drawn = np.random.default_rng(seed).permutation(len(unseen))[:n_report]
    return PromptSplit(
        audition=dev[:_N_AUDITION],
        dose=dev[_N_AUDITION : _N_AUDITION + _N_DOSE],
        ordinary=dev[_N_AUDITION + _N_DOSE :],
        report=tuple(unseen[place] for place in sorted(drawn)),
    )


def ordinary_limits(
    model: SteerableModel,
    saes: Mapping[Site, Sae],
    split: PromptSplit,
    *,
    sampling: Sampling,
    seed: int,
    batch_size: int,
) -> CoherenceLimits:
    """Limits from unsteered text of the openers kept for that, two samples each."""
    made = generate(
        model,
        saes,
        split.ordinary,
        [None],
        n_samples=2,
        seed=seed,
        sampling=sampling,
        batch_size=batch_size,
    )
    return limits_passing(
        read_back(model, saes, made.samples, [], batch_size=48), share=_ORDINARY_SHARE
    )


def tried_doses(
    model: SteerableModel,
    saes: Mapping[Site, Sae],
    candidates: Sequence[Candidate],
    split: PromptSplit,
    limits: CoherenceLimits,
    *,
    sampling: Sampling,
    seed: int,
    batch_size: int,
) -> list[DoseTrial]:
    """What every dose among the candidates does on the openers kept for that, smallest first."""
    plans = [None, *(candidate.plan for candidate in candidates)]
    samples = generate(
        model, saes, split.dose, plans, seed=seed, sampling=sampling, batch_size=batch_size
    ).samples
    by_plan: dict[int, list[Sample]] = {}
    for sample in samples:
        by_plan.setdefault(sample.plan, []).append(sample)
    trials = []
    for dose in sorted({candidate.dose for candidate in candidates}):
        members = [(place, each) for place, each in enumerate(candidates, 1) if each.dose == dose]
        steered = [sample for place, _ in members for sample in by_plan[place]]
        readings = read_back(model, saes, steered, [], batch_size=48)
        trials.append(
            DoseTrial(
                dose=dose,
                unsteered=_mean(own_rate(by_plan[0], each.own_tokens) for _, each in members),
                steered=_mean(own_rate(by_plan[place], each.own_tokens) for place, each in members),
                coherent=_mean(is_coherent(reading, limits) for reading in readings),
            )
        )
    return trials


def chosen_dose(trials: Sequence[DoseTrial]) -> float:
    """The dose of the headline; of equals the smaller."""
    return max(sorted(trials, key=lambda trial: trial.dose), key=lambda trial: trial.merit).dose


def choice_record(
    split: PromptSplit, limits: CoherenceLimits, trials: Sequence[DoseTrial], *, seed: int
) -> dict[str, Any]:
    """`choice.json`: every opener by its use, the limits, the doses tried and the one chosen."""
    return {
        "seed": seed,
        "openers": dataclasses.asdict(split),
        "coherence_limits": dataclasses.asdict(limits),
        "doses": [dataclasses.asdict(trial) for trial in trials],
        "least_coherent": LEAST_COHERENT,
        "dose": chosen_dose(trials),
    }


def own_rate(samples: Sequence[Sample], own: frozenset[int]) -> float:
    """Own words per 100 tokens."""
    n = sum(len(sample.ids) for sample in samples)
    return 100 * sum(token in own for sample in samples for token in sample.ids) / max(n, 1)


def _mean(values: Any) -> float:
    return float(np.mean([float(value) for value in values]))
