"""Two sets of texts → a plan that pushes towards the first: by a feature and its flow, or by a
difference of means.

1. Read both sets with the unsteered model, mean over the tokens of a text (steering/features.py).
2. Difference of means: topical mean minus contrast mean at the layers asked for; that is the plan's
   vector.
3. Otherwise rank features by AUROC or d′; ask the best for their output side: of the KL that a push
   at the feature's layer makes on neutral text, the share that moves probability to the words in
   which the sets differ. The plan goes along the flow of the feature with the largest share: one
   that reads a topic need not make the model write it.

Texts of one register, some about the topic and some not, give what the topic adds; other
differences between the sets would be found just as well. Cost: one pass over the texts, one short
pass a candidate.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from data.concepts.prompts import read_prompts
from data.text.tokenizer import Tokenizer
from featureflow.errors import UserError
from featureflow.sites import FeatureId
from pipeline.steering_run import Steering, is_content_word
from steering.arms import Flow, Scales, along_vectors, single
from steering.dose import NeutralText
from steering.features import Contrast, difference_of_means, rank_features, read_texts
from steering.plan import Plan
from steering.teacher_forced import OutputScore, output_score

LEAST_TEXTS = 4
_N_WORDS, _LEAST_RATIO = 40, 3.0
_SCORING_STRENGTH = 0.15
_N_NEUTRAL = 6


@dataclass(frozen=True, kw_only=True)
class Found:
    """A feature that tells the sets apart, and what a push with it does to their words."""

    contrast: Contrast
    output: OutputScore


def read_lines(path: Path) -> list[str]:
    """The texts of a file, one a line. Raises UserError."""
    try:
        texts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("these texts cannot be read", where=str(path), found=str(error)) from error
    kept = [text for text in texts if text]
    if len(kept) < LEAST_TEXTS:
        raise UserError(
            "too few texts",
            where=str(path),
            expected=f"{LEAST_TEXTS} lines or more",
            found=str(len(kept)),
        )
    return kept


def plan_by_difference(
    steering: Steering,
    topical: Sequence[str],
    other: Sequence[str],
    layers: Sequence[int],
    *,
    dose: float,
) -> Plan:
    """Add the difference of means at residual layers, at the strength that gives the dose. Raises
    UserError."""
    known = {site.layer: site for site in steering.saes}
    if missing := [layer for layer in layers if layer not in known]:
        raise UserError(
            "no dictionary at a layer",
            expected=f"some of {sorted(known)}",
            found=", ".join(map(str, missing)),
        )
    sites = [known[layer] for layer in layers]
    states = read_texts(steering.model, dict.fromkeys(sites, None), [*topical, *other])
    vectors = difference_of_means(states, _labels(topical, other))
    plan = along_vectors(vectors, Scales(norms=steering.norms, activations={}))
    return steering.calibrated(steering.signed(plan), dose)


def features_of_contrast(
    steering: Steering,
    topical: Sequence[str],
    other: Sequence[str],
    *,
    by: Literal["auroc", "d_prime"],
    n_best: int = 32,
) -> list[Found]:
    """The best readers of the contrast, by their output side, best first. Raises UserError where
    none is active."""
    states = read_texts(steering.model, steering.saes, [*topical, *other])
    contrasts = rank_features(states, _labels(topical, other), n_best=n_best, by=by)
    if not contrasts:
        raise UserError(
            "no feature is active on a tenth of the topical texts", fix="give longer texts, or more"
        )
    tokens = telling_tokens(steering.model.tokenizer, topical, other)
    if not tokens:
        raise UserError(
            "no word tells the topical texts from the others",
            fix="give more texts, or use --by difference",
        )
    scores = _output_side(steering, [contrast.feature for contrast in contrasts], tokens)
    found = [Found(contrast=c, output=s) for c, s in zip(contrasts, scores, strict=True)]
    return sorted(found, key=lambda each: each.output.on_target_share, reverse=True)


def telling_tokens(
    tokenizer: Tokenizer, topical: Sequence[str], other: Sequence[str]
) -> tuple[int, ...]:
    """Content words (as tokens) that at least two topical texts have, three times as often as the
    others; at most 40, those first that say most. Tokens of any kind where a tokenizer has none
    that are words."""
    counts, texts, totals = [], [], []
    for part in (topical, other):
        ids = [list(tokenizer.encode(f" {text}")) for text in part]
        counts.append(Counter(token for row in ids for token in row))
        texts.append(Counter(token for row in ids for token in set(row)))
        totals.append(max(sum(map(len, ids)), 1))
    weights = {}
    for token, n_texts in texts[0].items():
        ratio = (counts[0][token] + 0.5) / totals[0] / ((counts[1][token] + 0.5) / totals[1])
        if n_texts >= 2 and ratio >= _LEAST_RATIO:
            weights[token] = counts[0][token] * float(np.log(ratio))
    telling = sorted(weights, key=lambda token: (-weights[token], token))
    words = [token for token in telling if is_content_word(tokenizer.decode([token]))]
    return tuple((words or telling)[:_N_WORDS])


def _output_side(
    steering: Steering, features: Sequence[FeatureId], tokens: tuple[int, ...]
) -> list[OutputScore]:
    neutral = NeutralText.prepare(
        steering.model, read_prompts().neutral_texts[-_N_NEUTRAL:], n_tokens=32
    )
    scales = Scales(norms=steering.norms, activations={})
    return [
        output_score(
            steering.model,
            steering.saes,
            single(Flow.of_one(feature), scales, strength=_SCORING_STRENGTH),
            tokens,
            neutral,
        )
        for feature in features
    ]


def _labels(topical: Sequence[str], other: Sequence[str]) -> list[bool]:
    return [True] * len(topical) + [False] * len(other)
