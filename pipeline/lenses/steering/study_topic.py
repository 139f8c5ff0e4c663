"""One topic of the study: its texts, its features and flow, its classifier, and the plan of every
arm.

Everything about a topic is decided from its `discover` and `classify` texts and development
prompts, before any test text is read. Sources are kept apart: features are found on WordNet
definitions (`discover`), the classifier learns from other definitions (`classify`) and, where
installed, wiki leads, the lexicon of the results is Empath's where installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data.concepts.prompts import read_prompts
from data.concepts.sources import empath_lexicon, installed, wiki_texts
from data.concepts.topics import contrast_texts, read_topics, topic_named
from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site
from pipeline.lenses.steering.concept import ConceptClassifier
from sae import Sae
from steering.arms import (
    Flow,
    Scales,
    copied,
    difference,
    first_guess,
    flow_additive,
    flow_levels,
    random_direction,
    single,
)
from steering.discovery import Contrast, difference_of_means, rank_features, read_texts
from steering.dose import NeutralText
from steering.edits import Cap
from steering.plan import Plan
from steering.profile import OutputScore, Profile, output_scores
from steering.protocols import SteerableModel
from steering.schedules import CosineProduct, Exponential
from steering.teacher_forced import lexicon_tokens

_N_TEXTS = 80
_N_SCORED = 32
_SCORING_STRENGTH = 0.15
_N_NEUTRAL = 6


@dataclass(frozen=True, kw_only=True)
class World:
    """What the study steers, and the flow it steers along. `chain` gives (feature, cosine) steps in
    order of depth; `random_like` gives a feature of the same site with like density."""

    model: SteerableModel
    saes: Mapping[Site, Sae]
    norms: Mapping[Site, float]
    chain: Callable[[FeatureId], Sequence[tuple[FeatureId, float]]]
    random_like: Callable[[FeatureId, int], FeatureId]


@dataclass(frozen=True, kw_only=True)
class TopicSetup:
    """What was decided for a topic. `scales` are typical strong activations on topical text."""

    topic: str
    seed: Contrast
    contrasts: tuple[Contrast, ...]
    output: OutputScore
    flow: Flow
    placebo: Flow
    scales: Scales
    classifier: ConceptClassifier
    classifier_auroc: float
    lexicon: frozenset[str]
    plans: Mapping[str, Plan]


def set_up_topic(world: World, topic: str, *, seed: int) -> TopicSetup:
    """Find the topic's feature and flow, train its classifier, lay out all plans. Raises UserError
    if none is found."""
    topical = topic_named(topic).texts("discover")[:_N_TEXTS]
    other = contrast_texts(topic, "discover")[: len(topical)]
    states = read_texts(world.model, world.saes, [*topical, *other])
    is_topic = [True] * len(topical) + [False] * len(other)
    contrasts = rank_features(states, is_topic, n_best=200)
    if not contrasts:
        raise UserError(
            f"no feature tells {topic} from other topics", expected="a feature active on its texts"
        )
    inside = [
        contrast for contrast in contrasts if _has_a_flow(contrast.feature, world)
    ] or contrasts
    best, output = _best_output(world, inside[:_N_SCORED], topic)
    flow = Flow(seed=best.feature, steps=tuple(world.chain(best.feature)))
    placebo_seed = world.random_like(best.feature, seed)
    kept = set(flow.sites)
    placebo = Flow(
        seed=placebo_seed, steps=tuple(s for s in world.chain(placebo_seed) if s[0].site in kept)
    )
    strong = {
        feature: _strong(states.latents[feature.site][:, feature.latent].numpy(), is_topic)
        for feature, _ in (*flow.steps, *placebo.steps)
    }
    scales = Scales(norms=world.norms, activations=strong)
    classifier, held_out = _classifier(topic, seed)
    vectors = difference_of_means(states, is_topic)
    return TopicSetup(
        topic=topic,
        seed=best,
        contrasts=tuple(inside),
        output=output,
        flow=flow,
        placebo=placebo,
        scales=scales,
        classifier=classifier,
        classifier_auroc=held_out,
        lexicon=empath_lexicon(topic) if installed()["empath"] else topic_named(topic).lexicon,
        plans={
            name: replace(plan, name=f"{topic} {name}", strength=first_guess(plan))
            for name, plan in _plans(world, flow, placebo, scales, vectors, seed).items()
        },
    )


def _has_a_flow(feature: FeatureId, world: World) -> bool:
    """From 20 % to 80 % of the depth: features nearer to either end have no layers to flow through
    on that side."""
    depth = feature.site.layer / max(world.model.n_layers - 1, 1)
    return 0.2 <= depth <= 0.8


def _best_output(
    world: World, contrasts: Sequence[Contrast], topic: str
) -> tuple[Contrast, OutputScore]:
    """Of the features that read the topic, the one whose push at its own layer goes most into the
    topic's words."""
    tokens = tuple(lexicon_tokens(world.model, topic_named(topic).lexicon))
    profiles = [
        Profile(feature=c.feature, density=c.fire_rate, strong=1.0, own_tokens=tokens, purity=1.0)
        for c in contrasts
    ]
    neutral = NeutralText.prepare(
        world.model, read_prompts().neutral_texts[-_N_NEUTRAL:], n_tokens=32
    )
    scales = Scales(norms=world.norms, activations={})
    plans = [
        single(Flow(seed=c.feature, steps=((c.feature, 1.0),)), scales, strength=_SCORING_STRENGTH)
        for c in contrasts
    ]
    scores = output_scores(world.model, world.saes, profiles, plans, neutral)
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


def _plans(
    world: World,
    flow: Flow,
    placebo: Flow,
    scales: Scales,
    vectors: Mapping[Site, object],
    seed: int,
) -> dict[str, Plan]:
    site = flow.seed.site
    along = {s: vectors[s] for s in flow.sites}
    seed_only = Flow(seed=flow.seed, steps=((flow.seed, 1.0),))
    return {
        "difference_single": difference({site: vectors[site]}, scales),  # type: ignore[dict-item]
        "difference_flow": difference(along, scales),  # type: ignore[arg-type]
        "random_direction": random_direction(flow, scales, d_model=world.model.d_model, seed=seed),
        "random_flow": flow_additive(placebo, scales),
        "single": single(flow, scales),
        "copied": copied(flow, scales),
        "flow": flow_additive(flow, scales),
        "flow_exponential": flow_additive(flow, scales, schedule=Exponential(rate=-0.05)),
        "flow_cosines": flow_additive(flow, scales, schedule=CosineProduct()),
        "flow_closed_loop": flow_levels(flow, scales),
        "suppress_single": flow_levels(seed_only, scales, edit=Cap()),
        "suppress_flow": flow_levels(flow, scales, edit=Cap()),
        "suppress_random_flow": flow_levels(placebo, scales, edit=Cap()),
    }
