"""Features and their flows → steered text beside unsteered text, and a measurement of whether
steering did anything.

1. Settle what counts as coherent, on unsteered text (pipeline/lenses/steering/screening.py).
2. Choose features (pipeline/lenses/steering/selection.py) or take those named.
3. Per feature, calibrate every arm to every dose: nats of KL on neutral text (steering/dose.py).
   Choose the headline's dose on prompts that are kept for it.
4. Generate from other prompts, steered and unsteered, from the same random numbers; read everything
   back with the unsteered model; paired differences with a bootstrap over prompts
   (pipeline/lenses/steering/trial.py).
5. Two designed pushes and one removal as whole examples, drawn by the seed
   (pipeline/lenses/steering/examples.py).
6. Write plans, doses, samples, effects and figures. The measured part is a finding
   (pipeline/findings.py); the atlas shows it and the samples.

The headline is settled before the prompts it is reported on are used: arm `flow` at the chosen
dose, measured by the feature's top tokens and by how often the feature is active when the unsteered
model reads the text. Output: a finding (`tables/effects`, `tables/doses`, `columns`, `figure`,
`text.md`), `plans/*.toml`, `samples.parquet`, `samples.json`, `examples.json`, `features.json`,
`choice.json`, `figures/`, `report.html`. Cost: almost all of it is generation.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import pandas as pd
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import model_validator
from typing_extensions import Doc

from data.concepts.prompts import read_prompts
from featureflow.figures import save
from featureflow.settings import Settings
from pipeline.artifact import SCHEMAS, Artifact, Draft
from pipeline.context import RunContext
from pipeline.findings import write_finding
from pipeline.lenses.steering.examples import Example, Writing, make_examples
from pipeline.lenses.steering.figures import effects_at, tradeoff
from pipeline.lenses.steering.report import write_steer_report
from pipeline.lenses.steering.screening import (
    N_REPORTABLE,
    Candidate,
    DoseTrial,
    PromptSplit,
    ScreeningOptions,
    choice_record,
    chosen_dose,
    ordinary_limits,
    prompt_split,
    tried_doses,
)
from pipeline.lenses.steering.selection import Chosen, SelectionOptions, choose_features
from pipeline.lenses.steering.tables import (
    HEADLINE_ARM,
    dose_table,
    effect_table,
    feature_records,
    finding_of,
    has_label,
    labels_of,
    sample_table,
    side_by_side,
)
from pipeline.lenses.steering.trial import ArmDose, Trial, calibrated_arms, run_trials
from pipeline.run import Run
from pipeline.steering_run import Steering
from steering.arms import ARMS
from steering.dose import NeutralText
from steering.generation import Sampling
from steering.plan_files import write_plan
from steering.reading import CoherenceLimits
from steering.schedules import Constant, Schedule

KIND, SCHEMA = "steer", SCHEMAS["steer"]


class Config(Settings):
    """Which features are steered, in which ways, how strongly, and on what they are measured."""

    n_features: Annotated[int, Ge(1), Doc("features chosen automatically when none are named")] = 3
    features: Annotated[
        tuple[str, ...], Doc("features to steer with, such as L12/402; empty: choose")
    ] = ()
    arms: Annotated[tuple[str, ...], MinLen(1), Doc("ways of steering: " + ", ".join(ARMS))] = (
        "single",
        "copied",
        "flow",
        "flow_closed_loop",
        "random_flow",
    )
    schedule: Annotated[
        Schedule, Doc("how the arm `flow` shares its strength among the layers")
    ] = Constant()
    doses: Annotated[tuple[float, ...], MinLen(1), Doc("nats of KL a token on neutral text")] = (
        0.15,
        0.3,
    )
    n_before: Annotated[int, Ge(0), Doc("layers of the flow before the feature's own")] = 0
    n_after: Annotated[int, Ge(0), Doc("layers of the flow after the feature's own")] = 10
    max_density: Annotated[
        float, Gt(0), Le(1), Doc("a chosen feature is active on at most this share of tokens")
    ] = 0.03
    min_persistence: Annotated[int, Ge(1), Doc("layers that a chosen feature lasts at least")] = 6
    n_rows: Annotated[int, Ge(64), Doc("tokens of the store that features are described from")] = (
        24576
    )
    n_prompts: Annotated[
        int,
        Ge(1),
        Le(N_REPORTABLE),
        Doc("neutral prompts that are reported on, drawn by the seed from the test ones"),
    ] = 12
    n_samples: Annotated[int, Ge(1), Doc("samples an prompt")] = 1
    n_new_tokens: Annotated[int, Ge(1), Doc("tokens generated a sample")] = 28
    temperature: Annotated[float, Ge(0), Doc("of sampling; 0 takes the likeliest token")] = 0.8
    n_example_tokens: Annotated[
        int,
        Ge(0),
        Doc("tokens of the three examples (two designed pushes, one removal); 0 leaves them out"),
    ] = 60
    n_neutral_texts: Annotated[int, Ge(1), Doc("neutral texts that doses are measured on")] = 8
    batch_size: Annotated[int, Ge(1), Doc("samples generated at once")] = 72
    seed: Annotated[int, Ge(0), Doc("of sampling, random controls and intervals")] = 0

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if unknown := [arm for arm in self.arms if arm not in ARMS]:
            raise ValueError(f"no such arm: {', '.join(unknown)}; there are {', '.join(ARMS)}")
        if "single_budget" in self.arms and "flow" not in self.arms:
            raise ValueError(
                "the arm single_budget takes its strength from the arm flow: add flow to arms"
            )
        if any(dose <= 0 for dose in self.doses):
            raise ValueError("doses are positive numbers of nats")
        return self


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is steered, and along what."""

    collect: Artifact
    train: Artifact
    link: Artifact
    describe: Artifact


def run(config: Config, inputs: Inputs, out: Path, context: RunContext) -> Artifact:
    """Steer and measure. Raises UserError."""
    made_from = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    digests = {stage: artifact.digest for stage, artifact in made_from.items()}
    with Artifact.create(out, kind=KIND, schema=SCHEMA, config=config, inputs=digests) as draft:
        opened = Run.of(made_from, context=context)
        job = _job(config, opened.steering, context)
        chosen, remarks = choose_features(job.steering, _selection(job, opened))
        dosed = [(each, _arm_doses(job, each)) for each in chosen]
        doses = _dose_trials(job, dosed)
        writing = _example_writing(job) if config.n_example_tokens else None
        record = choice_record(job.split, job.limits, doses, seed=config.seed)
        record["example_limits"] = writing and dataclasses.asdict(writing.limits)
        _write_json(draft.path / "choice.json", record)
        trials = run_trials(
            job.steering,
            [(each.target, arm_doses) for each, arm_doses in dosed],
            job.split.report,
            job.limits,
            n_samples=config.n_samples,
            seed=config.seed,
            sampling=job.sampling,
            batch_size=config.batch_size,
            progress=context.progress,
        )
        examples, more = _examples(job, opened, writing)
        labels = labels_of(opened, chosen)
        _write(job, draft, chosen, trials, chosen_dose(doses), [*remarks, *more], labels, examples)
    return Artifact.open(out, kind=KIND, schema=SCHEMA)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What every step needs: the settings, what is steered, which prompt serves what, what is
    coherent."""

    config: Config
    steering: Steering
    split: PromptSplit
    limits: CoherenceLimits
    context: RunContext

    @property
    def sampling(self) -> Sampling:
        return _sampling(self.config)


def _job(config: Config, steering: Steering, context: RunContext) -> _Job:
    split = prompt_split(config.n_prompts, config.seed)
    limits = _limits(config, steering, split, _sampling(config))
    return _Job(config=config, steering=steering, split=split, limits=limits, context=context)


def _limits(
    config: Config, steering: Steering, split: PromptSplit, sampling: Sampling
) -> CoherenceLimits:
    """Longer text repeats more and compresses better: each length has limits of its own."""
    return ordinary_limits(
        steering, split, sampling=sampling, seed=config.seed + 1, batch_size=config.batch_size
    )


def _sampling(config: Config) -> Sampling:
    return Sampling(n_tokens=config.n_new_tokens, temperature=config.temperature)


def _selection(job: _Job, run: Run) -> SelectionOptions:
    config = job.config
    named = {f.name for f in dataclasses.fields(SelectionOptions)} & set(Config.model_fields)
    screening = ScreeningOptions(
        prompts=job.split.screening,
        limits=job.limits,
        dose=sorted(config.doses)[len(config.doses) // 2],
        schedule=config.schedule,
        sampling=job.sampling,
        seed=config.seed,
    )
    return SelectionOptions(
        **{name: getattr(config, name) for name in named},
        screening=screening,
        has_label=has_label(run),
    )


def _arm_doses(job: _Job, chosen: Chosen) -> list[ArmDose]:
    config, model = job.config, job.steering.model
    texts = read_prompts().neutral_texts[: config.n_neutral_texts]
    return calibrated_arms(
        job.steering,
        NeutralText.prepare(model, texts, n_tokens=32),
        arms=config.arms,
        doses=config.doses,
        flow=chosen.flow,
        control=chosen.control,
        scales=chosen.scales,
        schedule=config.schedule,
        seed=config.seed,
        progress=job.context.progress,
    )


def _dose_trials(job: _Job, dosed: list[tuple[Chosen, list[ArmDose]]]) -> list[DoseTrial]:
    config = job.config
    arm = HEADLINE_ARM if HEADLINE_ARM in config.arms else config.arms[0]
    candidates = [
        Candidate(dose=tried.target, plan=tried.plan, top_tokens=chosen.target.top_tokens)
        for chosen, arm_doses in dosed
        for tried in arm_doses
        if tried.arm == arm
    ]
    return tried_doses(
        job.steering,
        candidates,
        job.split,
        job.limits,
        sampling=job.sampling,
        seed=config.seed + 3,
        batch_size=config.batch_size,
    )


def _examples(job: _Job, run: Run, writing: Writing | None) -> tuple[list[Example], list[str]]:
    """Two designed pushes and one removal on the report's prompts, doses chosen on others."""
    split = job.split
    if writing is None:
        return [], []
    return make_examples(run, split.report, (*split.screening, *split.dose), writing)


def _example_writing(job: _Job) -> Writing:
    """How examples are written, and what is coherent at their length."""
    config = job.config
    sampling = Sampling(n_tokens=config.n_example_tokens, temperature=config.temperature)
    limits = _limits(config, job.steering, job.split, sampling)
    return Writing(sampling=sampling, limits=limits, seed=config.seed)


def _write(
    job: _Job,
    draft: Draft,
    chosen: list[Chosen],
    trials: list[Trial],
    dose: float,
    remarks: list[str],
    labels: dict[str, str],
    examples: list[Example],
) -> None:
    samples, doses, effects = (
        pd.concat([table_of(trial) for trial in trials], ignore_index=True)
        for table_of in (sample_table, dose_table, effect_table)
    )
    samples.to_parquet(draft.path / "samples.parquet", index=False)
    _write_json(draft.path / "samples.json", side_by_side(samples))
    _write_plans(draft.path / "plans", job.steering, trials)
    for place, example in enumerate(examples):
        write_plan(example.plan, draft.path / "plans" / f"example_{place}.toml")
    _write_json(draft.path / "examples.json", [example.as_record() for example in examples])
    records = feature_records(chosen, labels, job.steering.model.tokenizer.decode)
    _write_json(draft.path / "features.json", {"features": records, "remarks": remarks})
    finding = finding_of(effects, doses, dose, remarks)
    write_finding(finding, draft.path, name=KIND, title="steering along the flow")
    (draft.path / "figures").mkdir()
    save(tradeoff(effects), draft.path / "figures" / "concept_and_fluency.png")
    save(effects_at(effects, measure="active", target=dose), draft.path / "figures" / "effects.png")
    for record in effects.to_dict(orient="records"):
        draft.write_metrics({str(name): value for name, value in record.items()})
    draft.summary.update(finding.headline)
    write_steer_report(
        draft.path,
        samples,
        effects,
        records,
        remarks,
        finding.headline,
        dose=dose,
        seed=job.config.seed,
        examples=[example.as_record() for example in examples],
    )


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_plans(folder: Path, steering: Steering, trials: list[Trial]) -> None:
    folder.mkdir(exist_ok=True)
    for trial in trials:
        feature = str(trial.target.feature).replace("/", "-")
        for each in trial.arm_doses:
            path = folder / f"{feature}_{each.arm}_{each.target:g}.toml"
            write_plan(steering.signed(each.plan), path)
