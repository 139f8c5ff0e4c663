"""Texts, prompts and samples of a topic, and whether a text is about it.

- `ConceptClassifier`: TF-IDF of words with logistic regression, topic against all others. A text
  succeeds when its probability exceeds the 95th percentile of *unsteered* development text
  (`threshold_on`), so chance is 5 % by construction.
- `lexicon_hits`: words of an independent lexicon per 100 words, and how many different ones: "pizza
  pizza pizza" is one.
- `TopicSampler`: prompts and texts of a split, samples of many plans at once, and one record a
  sample. Everything that plans share is made once: unsteered samples serve all topics, and all
  plans of a topic are generated in one go, so that a batch holds many plans of few prompts (one
  stream of random numbers a prompt and sample).

A language model can judge as well (pipeline/lenses/steering/judge.py); nothing here needs one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from data.concepts.prompts import read_prompts
from data.concepts.topics import contrast_texts, topic_named
from featureflow.errors import UserError
from featureflow.sites import Site
from steering.features import auroc
from steering.generation import Sample, Sampling, generate
from steering.plan import Plan
from steering.reading import CoherenceLimits, Reading, is_coherent, read_back
from steering.sequences import Dictionary, SteerableModel


@dataclass(frozen=True, kw_only=True)
class ConceptClassifier:
    """Probability that a text is about the topic. Made by `train`."""

    model: Any

    @classmethod
    def train(
        cls, topic_texts: Sequence[str], other_texts: Sequence[str], *, seed: int = 0
    ) -> ConceptClassifier:
        """Fit on texts of the topic and of everything else."""
        if not topic_texts or not other_texts:
            raise UserError(
                "a classifier needs texts of both kinds",
                found=f"{len(topic_texts)} and {len(other_texts)}",
            )
        made = make_pipeline(
            TfidfVectorizer(sublinear_tf=True, min_df=2, token_pattern=r"[a-zA-Z]{2,}"),
            LogisticRegression(
                C=20.0, class_weight="balanced", solver="liblinear", random_state=seed
            ),
        )
        made.fit([*topic_texts, *other_texts], [1] * len(topic_texts) + [0] * len(other_texts))
        return cls(model=made)

    def probability(self, texts: Sequence[str]) -> Float[np.ndarray, "text"]:
        return self.model.predict_proba(list(texts))[:, 1] if texts else np.zeros(0)

    def threshold_on(self, unsteered: Sequence[str]) -> float:
        """The probability that 5 % of unsteered texts exceed."""
        return float(np.quantile(self.probability(unsteered), 0.95))

    def auroc(self, topic_texts: Sequence[str], other_texts: Sequence[str]) -> float:
        """On held-out texts."""
        values = self.probability([*topic_texts, *other_texts])[:, None]
        return float(
            auroc(values, np.array([True] * len(topic_texts) + [False] * len(other_texts)))[0]
        )


@dataclass(frozen=True, kw_only=True)
class LexiconHits:
    """Hits per 100 words, and how many different words hit."""

    rate: float
    distinct: int


def lexicon_hits(text: str, lexicon: frozenset[str]) -> LexiconHits:
    words = re.findall(r"[a-z]+", text.lower())
    singular = (
        word if word in lexicon else word[:-1] if word.endswith("s") else word for word in words
    )
    hits = [word for word in singular if word in lexicon]
    return LexiconHits(rate=100 * len(hits) / max(len(words), 1), distinct=len(set(hits)))


@dataclass(frozen=True, kw_only=True)
class SampleSizes:
    """How many texts, prompts and tokens. Development and test share none of them."""

    n_dev_prompts: int = 12
    n_test_prompts: int = 40
    n_samples: int = 1
    n_texts: int = 12
    n_tokens: int = 24
    batch_size: int = 112
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class TopicSampler:
    """What topics are measured with."""

    model: SteerableModel
    saes: Mapping[Site, Dictionary]
    sizes: SampleSizes
    _unsteered: dict[tuple[str, int], tuple[Sample, ...]] = field(default_factory=dict)

    def texts(self, topic: str, split: str) -> tuple[list[str], list[str]]:
        """(topical, contrast) definitions."""
        n = self.sizes.n_texts
        return topic_named(topic).texts(split)[:n], contrast_texts(topic, split)[:n]  # type: ignore[arg-type]

    def prompts(self, topic: str, split: str, *, topical: bool = False) -> Sequence[str]:
        """Neutral prompts; topical ones to suppress a topic on. Development and test share none."""
        bundled = read_prompts()
        n = self.sizes.n_dev_prompts if split == "dev" else self.sizes.n_test_prompts
        if topical:
            return (bundled.topical if split == "dev" else bundled.topical_test)[topic]
        return (bundled.dev if split == "dev" else bundled.test)[:n]

    def samples(
        self, topic: str, split: str, plans: Sequence[Plan | None], *, topical: bool = False
    ) -> list[tuple[Sample, ...]]:
        """The samples of each plan. Topical prompts are few: each is used often enough to give as
        many samples as neutral ones do."""
        prompts = self.prompts(topic, split, topical=topical)
        wanted = self.sizes.n_dev_prompts if split == "dev" else self.sizes.n_test_prompts
        return self.generated(
            prompts, plans, n_samples=self.sizes.n_samples * max(1, wanted // len(prompts))
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
            self.model,
            self.saes,
            prompts,
            plans,
            n_samples=n_samples,
            seed=self.sizes.seed + seed_shift,
            sampling=Sampling(n_tokens=self.sizes.n_tokens),
            batch_size=self.sizes.batch_size,
        )
        return [made.of_plan(place) for place in range(len(plans))]

    def unsteered(self, split: str, *, seed_shift: int = 0) -> tuple[Sample, ...]:
        """Unsteered samples of the neutral prompts, made once for all topics. Thresholds and limits
        hang on those of development, which are therefore of all its prompts."""
        key = (split, seed_shift)
        if key not in self._unsteered:
            prompts = read_prompts().dev if split == "dev" else self.prompts("", split)
            (self._unsteered[key],) = self.generated(
                prompts, [None], n_samples=self.sizes.n_samples, seed_shift=seed_shift
            )
        return self._unsteered[key]

    def read(self, samples: Sequence[Sample]) -> list[Reading]:
        return read_back(self.model, {}, samples, [], batch_size=self.sizes.batch_size)

    def records(
        self,
        classifier: ConceptClassifier,
        lexicon: frozenset[str],
        samples: Sequence[Sample],
        limits: CoherenceLimits,
        threshold: float,
    ) -> list[dict[str, Any]]:
        """One record a sample: is it about the topic, is it language?"""
        probability = classifier.probability([sample.text for sample in samples])
        return [
            {
                "prompt": sample.prompt,
                "sample": sample.sample,
                "text": sample.text,
                "probability": float(p),
                "success": bool(p > threshold),
                "coherent": is_coherent(reading, limits),
                "nll": reading.nll,
                "lexicon_rate": lexicon_hits(sample.text, lexicon).rate,
            }
            for sample, p, reading in zip(samples, probability, self.read(samples), strict=True)
        ]
