"""The study's measuring bench: prompts and texts of a split, samples of many plans at once, and one
record a sample.

Everything that arms share is made once: unsteered samples serve all topics, and all plans of a
topic are generated in one go, so that a batch holds many arms of few prompts (one stream of random
numbers a prompt and sample).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from data.concepts.prompts import read_prompts
from data.concepts.topics import contrast_texts, topic_named
from pipeline.lenses.steering.concept import lexicon_hits
from pipeline.lenses.steering.study_options import SUPPRESSION_ARMS, StudyOptions
from pipeline.lenses.steering.study_topic import TopicSetup, World
from steering.generation import Sample, Sampling, generate
from steering.plan import Plan
from steering.reading import CoherenceLimits, Reading, is_coherent, read_back


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a study measures with."""

    world: World
    options: StudyOptions
    _unsteered: dict[tuple[str, int], tuple[Sample, ...]] = field(default_factory=dict)

    def texts(self, topic: str, split: str) -> tuple[list[str], list[str]]:
        """(topical, contrast) definitions."""
        n = self.options.n_texts
        return topic_named(topic).texts(split)[:n], contrast_texts(topic, split)[:n]  # type: ignore[arg-type]

    def prompts(self, arm: str, topic: str, split: str) -> Sequence[str]:
        """Neutral openers; topical ones for suppression. Development and test share none."""
        bundled = read_prompts()
        n = self.options.n_dev_prompts if split == "dev" else self.options.n_test_prompts
        if arm in SUPPRESSION_ARMS:
            return (bundled.topical if split == "dev" else bundled.topical_test)[topic]
        return (bundled.dev if split == "dev" else bundled.test)[:n]

    def samples(
        self, arm: str, topic: str, split: str, plans: Sequence[Plan | None]
    ) -> list[tuple[Sample, ...]]:
        """The samples of each plan, from the prompts of such an arm. Topical openers are few: each
        is used often enough to give as many samples as neutral ones do."""
        prompts = self.prompts(arm, topic, split)
        wanted = self.options.n_dev_prompts if split == "dev" else self.options.n_test_prompts
        return self.generated(
            prompts, plans, n_samples=self.options.n_samples * max(1, wanted // len(prompts))
        )

    def generated(
        self,
        prompts: Sequence[str],
        plans: Sequence[Plan | None],
        *,
        n_samples: int,
        seed_shift: int = 0,
    ) -> list[tuple[Sample, ...]]:
        if not plans:
            return []
        made = generate(
            self.world.model,
            self.world.saes,
            prompts,
            plans,
            n_samples=n_samples,
            seed=self.options.seed + seed_shift,
            sampling=Sampling(n_tokens=self.options.n_tokens),
            batch_size=self.options.batch_size,
        )
        return [made.of_plan(place) for place in range(len(plans))]

    def unsteered(self, split: str, *, seed_shift: int = 0) -> tuple[Sample, ...]:
        """Unsteered samples of the neutral openers, made once for all topics. Thresholds and limits
        hang on those of development, which are therefore of all its openers."""
        key = (split, seed_shift)
        if key not in self._unsteered:
            prompts = read_prompts().dev if split == "dev" else self.prompts("flow", "", split)
            (self._unsteered[key],) = self.generated(
                prompts, [None], n_samples=self.options.n_samples, seed_shift=seed_shift
            )
        return self._unsteered[key]

    def read(self, samples: Sequence[Sample]) -> list[Reading]:
        return read_back(self.world.model, {}, samples, [], batch_size=self.options.batch_size)

    def records(
        self,
        setup: TopicSetup,
        samples: Sequence[Sample],
        limits: CoherenceLimits,
        threshold: float,
    ) -> list[dict[str, Any]]:
        """One record a sample: is it about the topic, is it language?"""
        probability = setup.classifier.probability([sample.text for sample in samples])
        return [
            {
                "prompt": sample.prompt,
                "sample": sample.sample,
                "text": sample.text,
                "probability": float(p),
                "success": bool(p > threshold),
                "coherent": is_coherent(reading, limits),
                "nll": reading.nll,
                "lexicon_rate": lexicon_hits(sample.text, setup.lexicon).rate,
            }
            for sample, p, reading in zip(samples, probability, self.read(samples), strict=True)
        ]
