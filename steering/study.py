"""The steering study: does steering along the flow beat its controls at equal dose? Development, lock, test, resumable.

1. `develop`: per topic and arm, calibrate to every dose on neutral text, screen all doses teacher-forced (selectivity
   on `dev` texts), generate from `dev` prompts at the screen's best dose and its neighbours. Every result is a file;
   a second run goes on where the first stopped.
2. `lock`: per topic and arm take the dose with the largest share of samples that succeed and stay coherent, among
   doses whose samples stay coherent at least `min_coherent` of the time (ties: lower dose). None: the arm is vacuous
   there and counts as unsteered. Plans, thresholds and limits go into one file with its own checksum.
3. `test`: refuses to run without an intact lock; generates from `test` prompts and scores `test` texts with what the
   lock says, nothing else. Suppression runs on topical prompts.

Arms and texts: steering/study_topic.py. Statistics and report: steering/study_report.py. Cost: `cost_of` says before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.concepts.prompts import read_prompts
from data.concepts.topics import contrast_texts, topic_named
from sae.errors import UserError
from sae.report import Progress, silent
from steering.concept import lexicon_hits
from steering.dose import NeutralText, calibrate
from steering.generation import Sample, Sampling, generate
from steering.plan import Plan
from steering.plan_files import plan_document, plan_of_document
from steering.reading import CoherenceLimits, Reading, coherence_limits, is_coherent, read_back
from steering.study_topic import ACTIVATION_ARMS, SUPPRESSION_ARMS, TopicSetup, World, set_up_topic
from steering.teacher_forced import log_likelihoods, selectivity

UNSTEERED, PROMPTED, WHOLE_BUDGET = "unsteered", "prompt", "single_budget"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """Sizes of a study. A claim needs twelve topics; four show that it runs."""

    topics: tuple[str, ...]
    doses: tuple[float, ...] = (0.03, 0.06, 0.12, 0.25, 0.5, 1.0, 2.0, 4.0)
    n_dev_prompts: int = 24
    n_test_prompts: int = 64
    n_samples: int = 1
    n_texts: int = 30
    n_tokens: int = 40
    min_coherent: float = 0.8
    batch_size: int = 48
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study in a folder."""

    world: World
    options: StudyOptions
    folder: Path
    progress: Progress = silent

    @property
    def lock_path(self) -> Path:
        return self.folder / "lock.json"

    def develop(self) -> None:
        """Stage 1. Results go to `dev/<topic>/<arm>.json`."""
        neutral = NeutralText.prepare(self.world.model, read_prompts().neutral_texts, n_tokens=32)
        for done, topic in enumerate(self.options.topics):
            self.progress("develop", done, len(self.options.topics))
            if all(self._path("dev", topic, arm).is_file() for arm in (UNSTEERED, *ACTIVATION_ARMS, *SUPPRESSION_ARMS)):
                continue
            setup = set_up_topic(self.world, topic, seed=self.options.seed)
            self._write("dev", topic, "setup", describe_setup(setup))
            base = self._once("dev", topic, UNSTEERED, lambda s=setup: self._unsteered(s, read_prompts().dev))
            for arm in (*ACTIVATION_ARMS, *SUPPRESSION_ARMS):
                self._once("dev", topic, arm, lambda s=setup, a=arm, b=base: self._develop_arm(s, a, b, neutral))

    def lock(self) -> dict[str, Any]:
        """Stage 2. Writes and returns the lock."""
        chosen = {topic: self._locked_topic(topic) for topic in self.options.topics}
        content = {"schema": SCHEMA, "options": asdict(self.options), "topics": chosen}
        document = {**content, "sha256": _checksum(content)}
        self.lock_path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return document

    def read_lock(self) -> dict[str, Any]:
        """The lock, intact. Raises UserError otherwise."""
        if not self.lock_path.is_file():
            raise UserError("nothing is locked yet", where=str(self.lock_path), mend="run the development part first")
        document = json.loads(self.lock_path.read_text(encoding="utf-8"))
        content = {key: value for key, value in document.items() if key != "sha256"}
        if document.get("sha256") != _checksum(content):
            raise UserError("the lock was changed after it was made", where=str(self.lock_path), mend="lock again")
        return document

    def test(self) -> None:
        """Stage 3. Results go to `test/<topic>/<arm>.json`."""
        lock = self.read_lock()
        for done, (topic, locked) in enumerate(lock["topics"].items()):
            self.progress("test", done, len(lock["topics"]))
            arms = (*ACTIVATION_ARMS, *SUPPRESSION_ARMS)
            if all(self._path("test", topic, arm).is_file() for arm in (UNSTEERED, PROMPTED, WHOLE_BUDGET, *arms)):
                continue
            setup = set_up_topic(self.world, topic, seed=self.options.seed)
            self._once("test", topic, UNSTEERED, lambda s=setup, k=locked: self._test_unsteered(s, k))
            self._once("test", topic, PROMPTED, lambda s=setup, k=locked: self._test_prompt(s, k))
            for arm in arms:
                self._once("test", topic, arm, lambda s=setup, k=locked, a=arm: self._test_arm(s, k, a))
            whole = with_whole_budget(locked)
            self._once("test", topic, WHOLE_BUDGET, lambda s=setup, k=whole: self._test_arm(s, k, "single"))

    def _develop_arm(
        self, setup: TopicSetup, arm: str, base: Mapping[str, Any], neutral: NeutralText
    ) -> dict[str, Any]:
        world, options = self.world, self.options
        outcomes = calibrate(world.model, world.saes, setup.plans[arm], neutral, options.doses)
        texts = self._texts(setup.topic, "dev")
        before = log_likelihoods(world.model, [*texts[0], *texts[1]])
        entries: list[dict[str, Any]] = []
        for outcome in outcomes:
            plan = setup.plans[arm].with_strength(outcome.strength, dose=outcome.measured.kl)
            changed = selectivity(world.model, world.saes, plan, *texts, unsteered=before)
            entries.append(
                {
                    "dose": outcome.target,
                    "kl": outcome.measured.kl,
                    "reached": outcome.reached,
                    "strength": outcome.strength,
                    "selectivity": changed.score,
                }
            )
        sign = -1 if arm in SUPPRESSION_ARMS else 1
        best = int(np.argmax([sign * entry["selectivity"] for entry in entries]))
        prompts = self._prompts(arm, setup.topic, "dev")
        limits, threshold = CoherenceLimits(**base["limits"]), base["threshold"]
        for place in range(max(0, best - 1), min(len(entries), best + 2)):
            plan = setup.plans[arm].with_strength(entries[place]["strength"])
            samples = self._samples(prompts, plan)
            entries[place]["records"] = self._records(setup, samples, limits, threshold)
        return {"arm": arm, "plan": plan_document(setup.plans[arm]), "doses": entries}

    def _unsteered(self, setup: TopicSetup, prompts: Sequence[str]) -> dict[str, Any]:
        """Unsteered samples: success threshold and coherence limits, and the noise floor from a second seed."""
        made = self._samples(prompts[: self.options.n_dev_prompts], None)
        again = self._samples(prompts[: self.options.n_dev_prompts], None, seed_shift=1)
        limits = coherence_limits(self._read(made))
        threshold = setup.classifier.threshold_on([sample.text for sample in (*made, *again)])
        return {
            "limits": asdict(limits),
            "threshold": threshold,
            "records": self._records(setup, made, limits, threshold),
            "noise_floor": self._records(setup, again, limits, threshold),
        }

    def _locked_topic(self, topic: str) -> dict[str, Any]:
        base = self._read_json("dev", topic, UNSTEERED)
        arms = {}
        for arm in (*ACTIVATION_ARMS, *SUPPRESSION_ARMS):
            found = self._read_json("dev", topic, arm)
            arms[arm] = {"plan": found["plan"], "choice": choose_dose(found["doses"], arm, self.options.min_coherent)}
        return {"limits": base["limits"], "threshold": base["threshold"], "arms": arms}

    def _test_unsteered(self, setup: TopicSetup, locked: Mapping[str, Any]) -> dict[str, Any]:
        limits, threshold = CoherenceLimits(**locked["limits"]), locked["threshold"]
        topical = self._samples(self._prompts("suppress_flow", setup.topic, "test"), None)
        neutral = self._samples(self._prompts("flow", setup.topic, "test"), None)
        return {
            "records": self._records(setup, neutral, limits, threshold),
            "topical_records": self._records(setup, topical, limits, threshold),
        }

    def _test_prompt(self, setup: TopicSetup, locked: Mapping[str, Any]) -> dict[str, Any]:
        """The arm that only asks: a sentence about the topic before every prompt."""
        prefix = f"This text is about {setup.topic}. "
        prompts = [prefix + prompt for prompt in self._prompts("flow", setup.topic, "test")]
        limits = CoherenceLimits(**locked["limits"])
        return {"records": self._records(setup, self._samples(prompts, None), limits, locked["threshold"])}

    def _test_arm(self, setup: TopicSetup, locked: Mapping[str, Any], arm: str) -> dict[str, Any]:
        choice = locked["arms"][arm]["choice"]
        if choice is None:
            return {"vacuous": True}
        plan = plan_of_document(locked["arms"][arm]["plan"], vectors=setup.plans[arm].vectors)
        plan = plan.with_strength(choice["strength"], dose=choice["kl"])
        changed = selectivity(self.world.model, self.world.saes, plan, *self._texts(setup.topic, "test"))
        samples = self._samples(self._prompts(arm, setup.topic, "test"), plan)
        limits = CoherenceLimits(**locked["limits"])
        return {
            "vacuous": False,
            "dose": choice["dose"],
            "kl": choice["kl"],
            "selectivity": changed.score,
            "records": self._records(setup, samples, limits, locked["threshold"]),
        }

    def _texts(self, topic: str, split: str) -> tuple[list[str], list[str]]:
        n = self.options.n_texts
        return topic_named(topic).texts(split)[:n], contrast_texts(topic, split)[:n]  # type: ignore[arg-type]

    def _prompts(self, arm: str, topic: str, split: str) -> Sequence[str]:
        if arm in SUPPRESSION_ARMS:
            own = read_prompts().topical[topic]
            n = (self.options.n_dev_prompts if split == "dev" else self.options.n_test_prompts) // len(own)
            return own * max(1, n)
        prompts = read_prompts()
        return (
            prompts.dev[: self.options.n_dev_prompts] if split == "dev" else prompts.test[: self.options.n_test_prompts]
        )

    def _samples(self, prompts: Sequence[str], plan: Plan | None, *, seed_shift: int = 0) -> tuple[Sample, ...]:
        """A prompt given several times gets as many samples."""
        counts = {prompt: list(prompts).count(prompt) for prompt in prompts}
        repeats = max(counts.values())
        return generate(
            self.world.model,
            self.world.saes,
            list(counts),
            [plan],
            n_samples=self.options.n_samples * repeats,
            seed=self.options.seed + seed_shift,
            sampling=Sampling(n_tokens=self.options.n_tokens),
            batch_size=self.options.batch_size,
        ).samples

    def _read(self, samples: Sequence[Sample]) -> list[Reading]:
        return read_back(self.world.model, self.world.saes, samples, [])

    def _records(
        self, setup: TopicSetup, samples: Sequence[Sample], limits: CoherenceLimits, threshold: float
    ) -> list[dict[str, Any]]:
        probability = setup.classifier.probability([sample.text for sample in samples])
        return [
            {
                "prompt": sample.prompt,
                "sample": sample.sample,
                "text": sample.text,
                "probability": float(p),
                "success": bool(p >= threshold),
                "coherent": is_coherent(reading, limits),
                "nll": reading.nll,
                "lexicon_rate": lexicon_hits(sample.text, setup.lexicon).rate,
            }
            for sample, p, reading in zip(samples, probability, self._read(samples), strict=True)
        ]

    def _once(self, part: str, topic: str, arm: str, make: Any) -> dict[str, Any]:
        """The result on disk, or a new one put there; the file appears only when it is whole."""
        if not self._path(part, topic, arm).is_file():
            self._write(part, topic, arm, make())
        return self._read_json(part, topic, arm)

    def _write(self, part: str, topic: str, arm: str, document: Mapping[str, Any]) -> None:
        path = self._path(part, topic, arm)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(".tmp")
        beside.write_text(json.dumps(document) + "\n", encoding="utf-8")
        beside.replace(path)

    def _read_json(self, part: str, topic: str, arm: str) -> dict[str, Any]:
        path = self._path(part, topic, arm)
        if not path.is_file():
            raise UserError("this part of the study has not run", where=str(path), mend="run the development part")
        return json.loads(path.read_text(encoding="utf-8"))

    def _path(self, part: str, topic: str, arm: str) -> Path:
        return self.folder / part / topic / f"{arm}.json"


def choose_dose(entries: Sequence[Mapping[str, Any]], arm: str, min_coherent: float) -> dict[str, Any] | None:
    """The dose to test: most coherent successes (for suppression: fewest successes), ties to the lower dose."""
    admissible = [
        entry
        for entry in entries
        if entry.get("records") and np.mean([record["coherent"] for record in entry["records"]]) >= min_coherent
    ]
    if not admissible:
        return None
    sign = -1 if arm in SUPPRESSION_ARMS else 1

    def merit(entry: Mapping[str, Any]) -> tuple[float, float]:
        hits = [record["success"] and (record["coherent"] or sign < 0) for record in entry["records"]]
        return sign * float(np.mean(hits)), -entry["dose"]

    best = max(admissible, key=merit)
    return {name: best[name] for name in ("dose", "kl", "strength", "reached")}


def with_whole_budget(locked: Mapping[str, Any]) -> dict[str, Any]:
    """The lock of a topic with the single-layer arm at the flow's whole coefficient (whose weights add up to 1)."""
    flow, arms = locked["arms"]["flow"]["choice"], dict(locked["arms"])
    arms["single"] = {**arms["single"], "choice": None if flow is None else {**flow, "kl": None}}
    return {**locked, "arms": arms}


def describe_setup(setup: TopicSetup) -> dict[str, Any]:
    return {
        "topic": setup.topic,
        "seed": str(setup.seed.feature),
        "auroc": setup.seed.auroc,
        "output_gain": setup.output_gain,
        "flow": [[str(feature), cosine] for feature, cosine in setup.flow.steps],
        "placebo": [str(feature) for feature, _ in setup.placebo.steps],
        "classifier_auroc": setup.classifier_auroc,
    }


def cost_of(options: StudyOptions) -> dict[str, int]:
    """Tokens that a study generates and scores, roughly: for an estimate of its time before it starts."""
    n_arms, n_doses, n_topics = len(ACTIVATION_ARMS) + len(SUPPRESSION_ARMS), len(options.doses), len(options.topics)
    dev = 3 * options.n_dev_prompts * options.n_samples * options.n_tokens
    test = options.n_test_prompts * options.n_samples * options.n_tokens
    generated = n_topics * (n_arms * (dev + test) + 3 * test)
    calibration = n_topics * n_arms * n_doses * 3 * 24 * 32
    screening = n_topics * n_arms * n_doses * 2 * options.n_texts * 24
    return {"generated": generated, "scored": calibration + screening + 2 * generated}


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
