"""Is a text about a concept? A classifier and a lexicon, both from other sources than the features
came from.

- `ConceptClassifier`: TF-IDF of words with logistic regression, topic against all others. A text
  succeeds when its probability exceeds the 95th percentile of *unsteered* development text
  (`threshold_on`), so chance is 5 % by construction.
- `lexicon_hits`: words of an independent lexicon per 100 words, and how many different ones: "pizza
  pizza pizza" is one.

A language model can judge as well (pipeline/lenses/steering/judge.py); nothing here needs one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from featureflow.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ConceptClassifier:
    """Probability that a text is about the topic. Made by `train`."""

    model: Any

    @classmethod
    def train(
        cls, topic_texts: Sequence[str], other_texts: Sequence[str], *, seed: int = 0
    ) -> ConceptClassifier:
        """Fit on texts of the topic and of everything else."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

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
        from steering.discovery import auroc

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
