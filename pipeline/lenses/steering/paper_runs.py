"""The steering experiments of Feature Flow on one's own model, with the controls they lacked, and
no judge.

For a topic: its best-reading features (`n_seeds`) and the flows through them, cut where a link's
cosine is below 0.5.

Deactivation, h ← h + (r − 1)·Σ a·d over r, on texts of the topic and of other topics
(teacher-forced):

- `seeds`: the seed features only (the paper's baseline); `layer l`: the flow's nodes of one layer;
  `up to l`: of all layers to l (the paper's cumulative mode); `random`: for every node another
  feature of its site that is active as often (the control that the paper has not).
- `removed`: fall of the topic texts' log-likelihood, nats a token; `guard`: relative rise of the
  loss on other texts.

Activation, h ← h + s·w_l·u at every token over s, along the best seed's flow; s in units of the
median norm at the seed's site, weights constant, exponential (e^(−0.05 l)) or linear (to the
smallest s at the last layer):

- modes as above, and `copied` (the seed's direction at every layer) and `random` (another feature's
  flow).
- `kl` on neutral text, `selectivity` on texts; for the whole flow also samples: `success`,
  `coherent`, both.

Cost: about 100 passes over the texts and as many short samples a topic. Source: Feature Flow,
section 5.3, appendices B and C.3; there one prompt, one language model as judge, no control.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from data.concepts.prompts import read_prompts
from featureflow.progress import Progress, silent
from featureflow.sites import FeatureId
from pipeline.lenses.steering.topic_samples import TopicSampler
from pipeline.lenses.steering.topics import TopicSetup, set_up_topic
from pipeline.steering_run import Steering
from steering.arms import Flow, copied
from steering.dose import NeutralText, measure
from steering.edits import Add, Rescale
from steering.plan import Node, Plan
from steering.reading import CoherenceLimits, coherence_limits
from steering.schedules import Constant, Exponential, Linear, Schedule
from steering.sequences import SteerableModel
from steering.teacher_forced import log_likelihoods, selectivity

_LEAST_COSINE = 0.5


@dataclass(frozen=True, kw_only=True)
class PaperOptions:
    """Grids and sizes. `remaining` are the paper's r, `strengths` its s in median norms at the
    seed's site."""

    remaining: tuple[float, ...] = (0.5, 0.0, -1.0, -2.0, -4.0, -8.0)
    strengths: tuple[float, ...] = (0.01, 0.02, 0.04, 0.08, 0.16)
    n_seeds: int = 10
    n_layers: int = 6
    n_prompts: int = 10
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What the experiments run on."""

    steering: Steering
    sampler: TopicSampler
    neutral: NeutralText
    options: PaperOptions
    progress: Progress = silent


def neutral_text(model: SteerableModel) -> NeutralText:
    """What doses of activation are measured on."""
    return NeutralText.prepare(model, read_prompts().neutral_texts[:12], n_tokens=32)


def deactivation(paper: Paper, setup: TopicSetup, seeds: Sequence[FeatureId]) -> pd.DataFrame:
    """One row a mode, layer and r."""
    nodes = sorted(
        {feature for seed in seeds for feature in _kept_flow(paper.steering, seed)}, key=_order
    )
    texts = paper.sampler.texts(setup.topic, "test")
    before = log_likelihoods(paper.steering.model, [*texts[0], *texts[1]])
    usual = float(np.mean(before[len(texts[0]) :]))
    modes = [*_modes(nodes, paper.options.n_layers), ("seeds", None, list(seeds))]
    modes.append(("random", None, sorted(_random_like(paper, nodes), key=_order)))
    rows = []
    for done, (mode, layer, features) in enumerate(modes):
        for r in paper.options.remaining:
            plan = Plan(
                nodes=tuple(Node(at=str(f)) for f in features), edit=Rescale(), strength=1 - r
            )
            changed = selectivity(
                paper.steering.model, paper.steering.saes, plan, *texts, unsteered=before
            )
            removed, spared = -float(np.mean(changed.topic)), -float(np.mean(changed.contrast))
            rows.append(
                {
                    "topic": setup.topic,
                    "mode": mode,
                    "layer": layer,
                    "r": r,
                    "n_nodes": len(features),
                    "removed": removed,
                    "guard": spared / -usual,
                    "selectivity": changed.score,
                }
            )
        paper.progress(f"deactivate {setup.topic}", done + 1, len(modes))
    return pd.DataFrame(rows)


def activation(paper: Paper, setup: TopicSetup) -> pd.DataFrame:
    """One row a mode, layer, schedule and s; whole flows also carry samples' measures."""
    flow = _cut(setup.flow)
    texts = paper.sampler.texts(setup.topic, "test")
    before = log_likelihoods(paper.steering.model, [*texts[0], *texts[1]])
    plans = list(_activation_plans(paper, setup, flow))
    rows = []
    for done, (keys, plan) in enumerate(plans):
        changed = selectivity(
            paper.steering.model, paper.steering.saes, plan, *texts, unsteered=before
        )
        kl = measure(
            paper.steering.model, paper.steering.saes, plan, paper.neutral, monitor=False
        ).kl
        rows.append({"topic": setup.topic, **keys, "kl": kl, "selectivity": changed.score})
        paper.progress(f"activate {setup.topic}", done + 1, len(plans))
    whole = [place for place, (keys, _) in enumerate(plans) if keys["layer"] is None]
    for place, found in zip(
        whole, _sampled(paper, setup, [plans[place][1] for place in whole]), strict=True
    ):
        rows[place].update(found)
    return pd.DataFrame(rows)


def run_paper(paper: Paper, topics: Sequence[str]) -> Iterator[tuple[pd.DataFrame, pd.DataFrame]]:
    """(deactivation, activation) over the topics so far, after each of them."""
    off, on = [], []
    for topic in topics:
        setup = set_up_topic(paper.steering, topic, seed=paper.options.seed)
        contrasts = [contrast.feature for contrast in setup.contrasts]
        off.append(
            deactivation(
                paper, setup, seeds_of(paper.steering, setup, contrasts, paper.options.n_seeds)
            )
        )
        on.append(activation(paper, setup))
        yield pd.concat(off, ignore_index=True), pd.concat(on, ignore_index=True)


def seeds_of(
    steering: Steering, setup: TopicSetup, contrasts: Sequence[FeatureId], n: int
) -> list[FeatureId]:
    """The first `n` features that tell the topic, no two on one flow; the study's seed first."""
    taken: list[FeatureId] = []
    used: set[FeatureId] = set()
    for feature in [setup.seed.feature, *contrasts]:
        flow = _kept_flow(steering, feature)
        if len(taken) < n and not used & set(flow):
            taken.append(feature)
            used |= set(flow)
    return taken


def _kept_flow(steering: Steering, seed: FeatureId) -> list[FeatureId]:
    """The features around the seed, cut at the first weak link on either side."""
    return [feature for feature, _ in _cut(steering.flow(seed)).steps]


def _cut(flow: Flow) -> Flow:
    plan = Plan.from_chain(
        flow.steps,
        edit=Add(),
        scales={f: 1.0 for f, _ in flow.steps},
        seed=flow.seed,
        minimum_cosine=_LEAST_COSINE,
    )
    kept = {node.at for node in plan.nodes}
    return replace(flow, steps=tuple(step for step in flow.steps if str(step[0]) in kept))


def _modes(
    nodes: Sequence[FeatureId], n_layers: int
) -> Iterator[tuple[str, int | None, list[FeatureId]]]:
    """Single layers and layers up to, at up to `n_layers` places spread over the flow, and the
    whole."""
    layers = sorted({feature.site.layer for feature in nodes})
    for place in np.unique(
        np.linspace(0, len(layers) - 1, min(n_layers, len(layers))).round().astype(int)
    ):
        layer = layers[place]
        yield "layer", layer, [f for f in nodes if f.site.layer == layer]
        yield "up to", layer, [f for f in nodes if f.site.layer <= layer]
    yield "whole flow", None, list(nodes)


def _activation_plans(
    paper: Paper, setup: TopicSetup, flow: Flow
) -> Iterator[tuple[dict[str, Any], Plan]]:
    smallest = min(paper.options.strengths)
    control = tuple(step for step in setup.control.steps if step[0].site in set(flow.sites))
    for s in paper.options.strengths:
        schedules: list[Schedule] = [Constant(), Exponential(), Linear(end=smallest / s)]
        for schedule in schedules:
            yield (
                _keys("whole flow", None, schedule.kind, s),
                _pushed(paper, flow, flow.steps, schedule, s),
            )
        whole = _pushed(paper, flow, flow.steps, Constant(), s)
        seed_only = replace(
            whole, nodes=tuple(node for node in whole.nodes if node.at == str(flow.seed))
        )
        yield _keys("seeds", None, "constant", s), seed_only
        same = copied(flow, setup.scales, strength=s)
        weighted = tuple(node.replace(weight=1.0, scale=_unit(paper, flow)) for node in same.nodes)
        yield _keys("copied", None, "constant", s), replace(same, nodes=weighted)
        yield _keys("random", None, "constant", s), _pushed(paper, flow, control, Constant(), s)
        for mode, layer, features in _modes(
            [feature for feature, _ in flow.steps], paper.options.n_layers
        ):
            if layer is not None:
                kept = {str(feature) for feature in features}
                nodes = tuple(node for node in whole.nodes if node.at in kept)
                yield _keys(mode, layer, "constant", s), replace(whole, nodes=nodes)


def _pushed(
    paper: Paper, flow: Flow, steps: Sequence[tuple[FeatureId, float]], schedule: Schedule, s: float
) -> Plan:
    """The raw formula: every node gets s × the schedule's weight, no budget."""
    scales = {feature: _unit(paper, flow) for feature, _ in steps}
    return Plan.from_chain(
        steps, edit=Add(), scales=scales, schedule=schedule, budget="none", strength=s
    )


def _unit(paper: Paper, flow: Flow) -> float:
    return paper.steering.norms[flow.seed.site]


def _keys(mode: str, layer: int | None, schedule: str, s: float) -> dict[str, Any]:
    return {"mode": mode, "layer": layer, "schedule": schedule, "s": s}


def _sampled(paper: Paper, setup: TopicSetup, plans: Sequence[Plan]) -> list[dict[str, float]]:
    """Success, coherence and both, of samples from test prompts, for every plan."""
    unsteered = paper.sampler.unsteered("dev")
    limits: CoherenceLimits = coherence_limits(paper.sampler.read(unsteered))
    threshold = setup.classifier.threshold_on([sample.text for sample in unsteered])
    prompts = paper.sampler.prompts(setup.topic, "test")[: paper.options.n_prompts]
    found = []
    for samples in paper.sampler.generated(prompts, plans, n_samples=1):
        table = pd.DataFrame(
            paper.sampler.records(setup.classifier, setup.lexicon, samples, limits, threshold)
        )
        found.append(
            {
                "success": float(table["success"].mean()),
                "coherent": float(table["coherent"].mean()),
                "succ_coh": float((table["success"] & table["coherent"]).mean()),
            }
        )
    return found


def _random_like(paper: Paper, nodes: Sequence[FeatureId]) -> set[FeatureId]:
    """For every node another feature of its site that is active about as often, and is none of the
    nodes."""
    taken = set(nodes)
    found: set[FeatureId] = set()
    for node in nodes:
        others = paper.steering.random_features(
            node, seed=paper.options.seed, excluded=taken | found
        )
        found.add(others[0])
    return found - taken


def _order(feature: FeatureId) -> tuple[int, int]:
    return feature.site.layer, feature.latent
