"""Steering along a flow as Feature Flow does it, with the controls it lacked, and no judge.

For a topic: its best-reading features (`n_seeds`) and the flows through them, cut where a link's
cosine is below 0.5.

1. Deactivation, h ← h + (r − 1)·Σ a·d over r, on texts of the topic and of other topics
   (teacher-forced). Modes: `seeds`, the seed features only (the paper's baseline); `layer`, the
   flow's nodes of one layer; `up to`, of all layers to one (the paper's cumulative mode); `random`,
   for every node another feature of its site that is active as often (which the paper has not).
   `removed`: fall of the topic texts' log-likelihood, nats a token; `guard`: relative rise of the
   loss on other texts.
2. Activation, h ← h + s·w_l·u at every token over s, along the best seed's flow; s in units of the
   median norm at the seed's site, weights constant, exponential (e^(−0.05 l)) or linear (to the
   smallest s at the last layer). Modes as above, and `copied` (the seed's direction at every layer)
   and `random` (another feature's flow). `kl` on neutral text, `selectivity` on texts; for the
   whole flow also samples: `success`, `coherent`, both.

Texts are WordNet definitions of the test split. Cost: about 100 passes over the texts and as many
short samples a topic. Source: Feature Flow, section 5.3, appendices B and C.3, on Gemma 2 2B; there
one prompt, one language model as judge, no control.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import pandas as pd
from annotated_types import Ge, MinLen
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from typing_extensions import Doc

from data.concepts.topics import read_topics
from featureflow.figures import legend, panels
from featureflow.sites import FeatureId
from featureflow.statistics import Interval, bootstrap_mean
from pipeline.findings import Finding
from pipeline.lenses.base import Seeded
from pipeline.lenses.steering.figures import draw_lines
from pipeline.lenses.steering.topic_samples import SampleSizes, TopicSampler
from pipeline.lenses.steering.topics import TopicSetup, set_up_topic
from pipeline.run import Run
from pipeline.steering_run import Steering
from steering.arms import Flow, copied
from steering.dose import NeutralText, measure
from steering.edits import Add, Rescale
from steering.plan import Node, Plan
from steering.reading import coherence_limits
from steering.schedules import Constant, Exponential, Linear, Schedule
from steering.teacher_forced import log_likelihoods, selectivity

TITLE = "steering along a flow (Feature Flow, section 5.3)"
GROUP = "paper"
NEEDS = ("collect", "train", "link")
_LEAST_COSINE = 0.5


class Config(Seeded):
    """Grids and sizes."""

    n_topics: Annotated[int, Ge(1), Doc("topics of the study, in its order")] = 8
    n_seeds: Annotated[int, Ge(1), Doc("features a topic whose flows are deactivated")] = 10
    n_texts: Annotated[int, Ge(1), Doc("topical and as many other texts a topic")] = 12
    n_layers: Annotated[int, Ge(1), Doc("layers that single and cumulative modes stop at")] = 6
    n_prompts: Annotated[int, Ge(1), Doc("test prompts that whole flows are sampled from")] = 10
    n_new_tokens: Annotated[int, Ge(1), Doc("tokens a sample")] = 24
    remaining: Annotated[tuple[float, ...], MinLen(1), Doc("the paper's r: what is left")] = (
        *(0.5, 0.0, -1.0, -2.0, -4.0, -8.0),
    )
    strengths: Annotated[tuple[float, ...], MinLen(1), Doc("the paper's s, in median norms")] = (
        *(0.01, 0.02, 0.04, 0.08, 0.16),
    )


@dataclass(frozen=True, kw_only=True)
class Paper:
    """What the experiments run on."""

    steering: Steering
    sampler: TopicSampler
    neutral: NeutralText
    config: Config


def look(run: Run, config: Config) -> Finding:
    """Both experiments on every topic."""
    paper, off, on = paper_of(run.steering, config), [], []
    topics = list(read_topics())[: config.n_topics]
    for topic in run.each("topics", topics):
        setup = set_up_topic(run.steering, topic, seed=config.seed)
        off.append(deactivation(paper, setup, seeds_of(run.steering, setup, config.n_seeds)))
        on.append(activation(paper, setup))
    return finding_of(
        pd.concat(off, ignore_index=True), pd.concat(on, ignore_index=True), seed=config.seed
    )


def paper_of(steering: Steering, config: Config) -> Paper:
    sizes = SampleSizes(n_texts=config.n_texts, n_tokens=config.n_new_tokens, seed=config.seed)
    return Paper(
        steering=steering,
        sampler=TopicSampler(model=steering.model, saes=steering.saes, sizes=sizes),
        neutral=steering.neutral,
        config=config,
    )


def finding_of(deactivation: pd.DataFrame, activation: pd.DataFrame, *, seed: int) -> Finding:
    """What the paper saw, beside what this model shows. Intervals: 95 %, bootstrap over topics."""
    saw_and_shows = {
        "deactivation": _deactivation_findings(deactivation, seed),
        "activation": _activation_findings(activation, seed),
    }
    findings = pd.DataFrame(
        [(name, *pair) for name, pairs in saw_and_shows.items() for pair in pairs],
        columns=["experiment", "the paper saw", "this model shows"],
    )
    best = _best_layers(deactivation, "removed")
    control = _difference(best[best["r"] == 0.0], "whole flow", "random", "removed", seed)
    topics = ", ".join(deactivation["topic"].unique())
    headline: dict[str, Any] = {"n_topics": int(deactivation["topic"].nunique())}
    if control.n:
        headline["removed_beyond_random"] = round(control.mean, 4)
    return Finding(
        tables={
            "findings": findings,
            "deactivation": deactivation,
            "activation": activation,
            "removed": _mean_grid(best, ["mode", "r"], ["removed", "guard"]),
            "whole_flows": _mean_grid(
                activation[activation["layer"].isna()],
                ["mode", "schedule", "s"],
                ["kl", "selectivity", "success", "coherent", "succ_coh"],
            ),
        },
        text="\n".join(
            [
                f"Topics: {topics}. Intervals: 95 %, bootstrap over topics.",
                "Layer modes: the best layer of each topic and r, chosen on the very texts.",
                "",
                "| the paper saw | this model shows |",
                "|---|---|",
                *(f"| {saw} | {shows} |" for _, saw, shows in findings.itertuples(index=False)),
            ]
        ),
        headline=headline,
        figure=lambda: _draw(best, activation),
    )


def deactivation(paper: Paper, setup: TopicSetup, seeds: Sequence[FeatureId]) -> pd.DataFrame:
    """One row a mode, layer and r."""
    nodes = sorted(
        {feature for seed in seeds for feature in _kept_flow(paper.steering, seed)}, key=_order
    )
    texts = paper.sampler.texts(setup.topic, "test")
    before = log_likelihoods(paper.steering.model, [*texts[0], *texts[1]])
    usual = float(np.mean(before[len(texts[0]) :]))
    modes = [*_modes(nodes, paper.config.n_layers), ("seeds", None, list(seeds))]
    modes.append(("random", None, sorted(_random_like(paper, nodes), key=_order)))
    rows = []
    for mode, layer, features in modes:
        for r in paper.config.remaining:
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
    return pd.DataFrame(rows)


def activation(paper: Paper, setup: TopicSetup) -> pd.DataFrame:
    """One row a mode, layer, schedule and s; whole flows also carry samples' measures."""
    flow = _cut(setup.flow)
    texts = paper.sampler.texts(setup.topic, "test")
    before = log_likelihoods(paper.steering.model, [*texts[0], *texts[1]])
    plans = list(_activation_plans(paper, setup, flow))
    rows = []
    for keys, plan in plans:
        changed = selectivity(
            paper.steering.model, paper.steering.saes, plan, *texts, unsteered=before
        )
        kl = measure(
            paper.steering.model, paper.steering.saes, plan, paper.neutral, monitor=False
        ).kl
        rows.append({"topic": setup.topic, **keys, "kl": kl, "selectivity": changed.score})
    whole = [place for place, (keys, _) in enumerate(plans) if keys["layer"] is None]
    for place, found in zip(
        whole, _sampled(paper, setup, [plans[place][1] for place in whole]), strict=True
    ):
        rows[place].update(found)
    return pd.DataFrame(rows)


def seeds_of(steering: Steering, setup: TopicSetup, n: int) -> list[FeatureId]:
    """The first `n` features that tell the topic, no two on one flow; the setup's seed first."""
    taken: list[FeatureId] = []
    used: set[FeatureId] = set()
    for feature in [each.feature for each in (setup.seed, *setup.contrasts)]:
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
    smallest = min(paper.config.strengths)
    control = tuple(step for step in setup.control.steps if step[0].site in set(flow.sites))
    for s in paper.config.strengths:
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
            [feature for feature, _ in flow.steps], paper.config.n_layers
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
    limits = coherence_limits(paper.sampler.read(unsteered))
    threshold = setup.classifier.threshold_on([sample.text for sample in unsteered])
    prompts = paper.sampler.prompts(setup.topic, "test")[: paper.config.n_prompts]
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
            node, seed=paper.config.seed, excluded=taken | found
        )
        found.add(others[0])
    return found - taken


def _order(feature: FeatureId) -> tuple[int, int]:
    return feature.site.layer, feature.latent


def _deactivation_findings(table: pd.DataFrame, seed: int) -> list[tuple[str, str]]:
    best = _best_layers(table, "removed")
    small, large = best["r"].max(), best["r"].min()
    flow_seeds = _difference(best[best["r"] == small], "whole flow", "seeds", "removed", seed)
    flow_layer = _difference(best[best["r"] == small], "whole flow", "layer", "removed", seed)
    large_layer = _difference(best[best["r"] == large], "whole flow", "layer", "removed", seed)
    control = _difference(best[best["r"] == 0.0], "whole flow", "random", "removed", seed)
    guard = _difference(best[best["r"] == large], "whole flow", "random", "guard", seed)
    first, last = (_mean_layer(table, r) for r in (small, large))
    return [
        (
            "the flow's features remove more than the seeds alone, most at small perturbations",
            f"at r = {small:g}, whole flow minus seeds: {_shown(flow_seeds)} nats a token",
        ),
        (
            "cumulative beats the best single layer where the perturbation is small",
            f"whole flow minus best single layer: {_shown(flow_layer)} at r = {small:g}, "
            f"{_shown(large_layer)} at "
            f"r = {large:g}",
        ),
        (
            "(no control)",
            f"at r = 0, whole flow minus as many random features: {_shown(control)} nats a token",
        ),
        (
            "(no control)",
            f"at r = {large:g}, rise of the loss on other texts, whole flow minus random: "
            f"{_shown(guard)} (relative)",
        ),
        (
            "a larger perturbation moves the best single layer earlier",
            f"mean best layer {first:.1f} at r = {small:g}, {last:.1f} at r = {large:g}",
        ),
    ]


def _activation_findings(table: pd.DataFrame, seed: int) -> list[tuple[str, str]]:
    whole = table[table["layer"].isna()]
    s = sorted(whole["s"].unique())[len(whole["s"].unique()) // 2]
    at = whole[whole["s"] == s].assign(arm=lambda t: t["mode"] + " " + t["schedule"])

    def beside(arm: str, other: str, measure: str) -> str:
        return _shown(_difference(at, arm, other, measure, seed, key="arm"))

    rows = [
        (
            "cumulative steering raises the topic more than the single layer",
            f"at s = {s:g} a layer, selectivity, whole flow minus seed's layer: "
            + beside("whole flow constant", "seeds constant", "selectivity"),
        ),
        (
            "but can lower coherence",
            "share of samples coherent, the same: "
            + beside("whole flow constant", "seeds constant", "coherent"),
        ),
    ]
    rows += [
        (
            "which schedule is best differs by theme",
            f"{name} minus constant, samples on topic and coherent: "
            + beside(f"whole flow {name}", "whole flow constant", "succ_coh"),
        )
        for name in ("exponential", "linear")
    ]
    rows += [
        (
            "(no control)",
            f"at s = {s:g}, selectivity, whole flow minus {name}: "
            + beside("whole flow constant", f"{name} constant", "selectivity"),
        )
        for name in ("copied", "random")
    ]
    return rows


def _difference(
    table: pd.DataFrame, one: str, other: str, value: str, seed: int, *, key: str = "mode"
) -> Interval:
    """Paired over topics."""
    sides = [table[table[key] == name].groupby("topic")[value].mean() for name in (one, other)]
    return bootstrap_mean((sides[0] - sides[1]).dropna().tolist(), seed=seed)


def _best_layers(table: pd.DataFrame, value: str) -> pd.DataFrame:
    """Layer modes reduced to each topic's best layer at each r; chosen on the very texts, hence a
    ceiling."""
    layered = table[table["layer"].notna()]
    best = layered.loc[layered.groupby(["topic", "mode", "r"])[value].idxmax()]
    return pd.concat([table[table["layer"].isna()], best], ignore_index=True)


def _mean_layer(table: pd.DataFrame, r: float) -> float:
    best = _best_layers(table, "removed")
    return float(best[(best["mode"] == "layer") & (best["r"] == r)]["layer"].mean())


def _draw(best: pd.DataFrame, activation: pd.DataFrame) -> Figure:
    """Removed against r and against the loss guard; selectivity and samples against dose; layers up
    to against s."""
    figure, axes = panels(2, 3)
    removed = best.groupby(["mode", "r"], sort=False)[["removed", "guard"]].mean().reset_index()
    _curves(axes[0], removed, "mode", "r", "removed", "removed, nats a token")
    _curves(axes[1], removed, "mode", "r", "guard", "relative rise of the loss on other texts")
    whole = activation[activation["layer"].isna()].assign(
        arm=lambda t: t["mode"] + ", " + t["schedule"]
    )
    mean = _mean_grid(whole, ["arm", "s"], ["kl", "selectivity", "succ_coh"])
    _curves(axes[3], mean, "arm", "kl", "selectivity", "selectivity, nats a token")
    _curves(axes[4], mean, "arm", "kl", "succ_coh", "samples on topic and coherent")
    for axis in axes[3:5]:
        axis.set(xscale="log", xlabel="dose (nats on neutral text)")
    for axis in axes[:2]:
        axis.set(xlabel="r (what is left of the features)")
    grid = activation[activation["mode"] == "up to"].pivot_table(
        index="layer", columns="s", values="selectivity"
    )
    image = axes[2].imshow(grid.to_numpy(), aspect="auto", cmap="cividis", origin="lower")
    axes[2].set_xticks(range(grid.shape[1]), [f"{s:g}" for s in grid.columns])
    axes[2].set_yticks(range(grid.shape[0]), [f"L{layer:g}" for layer in grid.index])
    axes[2].set(xlabel="s", title="selectivity, layers up to")
    figure.colorbar(image, ax=axes[2]).ax.set_title("nats", fontsize=7)
    axes[5].remove()
    return figure


def _curves(axis: Axes, table: pd.DataFrame, arm: str, x: str, value: str, name: str) -> None:
    draw_lines(axis, table.assign(arm=table[arm], value=table[value]).sort_values(x), x=x)
    axis.set(ylabel=name)
    legend(axis)


def _mean_grid(table: pd.DataFrame, keys: list[str], values: list[str]) -> pd.DataFrame:
    return table.groupby(keys, sort=False)[values].mean().reset_index()


def _shown(interval: Interval) -> str:
    """Without an interval where there is only one topic."""
    if interval.n < 2:
        return f"{interval.mean:+.3f} (one topic)"
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"
