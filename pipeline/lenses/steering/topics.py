"""One topic: its texts, its feature and flow, its units, its classifier.

Everything about a topic is decided from its `discover` and `classify` texts and development
prompts, before any test text is read. Sources are kept apart: features are found on WordNet
definitions (`discover`), the classifier learns from other definitions (`classify`) and, where
installed, wiki leads, the lexicon of the results is Empath's where installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from data.concepts.prompts import read_prompts
from data.concepts.sources import empath_lexicon, installed, wiki_texts
from data.concepts.topics import contrast_texts, read_topics, topic_named
from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site
from pipeline.lenses.steering.topic_samples import ConceptClassifier
from pipeline.steering_run import Steering
from steering.arms import Flow, Scales, single
from steering.dose import NeutralText
from steering.features import Contrast, difference_of_means, rank_features, read_texts
from steering.teacher_forced import OutputScore, lexicon_tokens, output_score

_N_TEXTS = 80
_N_SCORED = 32
_SCORING_STRENGTH = 0.15
_N_NEUTRAL = 6


@dataclass(frozen=True, kw_only=True)
class TopicSetup:
    """What was decided for a topic. `scales` are typical strong activations on topical text,
    `differences` the differences of means."""

    topic: str
    seed: Contrast
    contrasts: tuple[Contrast, ...]
    output: OutputScore
    flow: Flow
    control: Flow
    scales: Scales
    classifier: ConceptClassifier
    classifier_auroc: float
    lexicon: frozenset[str]
    differences: Mapping[Site, Float[Tensor, "d_model"]]


def set_up_topic(steering: Steering, topic: str, *, seed: int) -> TopicSetup:
    """Find the topic's feature and flow, train its classifier. Raises UserError
    if none is found."""
    topical = topic_named(topic).texts("discover")[:_N_TEXTS]
    other = contrast_texts(topic, "discover")[: len(topical)]
    states = read_texts(steering.model, steering.saes, [*topical, *other])
    is_topic = [True] * len(topical) + [False] * len(other)
    contrasts = rank_features(states, is_topic, n_best=200)
    if not contrasts:
        raise UserError(
            f"no feature tells {topic} from other topics", expected="a feature active on its texts"
        )
    inside = [
        contrast for contrast in contrasts if _has_a_flow(contrast.feature, steering)
    ] or contrasts
    best, output = _best_output(steering, inside[:_N_SCORED], topic)
    flow = steering.flow(best.feature)
    control = steering.random_flow(flow, seed=seed)
    strong = {
        feature: _strong(states.latents[feature.site][:, feature.latent].numpy(), is_topic)
        for feature, _ in (*flow.steps, *control.steps)
    }
    scales = Scales(norms=steering.norms, activations=strong)
    classifier, held_out = _classifier(topic, seed)
    return TopicSetup(
        topic=topic,
        seed=best,
        contrasts=tuple(inside),
        output=output,
        flow=flow,
        control=control,
        scales=scales,
        classifier=classifier,
        classifier_auroc=held_out,
        lexicon=empath_lexicon(topic) if installed()["empath"] else topic_named(topic).lexicon,
        differences=difference_of_means(states, is_topic),
    )


def _has_a_flow(feature: FeatureId, steering: Steering) -> bool:
    """From 20 % to 80 % of the depth: features nearer to either end have no layers to flow through
    on that side."""
    depth = feature.site.layer / max(steering.model.n_layers - 1, 1)
    return 0.2 <= depth <= 0.8


def _best_output(
    steering: Steering, contrasts: Sequence[Contrast], topic: str
) -> tuple[Contrast, OutputScore]:
    """Of the features that read the topic, the one whose push at its own layer goes most into the
    topic's words."""
    tokens = tuple(lexicon_tokens(steering.model, topic_named(topic).lexicon))
    neutral = NeutralText.prepare(
        steering.model, read_prompts().neutral_texts[-_N_NEUTRAL:], n_tokens=32
    )
    scales = Scales(norms=steering.norms, activations={})
    scores = [
        output_score(
            steering.model,
            steering.saes,
            single(Flow.of_one(c.feature), scales, strength=_SCORING_STRENGTH),
            tokens,
            neutral,
        )
        for c in contrasts
    ]
    place = int(np.argmax([score.on_target_share for score in scores]))
    return contrasts[place], scores[place]


def _strong(activations: np.ndarray, is_topic: Sequence[bool]) -> float:
    """The largest mean activation that a topical text reaches; 1 for a feature that none of them
    activates."""
    found = float(activations[np.array(is_topic)].max())
    return found if found > 0 else 1.0


def _classifier(topic: str, seed: int) -> tuple[ConceptClassifier, float]:
    own, other = topic_named(topic).texts("classify"), contrast_texts(topic, "classify")
    if installed()["wiki"]:
        own = own + wiki_texts(topic)
        other = other + [
            text for name in read_topics() if name != topic for text in wiki_texts(name, n=30)
        ]
    made = ConceptClassifier.train(own, other, seed=seed)
    return made, made.auroc(topic_named(topic).texts("dev"), contrast_texts(topic, "dev"))
