"""Features and their flows → steered text beside unsteered text, and a measurement of whether
steering did anything.

1. Settle what counts as coherent, on unsteered text (pipeline/lenses/steering/choice.py).
2. Choose features (pipeline/lenses/steering/selection.py) or take those named.
3. Per feature, calibrate every arm to every dose: nats of KL on neutral text (steering/dose.py).
   Choose the headline's dose on openers that are kept for it.
4. Generate from other openers, steered and unsteered, from the same random numbers; read everything
   back with the unsteered model; paired differences with a bootstrap over prompts
   (steering/trial.py).
5. Write plans, doses, samples, effects and figures; hand the samples to the atlas, which shows
   them.

The headline is settled before the openers it is reported on are used: arm `flow` at the chosen
dose, measured by the feature's own tokens and by how often the feature fires when the unsteered
model reads the text. Output: `plans/*.toml`, `samples.parquet`, `samples.json`, `doses.parquet`,
`effects.parquet`, `features.json`, `choice.json`, `figures/`, `report.html`. Cost: almost all of it
is generation.
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
from data.model.language_model import LanguageModel
from featureflow.progress import Progress
from featureflow.settings import Settings
from pipeline.artifact import SCHEMAS, Artifact, Draft
from pipeline.context import RunContext
from pipeline.describe.features import Features
from pipeline.lenses.steering.choice import (
    N_REPORTABLE,
    Candidate,
    DoseTrial,
    PromptSplit,
    choice_record,
    chosen_dose,
    ordinary_limits,
    prompt_split,
    tried_doses,
)
from pipeline.lenses.steering.report import write_steer_report
from pipeline.lenses.steering.screening import AuditionOptions
from pipeline.lenses.steering.selection import Chosen, SelectionOptions, Sources, choose_features
from pipeline.lenses.steering.session import SteerSession
from pipeline.lenses.steering.tables import (
    HEADLINE_ARM,
    dose_table,
    draw_figures,
    effect_table,
    feature_records,
    has_label,
    headline,
    labels_of,
    sample_table,
    side_by_side,
)
from pipeline.run import Run
from steering.arms import ARMS
from steering.dose import NeutralText
from steering.generation import Generation, Sampling, generate
from steering.plan_files import write_plan
from steering.reading import CoherenceLimits, Reading, read_back
from steering.schedules import Constant, Schedule
from steering.trial import ArmDose, Effect, Twin, calibrated_arms, effects_of, run_trial

KIND, SCHEMA = "steer", SCHEMAS["steer"]


class Config(Settings):
    """Which features are steered, in which ways, how strongly, and on what they are measured."""

    n_features: Annotated[int, Ge(1), Doc("features chosen automatically when none are named")] = 3
    features: Annotated[
        tuple[str, ...], Doc("features to steer with, such as L12/402; empty: choose")
    ] = ()
    arms: Annotated[tuple[str, ...], MinLen(1), Doc("ways of steering: " + ", ".join(ARMS))] = (
        "single",
        "single_budget",
        "copied",
        "flow",
        "flow_closed_loop",
        "random_flow",
    )
    schedule: Annotated[
        Schedule, Doc("how the arm `flow` shares its strength among the layers")
    ] = Constant()
    doses: Annotated[tuple[float, ...], MinLen(1), Doc("nats of KL a token on neutral text")] = (
        0.05,
        0.15,
        0.3,
    )
    n_before: Annotated[int, Ge(0), Doc("layers of the flow before the feature's own")] = 0
    n_after: Annotated[int, Ge(0), Doc("layers of the flow after the feature's own")] = 10
    max_density: Annotated[
        float, Gt(0), Le(1), Doc("a chosen feature fires on at most this share of tokens")
    ] = 0.03
    min_persistence: Annotated[int, Ge(1), Doc("layers that a chosen feature lasts at least")] = 6
    n_rows: Annotated[int, Ge(64), Doc("tokens of the store that features are described from")] = (
        24576
    )
    n_prompts: Annotated[
        int,
        Ge(1),
        Le(N_REPORTABLE),
        Doc("neutral openers that are reported on, drawn by the seed from the test ones"),
    ] = 12
    n_samples: Annotated[int, Ge(1), Doc("samples an opener")] = 1
    n_new_tokens: Annotated[int, Ge(1), Doc("tokens generated a sample")] = 28
    temperature: Annotated[float, Ge(0), Doc("of sampling; 0 takes the likeliest token")] = 0.8
    n_neutral_texts: Annotated[int, Ge(1), Doc("neutral texts that doses are measured on")] = 8
    batch_size: Annotated[int, Ge(1), Doc("samples generated at once")] = 72
    seed: Annotated[int, Ge(0), Doc("of sampling, placebos and intervals")] = 0

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
    digests = {f.name: getattr(inputs, f.name).digest for f in dataclasses.fields(inputs)}
    with Artifact.create(out, kind=KIND, schema=SCHEMA, config=config, inputs=digests) as draft:
        bench = _bench(config, inputs, context)
        chosen, remarks = choose_features(bench.sources, _selection(bench))
        dosed = [_dosed(bench, each) for each in chosen]
        trials = _dose_trials(bench, dosed)
        record = choice_record(bench.split, bench.limits, trials, seed=config.seed)
        _write_json(draft.path / "choice.json", record)
        found = _steer_all(bench, dosed)
        _write(config, inputs, draft, found, chosen_dose(trials), remarks, bench.sources.model)
    return Artifact.open(out, kind=KIND, schema=SCHEMA)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every step of a run needs: its settings, what is steered, which opener serves what, what
    is coherent."""

    config: Config
    sources: Sources
    split: PromptSplit
    limits: CoherenceLimits
    progress: Progress

    @property
    def sampling(self) -> Sampling:
        return _sampling(self.config)


@dataclass(frozen=True, kw_only=True)
class Dosed:
    """A feature with every arm at every dose."""

    chosen: Chosen
    arm_doses: list[ArmDose]


@dataclass(frozen=True, kw_only=True)
class Found(Dosed):
    """What steering it gave."""

    twins: list[Twin]
    effects: list[Effect]


def _bench(config: Config, inputs: Inputs, context: RunContext) -> Bench:
    made_from = {"collect": inputs.collect, "train": inputs.train, "link": inputs.link}
    session = SteerSession.of(Run.of(made_from, context=context))
    sources = dataclasses.replace(
        session.sources, has_label=has_label(Features(inputs.describe.path))
    )
    split = prompt_split(config.n_prompts, config.seed)
    limits = ordinary_limits(
        sources.model,
        sources.saes,
        split,
        sampling=_sampling(config),
        seed=config.seed + 1,
        batch_size=config.batch_size,
    )
    return Bench(
        config=config, sources=sources, split=split, limits=limits, progress=context.progress
    )


def _sampling(config: Config) -> Sampling:
    return Sampling(n_tokens=config.n_new_tokens, temperature=config.temperature)


def _selection(bench: Bench) -> SelectionOptions:
    config = bench.config
    names = [f.name for f in dataclasses.fields(SelectionOptions)]
    audition = AuditionOptions(
        prompts=bench.split.audition,
        limits=bench.limits,
        dose=sorted(config.doses)[len(config.doses) // 2],
        schedule=config.schedule,
        sampling=bench.sampling,
        seed=config.seed,
    )
    return SelectionOptions(
        **{name: getattr(config, name) for name in names if name != "audition"}, audition=audition
    )


def _dosed(bench: Bench, chosen: Chosen) -> Dosed:
    config, sources = bench.config, bench.sources
    texts = read_prompts().neutral_texts[: config.n_neutral_texts]
    arm_doses = calibrated_arms(
        sources.model,
        sources.saes,
        NeutralText.prepare(sources.model, texts, n_tokens=32),
        arms=config.arms,
        doses=config.doses,
        flow=chosen.flow,
        placebo=chosen.placebo,
        scales=chosen.scales,
        schedule=config.schedule,
        seed=config.seed,
        progress=bench.progress,
    )
    return Dosed(chosen=chosen, arm_doses=arm_doses)


def _dose_trials(bench: Bench, dosed: list[Dosed]) -> list[DoseTrial]:
    config, sources = bench.config, bench.sources
    arm = HEADLINE_ARM if HEADLINE_ARM in config.arms else config.arms[0]
    candidates = [
        Candidate(dose=tried.target, plan=tried.plan, own_tokens=each.chosen.target.own_tokens)
        for each in dosed
        for tried in each.arm_doses
        if tried.arm == arm
    ]
    return tried_doses(
        sources.model,
        sources.saes,
        candidates,
        bench.split,
        bench.limits,
        sampling=bench.sampling,
        seed=config.seed + 3,
        batch_size=config.batch_size,
    )


def _steer_all(bench: Bench, dosed: list[Dosed]) -> list[Found]:
    config, model, saes = bench.config, bench.sources.model, bench.sources.saes
    unsteered = generate(
        model,
        saes,
        bench.split.report,
        [None],
        n_samples=config.n_samples,
        seed=config.seed,
        sampling=bench.sampling,
        batch_size=config.batch_size,
    )
    readings = read_back(model, saes, unsteered.samples, [each.chosen.target for each in dosed])
    found = []
    for place, each in enumerate(dosed):
        twins = _twins(bench, each, unsteered, [reading.of_target(place) for reading in readings])
        effects = effects_of(twins, bench.limits, seed=config.seed)
        found.append(
            Found(chosen=each.chosen, arm_doses=each.arm_doses, twins=twins, effects=effects)
        )
    return found


def _twins(bench: Bench, dosed: Dosed, unsteered: Generation, before: list[Reading]) -> list[Twin]:
    config, sources = bench.config, bench.sources
    return run_trial(
        sources.model,
        sources.saes,
        dosed.arm_doses,
        dosed.chosen.target,
        bench.split.report,
        unsteered=unsteered,
        before=before,
        n_samples=config.n_samples,
        seed=config.seed,
        sampling=bench.sampling,
        batch_size=config.batch_size,
        progress=bench.progress,
    )


def _write(
    config: Config,
    inputs: Inputs,
    draft: Draft,
    found: list[Found],
    dose: float,
    remarks: list[str],
    model: LanguageModel,
) -> None:
    tables = {
        "samples": pd.concat(
            [sample_table(each.chosen, each.twins) for each in found], ignore_index=True
        ),
        "doses": pd.concat(
            [dose_table(each.chosen, each.arm_doses) for each in found], ignore_index=True
        ),
        "effects": pd.concat(
            [effect_table(each.chosen, each.arm_doses, each.effects) for each in found],
            ignore_index=True,
        ),
    }
    for name, table in tables.items():
        table.to_parquet(draft.path / f"{name}.parquet", index=False)
    _write_plans(draft.path / "plans", inputs, found, model.fingerprint)
    chosen = [each.chosen for each in found]
    labels = labels_of(Features(inputs.describe.path), chosen)
    records = feature_records(chosen, labels, model.tokenizer.decode)
    _write_json(draft.path / "features.json", {"features": records, "remarks": remarks})
    _write_json(draft.path / "samples.json", side_by_side(tables["samples"]))
    draw_figures(tables["effects"], draft.path / "figures", dose)
    for record in tables["effects"].to_dict(orient="records"):
        draft.write_metrics({str(name): value for name, value in record.items()})
    numbers = headline(tables["effects"], tables["doses"], dose)
    draft.summary.update(numbers)
    write_steer_report(
        draft.path,
        tables["samples"],
        tables["effects"],
        records,
        remarks,
        numbers,
        dose=dose,
        seed=config.seed,
    )


def _write_json(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_plans(folder: Path, inputs: Inputs, found: list[Found], fingerprint: str) -> None:
    folder.mkdir(exist_ok=True)
    digests = {"dictionaries": inputs.train.digest, "graph": inputs.link.digest}
    for each in found:
        for arm_dose in each.arm_doses:
            name = (
                f"{str(each.chosen.flow.seed).replace('/', '-')}_{arm_dose.arm}_{arm_dose.target:g}"
            )
            write_plan(
                dataclasses.replace(arm_dose.plan, digests=digests, model=fingerprint),
                folder / f"{name}.toml",
            )
