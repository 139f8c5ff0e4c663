"""The steering study: does steering along the flow beat its controls at equal dose? Development,
lock, test, resumable.

1. `develop`: per topic and arm, calibrate to every dose, score `dev` texts teacher-forced
   (selectivity) and generate from `dev` prompts at every dose. Every result is a file; a second run
   goes on where the first stopped. Doses of activation are nats on neutral text; those of
   suppression, which does nothing there, are nats on the topic's texts.
2. `lock`: per topic and arm take the dose with the largest share of samples that succeed and stay
   coherent, among doses whose samples are coherent at least `min_coherent` as often as unsteered
   ones (ties: lower dose). None: the arm is vacuous there and counts as unsteered. Plans,
   thresholds and limits go into one file with its own checksum.
3. `test`: refuses to run without an intact lock; generates from `test` prompts and scores `test`
   texts with what the lock says, nothing else. Suppression runs on topical prompts. Results of an
   earlier lock are made again.

A folder belongs to one choice of sizes, model and dictionaries (`choices.json`); only topics may be
added.

Sizes and arms: options.py; topics and samples: pipeline/lenses/steering/topics.py and
topic_samples.py; the choice: choice.py; statistics and report: report.py. Cost: `cost_of` says
before.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.steering_study.choice import checksum, choose_dose, with_whole_budget
from benchmarks.steering_study.options import (
    ACTIVATION_ARMS,
    ARMS,
    N_NEUTRAL_TEXTS,
    N_NEUTRAL_TOKENS,
    PROMPTED,
    SUPPRESSION_ARMS,
    UNSTEERED,
    WHOLE_BUDGET,
    StudyOptions,
    cost_of,
)
from data.concepts.prompts import read_prompts
from featureflow.errors import Problem, UserError
from featureflow.progress import Progress, silent
from pipeline.lenses.steering.topic_samples import TopicSampler
from pipeline.lenses.steering.topics import TopicSetup, set_up_topic
from pipeline.steering_run import Steering
from steering.arms import Flow, along_flow, along_vectors, copied, random_direction, single
from steering.dose import Calibrated, NeutralText, calibrate, measure
from steering.edits import Cap, Floor
from steering.generation import Sample
from steering.plan import Plan
from steering.plan_files import plan_document, plan_of_document
from steering.reading import CoherenceLimits, coherence_limits
from steering.schedules import CosineProduct, Exponential
from steering.teacher_forced import log_likelihoods, selectivity

__all__ = ["Study", "StudyOptions", "choose_dose", "cost_of", "with_whole_budget"]
SCHEMA = 2
_MAY_CHANGE = ("topics", "batch_size")


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study in a folder."""

    steering: Steering
    options: StudyOptions
    folder: Path
    made_from: Mapping[str, str] = field(default_factory=dict)
    progress: Progress = silent

    @property
    def lock_path(self) -> Path:
        return self.folder / "lock.json"

    @cached_property
    def sampler(self) -> TopicSampler:
        return TopicSampler(model=self.steering.model, saes=self.steering.saes, sizes=self.options)

    @cached_property
    def _setups(self) -> dict[str, TopicSetup]:
        return {}

    def _setup(self, topic: str) -> TopicSetup:
        if topic not in self._setups:
            self._setups[topic] = set_up_topic(self.steering, topic, seed=self.options.seed)
        return self._setups[topic]

    @cached_property
    def neutral(self) -> NeutralText:
        texts = read_prompts().neutral_texts[:N_NEUTRAL_TEXTS]
        return NeutralText.prepare(self.steering.model, texts, n_tokens=N_NEUTRAL_TOKENS)

    def develop(self) -> None:
        """Stage 1. Results go to `dev/<topic>/<arm>.json`. Raises UserError in a folder of other
        choices."""
        self._claim_folder()
        for done, topic in enumerate(self.options.topics):
            self.progress("develop", done, len(self.options.topics))
            if not self._missing("dev", topic, (UNSTEERED, *ARMS)):
                continue
            setup = self._setup(topic)
            self._write("dev", topic, "setup", describe_setup(setup))
            base = self._once("dev", topic, UNSTEERED, lambda s=setup: self._unsteered(s))
            self._develop_arms(setup, ACTIVATION_ARMS, base, self.neutral)
            on_topic = self.sampler.texts(topic, "dev")[0]
            topical = NeutralText.prepare(self.steering.model, on_topic, n_tokens=N_NEUTRAL_TOKENS)
            self._develop_arms(setup, SUPPRESSION_ARMS, base, topical)

    def lock(self) -> dict[str, Any]:
        """Stage 2. Writes and returns the lock."""
        chosen = {topic: self._locked_topic(topic) for topic in self.options.topics}
        content = {"schema": SCHEMA, "options": asdict(self.options), "topics": chosen}
        document = {**content, "sha256": checksum(content)}
        self.lock_path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return document

    def read_lock(self) -> dict[str, Any]:
        """The lock, intact. Raises UserError otherwise."""
        if not self.lock_path.is_file():
            raise UserError(
                "nothing is locked yet",
                where=str(self.lock_path),
                fix="run the development part first",
            )
        document = json.loads(self.lock_path.read_text(encoding="utf-8"))
        content = {key: value for key, value in document.items() if key != "sha256"}
        if document.get("sha256") != checksum(content):
            raise UserError(
                "the lock was changed after it was made",
                where=str(self.lock_path),
                fix="lock again",
            )
        return document

    def test(self) -> None:
        """Stage 3. Results go to `test/<topic>/<arm>.json`."""
        lock = self.read_lock()
        self._claim_folder()
        for done, (topic, locked) in enumerate(lock["topics"].items()):
            self.progress("test", done, len(lock["topics"]))
            if not self._missing("test", topic, (UNSTEERED, PROMPTED, WHOLE_BUDGET, *ARMS)):
                continue
            setup = self._setup(topic)
            self._once(
                "test", topic, UNSTEERED, lambda s=setup, k=locked: self._test_unsteered(s, k)
            )
            self._once("test", topic, PROMPTED, lambda s=setup, k=locked: self._test_prompt(s, k))
            self._test_arms(setup, locked, (*ACTIVATION_ARMS, WHOLE_BUDGET))
            self._test_arms(setup, locked, SUPPRESSION_ARMS)

    def _develop_arms(
        self, setup: TopicSetup, arms: Sequence[str], base: Mapping[str, Any], scale: NeutralText
    ) -> None:
        """Calibrate and screen the arms that have no result yet, then generate all their doses at
        once."""
        missing = self._missing("dev", setup.topic, arms)
        if not missing:
            return
        topical, contrast = self.sampler.texts(setup.topic, "dev")
        before = log_likelihoods(self.steering.model, [*topical, *contrast])
        screened = {arm: self._screened(setup, arm, scale, before) for arm in missing}
        plans = [
            self._plans(setup)[arm].with_strength(entry["strength"])
            for arm, entries in screened.items()
            for entry in entries
        ]
        made = iter(self._samples(arms[0], setup.topic, "dev", plans))
        limits = CoherenceLimits(**base["limits"])
        for arm, entries in screened.items():
            for entry in entries:
                entry["records"] = self._records(setup, next(made), limits, base["threshold"])
            document = {
                "arm": arm,
                "plan": plan_document(self._plans(setup)[arm]),
                "doses": entries,
            }
            self._write("dev", setup.topic, arm, document)

    def _plans(self, setup: TopicSetup) -> dict[str, Plan]:
        return study_plans(setup, self.steering.model.d_model, self.options.seed)

    def _samples(
        self, arm: str, topic: str, split: str, plans: Sequence[Plan | None]
    ) -> list[tuple[Sample, ...]]:
        """The samples of each plan, from the prompts of such an arm."""
        return self.sampler.samples(topic, split, plans, topical=arm in SUPPRESSION_ARMS)

    def _records(
        self,
        setup: TopicSetup,
        samples: Sequence[Sample],
        limits: CoherenceLimits,
        threshold: float,
    ) -> list[dict[str, Any]]:
        return self.sampler.records(setup.classifier, setup.lexicon, samples, limits, threshold)

    def _screened(
        self, setup: TopicSetup, arm: str, scale: NeutralText, before: Sequence[float]
    ) -> list[dict[str, Any]]:
        steering, plan = self.steering, self._plans(setup)[arm]
        outcomes = calibrate(
            steering.model,
            steering.saes,
            plan,
            scale,
            self.options.doses,
            tolerance=self.options.dose_tolerance,
            max_evaluations=5,
            monitor=False,
        )
        texts = self.sampler.texts(setup.topic, "dev")
        return [
            _entry(
                outcome,
                selectivity(
                    steering.model, steering.saes, _at(plan, outcome), *texts, unsteered=before
                ).score,
            )
            for outcome in outcomes
        ]

    def _unsteered(self, setup: TopicSetup) -> dict[str, Any]:
        """Unsteered samples: success threshold and coherence limits, and the noise floor from a
        second seed."""
        made, again = self.sampler.unsteered("dev"), self.sampler.unsteered("dev", seed_shift=1)
        limits = coherence_limits(self.sampler.read(made))
        threshold = setup.classifier.threshold_on([sample.text for sample in (*made, *again)])
        return {
            "limits": asdict(limits),
            "threshold": threshold,
            "records": self._records(setup, made, limits, threshold),
            "noise_floor": self._records(setup, again, limits, threshold),
        }

    def _locked_topic(self, topic: str) -> dict[str, Any]:
        base = self._read_json("dev", topic, UNSTEERED)
        usual = float(
            np.mean(
                [record["coherent"] for record in base.get("noise_floor", [{"coherent": True}])]
            )
        )
        arms = {}
        for arm in ARMS:
            found = self._read_json("dev", topic, arm)
            choice = choose_dose(found["doses"], arm, self.options.min_coherent, usual=usual)
            arms[arm] = {"plan": found["plan"], "choice": choice}
        return {"limits": base["limits"], "threshold": base["threshold"], "arms": arms}

    def _test_unsteered(self, setup: TopicSetup, locked: Mapping[str, Any]) -> dict[str, Any]:
        limits, threshold = CoherenceLimits(**locked["limits"]), locked["threshold"]
        (topical,) = self._samples(SUPPRESSION_ARMS[0], setup.topic, "test", [None])
        return {
            "records": self._records(setup, self.sampler.unsteered("test"), limits, threshold),
            "topical_records": self._records(setup, topical, limits, threshold),
        }

    def _test_prompt(self, setup: TopicSetup, locked: Mapping[str, Any]) -> dict[str, Any]:
        """The arm that only asks: a sentence about the topic before every prompt."""
        prefix = f"This text is about {setup.topic}. "
        prompts = [prefix + prompt for prompt in self.sampler.prompts(setup.topic, "test")]
        (made,) = self.sampler.generated(prompts, [None], n_samples=self.options.n_samples)
        limits = CoherenceLimits(**locked["limits"])
        return {"records": self._records(setup, made, limits, locked["threshold"])}

    def _test_arms(self, setup: TopicSetup, locked: Mapping[str, Any], arms: Sequence[str]) -> None:
        """All arms that have no result yet, generated at once."""
        whole = with_whole_budget(locked)
        chosen: dict[str, Plan] = {}
        for arm in self._missing("test", setup.topic, arms):
            plan = _locked_plan(self._plans(setup), whole if arm == WHOLE_BUDGET else locked, arm)
            if plan is None:
                self._write("test", setup.topic, arm, {"vacuous": True})
            else:
                chosen[arm] = plan
        made = self._samples(arms[0], setup.topic, "test", list(chosen.values()))
        limits = CoherenceLimits(**locked["limits"])
        for (arm, plan), samples in zip(chosen.items(), made, strict=True):
            records = self._records(setup, samples, limits, locked["threshold"])
            self._write(
                "test",
                setup.topic,
                arm,
                {**self._tested(setup, locked, arm, plan), "records": records},
            )

    def _tested(
        self, setup: TopicSetup, locked: Mapping[str, Any], arm: str, plan: Plan
    ) -> dict[str, Any]:
        steering = self.steering
        changed = selectivity(
            steering.model, steering.saes, plan, *self.sampler.texts(setup.topic, "test")
        )
        named = locked["arms"]["flow" if arm == WHOLE_BUDGET else arm]["choice"]
        kl = measure(steering.model, steering.saes, plan, self.neutral, monitor=False).kl
        return {"vacuous": False, "dose": named["dose"], "kl": kl, "selectivity": changed.score}

    def _claim_folder(self) -> None:
        """Results that are there are kept, so they must be those of these choices."""
        sizes = {
            name: value for name, value in asdict(self.options).items() if name not in _MAY_CHANGE
        }
        own = json.loads(json.dumps({**sizes, **self.made_from}))
        path = self.folder / "choices.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else own
        problems = tuple(
            Problem(
                what="another choice",
                where=name,
                expected=str(known.get(name)),
                found=str(own.get(name)),
            )
            for name in sorted(own | known)
            if own.get(name) != known.get(name)
        )
        if problems:
            fix = "choose another folder, or remove this one"
            raise UserError(
                "this study was begun with other choices",
                where=str(path),
                problems=problems,
                fix=fix,
            )
        if not path.is_file():
            _write_json(path, own)

    def _missing(self, part: str, topic: str, arms: Sequence[str]) -> list[str]:
        return [arm for arm in arms if not self._is_done(part, topic, arm)]

    def _is_done(self, part: str, topic: str, arm: str) -> bool:
        """Whether there is a result, in the test part one of the present lock."""
        if not self._path(part, topic, arm).is_file():
            return False
        if part != "test":
            return True
        lock = self.read_lock()["sha256"]
        return self._read_json(part, topic, arm).get("lock", lock) == lock

    def _once(
        self, part: str, topic: str, arm: str, make: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The result on disk, or a new one put there; the file appears only when it is whole."""
        if not self._is_done(part, topic, arm):
            self._write(part, topic, arm, make())
        return self._read_json(part, topic, arm)

    def _write(self, part: str, topic: str, arm: str, document: Mapping[str, Any]) -> None:
        mark = {"lock": self.read_lock()["sha256"]} if part == "test" else {}
        _write_json(self._path(part, topic, arm), {**document, **mark})

    def _read_json(self, part: str, topic: str, arm: str) -> dict[str, Any]:
        path = self._path(part, topic, arm)
        if not path.is_file():
            raise UserError(
                "this part of the study has not run",
                where=str(path),
                fix="run the development part",
            )
        return json.loads(path.read_text(encoding="utf-8"))

    def _path(self, part: str, topic: str, arm: str) -> Path:
        return self.folder / part / topic / f"{arm}.json"


def _write_json(path: Path, document: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(document) + "\n", encoding="utf-8")
    beside.replace(path)


def _at(plan: Plan, outcome: Calibrated) -> Plan:
    return plan.with_strength(outcome.strength, dose=outcome.measured.kl)


def _entry(outcome: Calibrated, score: float) -> dict[str, Any]:
    return {
        "dose": outcome.target,
        "kl": outcome.measured.kl,
        "reached": outcome.reached,
        "strength": outcome.strength,
        "selectivity": score,
    }


def _locked_plan(plans: Mapping[str, Plan], locked: Mapping[str, Any], arm: str) -> Plan | None:
    """The arm's plan at the strength that was locked; None where the arm is vacuous."""
    name = "single" if arm == WHOLE_BUDGET else arm
    choice = locked["arms"][name]["choice"]
    if choice is None:
        return None
    plan = plan_of_document(locked["arms"][name]["plan"], vectors=plans[name].vectors)
    return plan.with_strength(choice["strength"], dose=choice["kl"])


def study_plans(setup: TopicSetup, d_model: int, seed: int) -> dict[str, Plan]:
    """The plan of every arm, by name."""
    flow, control, scales, vectors = setup.flow, setup.control, setup.scales, setup.differences
    site, alone = flow.seed.site, Flow.of_one(flow.seed)
    plans = {
        "difference_single": along_vectors({site: vectors[site]}, scales),
        "difference_flow": along_vectors({s: vectors[s] for s in flow.sites}, scales),
        "random_direction": random_direction(flow, scales, d_model=d_model, seed=seed),
        "random_flow": along_flow(control, scales),
        "single": single(flow, scales),
        "copied": copied(flow, scales),
        "flow": along_flow(flow, scales),
        "flow_exponential": along_flow(flow, scales, schedule=Exponential(rate=-0.05)),
        "flow_cosines": along_flow(flow, scales, schedule=CosineProduct()),
        "flow_closed_loop": along_flow(flow, scales, edit=Floor()),
        "suppress_single": along_flow(alone, scales, edit=Cap()),
        "suppress_flow": along_flow(flow, scales, edit=Cap()),
        "suppress_random_flow": along_flow(control, scales, edit=Cap()),
    }
    return {name: replace(plan, name=f"{setup.topic} {name}") for name, plan in plans.items()}


def describe_setup(setup: TopicSetup) -> dict[str, Any]:
    return {
        "topic": setup.topic,
        "seed": str(setup.seed.feature),
        "auroc": setup.seed.auroc,
        "on_target_share": setup.output.on_target_share,
        "flow": [[str(feature), cosine] for feature, cosine in setup.flow.steps],
        "control": [str(feature) for feature, _ in setup.control.steps],
        "classifier_auroc": setup.classifier_auroc,
    }
