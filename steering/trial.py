"""A trial: one feature, several arms, several doses, on the same prompts and seeds as unsteered
text.

1. Calibrate every arm's plan to every dose on neutral text; `single_budget` takes the flow's
   coefficient and its dose is measured.
2. Generate from every prompt with the unsteered model and with every plan, from the same random
   numbers.
3. Read everything back with the unsteered model.
4. Pair each steered sample with its unsteered twin; report mean differences with a bootstrap over
   prompts.

A dose that no strength reaches is kept as an outcome (`reached` False), generated at the closest
strength, and said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from featureflow.progress import Progress, silent
from featureflow.sites import Site
from featureflow.statistics import Interval, bootstrap_mean
from steering.arms import Flow, Scales, plans_of, with_whole_budget
from steering.dose import Calibrated, Dose, NeutralText, calibrate, measure, persistence
from steering.generation import Generation, Sample, Sampling, generate
from steering.plan import Plan
from steering.protocols import Dictionary, SteerableModel
from steering.reading import CoherenceLimits, Reading, Target, is_coherent, read_back
from steering.schedules import Schedule

MEASURES = ("own_tokens", "active", "activation", "nll", "coherent")


@dataclass(frozen=True, kw_only=True)
class ArmDose:
    """One arm at one dose: the plan at its calibrated strength."""

    arm: str
    target: float
    plan: Plan
    outcome: Calibrated
    persistence: float | None


@dataclass(frozen=True, kw_only=True)
class Twin:
    """A steered sample beside the unsteered one with the same prompt and random numbers, and both
    readings."""

    arm_dose: ArmDose
    unsteered: Sample
    steered: Sample
    before: Reading
    after: Reading


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The mean of a measure over unsteered and steered samples, and of the paired difference with
    its interval."""

    arm: str
    dose: float
    measure: str
    unsteered: float
    steered: float
    difference: Interval


def calibrated_arms(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    neutral: NeutralText,
    *,
    arms: Sequence[str],
    doses: Sequence[float],
    flow: Flow,
    placebo: Flow,
    scales: Scales,
    schedule: Schedule,
    seed: int,
    progress: Progress = silent,
) -> list[ArmDose]:
    """Every arm at every dose."""
    plans = plans_of(
        arms, flow, placebo, scales, d_model=model.d_model, seed=seed, schedule=schedule
    )
    found: list[ArmDose] = []
    for done, (arm, plan) in enumerate(plans.items()):
        progress(f"calibrate {flow.seed}", done, len(plans))
        base = measure(model, saes, plan.with_strength(0.0), neutral)
        outcomes = calibrate(model, saes, plan, neutral, sorted(doses))
        found += [_arm_dose(arm, plan, outcome, base) for outcome in outcomes]
    if "single_budget" in arms:
        for each in [each for each in found if each.arm == "flow"]:
            plan = with_whole_budget(flow, scales, each.plan)
            measured = measure(model, saes, plan, neutral)
            outcome = Calibrated(
                target=each.target, measured=measured, reached=True, n_evaluations=1
            )
            found.append(_arm_dose("single_budget", plan, outcome, measured))
    progress(f"calibrate {flow.seed}", len(plans), len(plans))
    return found


def run_trial(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    arm_doses: Sequence[ArmDose],
    target: Target,
    prompts: Sequence[str],
    *,
    unsteered: Generation,
    before: Sequence[Reading],
    n_samples: int,
    seed: int,
    sampling: Sampling,
    batch_size: int = 48,
    progress: Progress = silent,
) -> list[Twin]:
    """Generate and read back every arm and dose; `unsteered` (plan 0) and its readings of this
    target are given, since all features of a run share them."""
    made = generate(
        model,
        saes,
        prompts,
        [each.plan for each in arm_doses],
        n_samples=n_samples,
        seed=seed,
        sampling=sampling,
        batch_size=batch_size,
        progress=progress,
    )
    after = read_back(model, saes, made.samples, [target], progress=progress)
    twins = {
        (s.prompt_index, s.sample): (s, r)
        for s, r in zip(unsteered.of_plan(0), before, strict=True)
    }
    return [
        Twin(
            arm_dose=arm_doses[sample.plan],
            unsteered=twins[sample.prompt_index, sample.sample][0],
            steered=sample,
            before=twins[sample.prompt_index, sample.sample][1],
            after=reading,
        )
        for sample, reading in zip(made.samples, after, strict=True)
    ]


def effects_of(twins: Sequence[Twin], limits: CoherenceLimits, *, seed: int) -> list[Effect]:
    """One effect an arm, dose and measure, in the order in which they come."""
    groups: dict[tuple[str, float], list[Twin]] = {}
    for twin in twins:
        groups.setdefault((twin.arm_dose.arm, twin.arm_dose.target), []).append(twin)
    return [
        _effect(arm, dose, name, members, limits, seed)
        for (arm, dose), members in groups.items()
        for name in MEASURES
    ]


def value_of(measure_name: str, reading: Reading, limits: CoherenceLimits) -> float:
    """One measure of one reading of one target."""
    match measure_name:
        case "coherent":
            return float(is_coherent(reading, limits))
        case "nll":
            return reading.nll
        case _:
            return float(getattr(reading, measure_name)[0])


def _effect(
    arm: str, dose: float, name: str, members: Sequence[Twin], limits: CoherenceLimits, seed: int
) -> Effect:
    before = [value_of(name, twin.before, limits) for twin in members]
    after = [value_of(name, twin.after, limits) for twin in members]
    differences = [a - b for a, b in zip(after, before, strict=True)]
    prompts = [twin.steered.prompt_index for twin in members]
    return Effect(
        arm=arm,
        dose=dose,
        measure=name,
        unsteered=sum(before) / len(before),
        steered=sum(after) / len(after),
        difference=bootstrap_mean(differences, [prompts], seed=seed),
    )


def _arm_dose(arm: str, plan: Plan, outcome: Calibrated, base: Dose) -> ArmDose:
    return ArmDose(
        arm=arm,
        target=outcome.target,
        plan=plan.with_strength(outcome.strength, dose=outcome.measured.kl),
        outcome=outcome,
        persistence=persistence(outcome.measured.report, base.report),
    )
