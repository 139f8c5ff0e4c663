"""A trial: one feature, several arms, several doses, on the same prompts and seeds as unsteered
text.

1. Calibrate every arm's plan to every dose on neutral text; `single_budget` takes the flow's
   coefficient and its dose is measured.
2. Generate from every prompt with the unsteered model and with every plan, from the same random
   numbers.
3. Read everything back with the unsteered model.
4. Pair each steered sample with its unsteered one; report mean differences with a bootstrap over
   prompts.

A dose that no strength reaches is kept as an outcome (`reached` False), generated at the closest
strength, and said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from featureflow.progress import Progress, silent
from featureflow.statistics import Interval, bootstrap_mean
from pipeline.steering_run import Steering
from steering.arms import Flow, Scales, plans_of, with_whole_budget
from steering.dose import Calibrated, Dose, NeutralText, calibrate, measure, persistence
from steering.generation import Sample, Sampling, generate
from steering.plan import Plan
from steering.reading import CoherenceLimits, Reading, Target, is_coherent, read_back
from steering.schedules import Schedule

MEASURES = ("top_tokens", "active", "activation", "nll", "coherent")


@dataclass(frozen=True, kw_only=True)
class ArmDose:
    """One arm at one dose: the plan at its calibrated strength."""

    arm: str
    target: float
    plan: Plan
    outcome: Calibrated
    persistence: float | None


@dataclass(frozen=True, kw_only=True)
class PairedSample:
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


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One feature: every arm at every dose, its samples, and their effects."""

    target: Target
    arm_doses: Sequence[ArmDose]
    pairs: Sequence[PairedSample]
    effects: Sequence[Effect]


def calibrated_arms(
    steering: Steering,
    neutral: NeutralText,
    *,
    arms: Sequence[str],
    doses: Sequence[float],
    flow: Flow,
    control: Flow,
    scales: Scales,
    schedule: Schedule,
    seed: int,
    progress: Progress = silent,
) -> list[ArmDose]:
    """Every arm at every dose."""
    model, saes = steering.model, steering.saes
    plans = plans_of(
        arms, flow, control, scales, d_model=model.d_model, seed=seed, schedule=schedule
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


def run_trials(
    steering: Steering,
    dosed: Sequence[tuple[Target, Sequence[ArmDose]]],
    prompts: Sequence[str],
    limits: CoherenceLimits,
    *,
    n_samples: int,
    seed: int,
    sampling: Sampling,
    batch_size: int = 48,
    progress: Progress = silent,
) -> list[Trial]:
    """Generate and read back every arm and dose of every feature; all share the unsteered
    samples."""

    def written(plans: Sequence[Plan | None]) -> tuple[Sample, ...]:
        return generate(
            steering.model,
            steering.saes,
            prompts,
            plans,
            n_samples=n_samples,
            seed=seed,
            sampling=sampling,
            batch_size=batch_size,
            progress=progress,
        ).samples

    unsteered, targets = written([None]), [target for target, _ in dosed]
    readings = read_back(steering.model, steering.saes, unsteered, targets)
    trials = []
    for place, (target, arm_doses) in enumerate(dosed):
        steered = written([each.plan for each in arm_doses])
        after = read_back(steering.model, steering.saes, steered, [target], progress=progress)
        before = {
            (sample.prompt_index, sample.sample): (sample, reading.of_target(place))
            for sample, reading in zip(unsteered, readings, strict=True)
        }
        pairs = [
            PairedSample(
                arm_dose=arm_doses[sample.plan],
                unsteered=before[sample.prompt_index, sample.sample][0],
                steered=sample,
                before=before[sample.prompt_index, sample.sample][1],
                after=reading,
            )
            for sample, reading in zip(steered, after, strict=True)
        ]
        effects = effects_of(pairs, limits, seed=seed)
        trials.append(Trial(target=target, arm_doses=arm_doses, pairs=pairs, effects=effects))
    return trials


def effects_of(
    pairs: Sequence[PairedSample], limits: CoherenceLimits, *, seed: int
) -> list[Effect]:
    """One effect an arm, dose and measure, in the order in which they come."""
    groups: dict[tuple[str, float], list[PairedSample]] = {}
    for pair in pairs:
        groups.setdefault((pair.arm_dose.arm, pair.arm_dose.target), []).append(pair)
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
    arm: str,
    dose: float,
    name: str,
    members: Sequence[PairedSample],
    limits: CoherenceLimits,
    seed: int,
) -> Effect:
    before = [value_of(name, pair.before, limits) for pair in members]
    after = [value_of(name, pair.after, limits) for pair in members]
    differences = [a - b for a, b in zip(after, before, strict=True)]
    prompts = [pair.steered.prompt_index for pair in members]
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
