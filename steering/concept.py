"""Is a text about a concept? A classifier and a lexicon, both from other sources than the features came from.

- `ConceptClassifier`: TF-IDF of words with logistic regression, topic against all others. A text succeeds when its
  probability exceeds the 95th percentile of *unsteered* development text (`threshold_on`), so chance is 5 % by
  construction.
- `lexicon_hits`: words of an independent lexicon per 100 words, and how many different ones: "pizza pizza pizza" is
  one.

A language model can judge instead (`Judge`): two calls of an OpenAI-compatible address with AxBench's rubric. It is off
unless given, and nothing else needs it.
"""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from sae.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ConceptClassifier:
    """Probability that a text is about the topic. Made by `train`."""

    model: Any

    @classmethod
    def train(cls, topic_texts: Sequence[str], other_texts: Sequence[str], *, seed: int = 0) -> ConceptClassifier:
        """Fit on texts of the topic and of everything else."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        if not topic_texts or not other_texts:
            raise UserError(
                "a classifier needs texts of both kinds", found=f"{len(topic_texts)} and {len(other_texts)}"
            )
        made = make_pipeline(
            TfidfVectorizer(sublinear_tf=True, min_df=2, token_pattern=r"[a-zA-Z]{2,}"),
            LogisticRegression(C=20.0, class_weight="balanced", solver="liblinear", random_state=seed),
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
        from steering.discovery import auroc

        values = self.probability([*topic_texts, *other_texts])[:, None]
        return float(auroc(values, np.array([True] * len(topic_texts) + [False] * len(other_texts)))[0])


@dataclass(frozen=True, kw_only=True)
class LexiconHits:
    """Hits per 100 words, and how many different words hit."""

    rate: float
    distinct: int


def lexicon_hits(text: str, lexicon: frozenset[str]) -> LexiconHits:
    words = re.findall(r"[a-z]+", text.lower())
    singular = (word if word in lexicon else word[:-1] if word.endswith("s") else word for word in words)
    hits = [word for word in singular if word in lexicon]
    return LexiconHits(rate=100 * len(hits) / max(len(words), 1), distinct=len(set(hits)))


@dataclass(frozen=True, kw_only=True)
class Rating:
    """AxBench's three ratings, 0 to 2 each."""

    concept: int
    relevance: int
    fluency: int

    @property
    def harmonic_mean(self) -> float:
        parts = (self.concept, self.relevance, self.fluency)
        return 0.0 if 0 in parts else 3 / sum(1 / part for part in parts)


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A language model at an OpenAI-compatible address that rates texts. An answer that cannot be read is an error."""

    url: str
    model: str
    key: str = ""
    timeout_s: float = 60.0

    def rate(self, *, concept: str, prompt: str, text: str) -> Rating:
        """Three ratings of one continuation. Raises UserError when the address or the answer is no good."""
        question = (
            "Rate the continuation with integers from 0 to 2 and answer with JSON only: "
            '{"concept": _, "relevance": _, "fluency": _}. concept: how clearly it is about the concept. '
            "relevance: how well it continues the prompt. fluency: how well it reads.\n"
            f"Concept: {concept}\nPrompt: {prompt}\nContinuation: {text}"
        )
        answer = self._ask(question)
        match = re.search(r"\{[^{}]*\}", answer)
        try:
            values = json.loads(match[0]) if match else {}
            rating = Rating(**{name: int(values[name]) for name in ("concept", "relevance", "fluency")})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError("the judge's answer cannot be read", where=self.url, found=answer[:200]) from error
        if not all(0 <= part <= 2 for part in (rating.concept, rating.relevance, rating.fluency)):
            raise UserError("the judge's ratings are outside 0 to 2", where=self.url, found=answer[:200])
        return rating

    def _ask(self, question: str) -> str:
        if not self.url.startswith(("http://", "https://")):
            raise UserError("the judge's address is no http address", found=self.url)
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": question}]}
        request = urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions",
            data=json.dumps(body).encode(),
            headers={
                "Content-Type": "application/json",
                **({"Authorization": f"Bearer {self.key}"} if self.key else {}),
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                document = json.loads(answer.read())
            return str(document["choices"][0]["message"]["content"])
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise UserError("the judge does not answer", where=self.url, found=str(error)) from error
