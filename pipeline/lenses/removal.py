"""Is a feature gone when its whole flow is removed, for readers that are not of the flow?

1. Random living features of several layers, whose flow reaches `ahead` layers on.
2. Each is removed along its whole flow, where it is active, at every third step, at its own layer
   alone, over-subtracted there, projected out of every layer, and along a random flow.
3. Readers `ahead` layers on and at the last layer say what is left: a linear probe, the difference
   of means, another latent of the same SAE, a second seed's latent, the probability of the
   feature's top tokens. A reader counts for a feature when it tells its active tokens from silent
   ones (AUROC of at least `least_auroc`).
4. Side effects: KL where the feature is active, before its first activation, after it on silent
   tokens, and in contexts without it.
5. Beside it what the same edits would do if every block passed them on as they are (the arm without
   the model).

Intervals are over features. Cost: a forward pass a feature and arm, a training a second seed.
Source: Feature Flow §5.2, read with readers of its own there; here with others.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
from annotated_types import Ge, Gt, Le
from matplotlib.figure import Figure
from typing_extensions import Doc

from featureflow.errors import UserError
from featureflow.figures import COLOURS, panels
from featureflow.sites import FeatureId, Site
from featureflow.statistics import bootstrap_mean, named
from pipeline.findings import Finding
from pipeline.flow.start_null import Recipe
from pipeline.lenses.base import Seeded
from pipeline.lenses.parts.layers import spread
from pipeline.lenses.seed_ceiling import trained_again
from pipeline.lenses.steering.removal_trial import (
    LEAST_AUROC,
    Amount,
    Held,
    flow_of,
    reading_sites,
    trials,
)
from pipeline.run import Run
from sae import Sae
from steering.removal import OVER_SUBTRACTED, WHERE

TITLE = "what is left of a feature when its whole flow is removed"
NEEDS = ("collect", "train", "link")
INDEPENDENT = ("probe", "difference of means", "own latent", "second seed", "words")
_FLOW, _SINGLE = "flow", "single"
_DRAWN_PER_WANTED = 3
"""Not every feature that is alive in the store is active in the smaller held-out part."""


class Config(Seeded):
    """How many features, and on how much text."""

    n_features: Annotated[int, Ge(1), Doc("features removed, drawn by the seed")] = 104
    n_layers: Annotated[int, Ge(1), Doc("layers they are drawn from")] = 8
    ahead: Annotated[int, Ge(1), Doc("layers after its own at which a feature is read")] = 8
    max_density: Annotated[
        float, Gt(0), Le(1), Doc("a drawn feature is active on at most this share of tokens")
    ] = 0.05
    n_rows: Annotated[int, Ge(64), Doc("training rows that readers are fitted on")] = 16384
    n_positions: Annotated[int, Ge(8), Doc("tokens of a held-out context, from its start")] = 128
    n_with: Annotated[int, Ge(1), Doc("held-out contexts with a feature")] = 5
    n_without: Annotated[int, Ge(1), Doc("held-out contexts without it")] = 2
    n_seconds: Annotated[
        int, Ge(0), Doc("reading sites for which a second seed is trained, the last one first")
    ] = 3
    steps: Annotated[
        int | None, Ge(1), Doc("optimizer steps of a second seed; none for those of the first")
    ] = None
    least_auroc: Annotated[
        float, Ge(0), Le(1), Doc("a reader below this does not count for a feature")
    ] = LEAST_AUROC


def look(run: Run, config: Config) -> Finding:
    """Remove features and read what is left. Raises UserError when no flow is long enough."""
    features, drawn = _drawn(run, config)
    names = ("n_rows", "n_positions", "n_with", "n_without", "seed")
    amount = Amount(**{name: getattr(config, name) for name in names})
    left, effects = trials(
        run, features, ahead=config.ahead, amount=amount, seconds=_seconds(run, features, config)
    )
    summary = left_summary(left, config)
    changed = _effect_summary(effects, config.seed)
    headline = _headline(left, summary, changed, config)
    return Finding(
        tables={
            "left": summary,
            "side_effects": changed,
            "layers": drawn,
            "left_by_feature": left,
            "side_effects_by_feature": effects,
        },
        text=_text(headline, drawn, config),
        headline=headline,
        figure=lambda: _draw(summary, changed),
        columns=_columns(left, config),
    )


def _drawn(run: Run, config: Config) -> tuple[list[FeatureId], pd.DataFrame]:
    """Features by layer, as many of each as there are to draw, and how many could be."""
    sites = list(run.steering.saes)
    layers = {site.layer for site in sites}
    inner = [site for site in sites[1:] if site.layer + config.ahead in layers] or sites[:1]
    generator = np.random.default_rng(config.seed)
    features: list[FeatureId] = []
    rows, held = [], Held(run=run, n_positions=config.n_positions)
    chosen = spread(inner, config.n_layers)
    for done, site in enumerate(chosen):
        nodes = run.graph.nodes
        here = nodes[(nodes["site"] == site.short) & nodes["alive"] & (nodes["density"] > 0)]
        here = here[here["density"] <= config.max_density]
        wanted = -(-(config.n_features - len(features)) // (len(chosen) - done))
        order = [FeatureId(site, int(latent)) for latent in generator.permutation(here["latent"])]
        long: list[FeatureId] = []
        n_seen = 0
        while n_seen < len(order) and len(long) < _DRAWN_PER_WANTED * wanted:
            if _reach(run, order[n_seen]) >= min(config.ahead, sites[-1].layer - site.layer):
                long.append(order[n_seen])
            n_seen += 1
        kept = held.with_both_kinds(long)[:wanted]
        features += kept
        rows.append(
            {"site": site.short, "looked_at": n_seen, "long_flow": len(long), "drawn": len(kept)}
        )
    if not features:
        raise UserError(
            f"no feature has a flow that reaches {config.ahead} layers on",
            where=str(run.artifact("link").path),
            fix="ask for fewer layers (ahead)",
        )
    return [features[k] for k in generator.permutation(len(features))], pd.DataFrame(rows)


def _reach(run: Run, feature: FeatureId) -> int:
    return flow_of(run, feature).sites[-1].layer - feature.site.layer


def _seconds(run: Run, features: list[FeatureId], config: Config) -> dict[Site, Sae]:
    """Second seeds at the last site and at some of those `ahead` layers on."""
    sites = {site for each in features for site in reading_sites(run, each, config.ahead).values()}
    ordered = sorted(sites)
    wanted = [ordered[-1], *spread(ordered[:-1], max(config.n_seconds - 1, 0))]
    found = {}
    for site in wanted[: config.n_seconds]:
        recipe = Recipe.of(run.saes.description(site)["metadata"])
        if recipe is not None:
            found[site] = trained_again(run, site, recipe, seed=config.seed, steps=config.steps)
    return found


def left_summary(left: pd.DataFrame, config: Config) -> pd.DataFrame:
    """By arm, reader and place: mean over the features that the reader tells, with intervals."""
    names = left["reader"].str.rsplit(" ", n=1)
    words = left["reader"] == "words"
    table = left.assign(reader=names.str[0], place=names.str[-1].where(~words, "output"))
    table = table[table["auroc"] >= config.least_auroc]
    rows = []
    for (arm, reader, place), group in table.groupby(["arm", "reader", "place"], sort=False):
        # a reading that hardly differs where the feature is active divides by nothing
        found = bootstrap_mean(group["left"].clip(-1, 2).tolist(), seed=config.seed)
        seen = bootstrap_mean(group["seen"].tolist(), seed=config.seed)
        rows.append(
            {
                "arm": arm,
                "reader": reader,
                "place": place,
                **named("left", found),
                "left_median": float(group["left"].median()),
                "seen_before": float(group["seen_before"].mean()),
                **named("seen", seen),
                "auroc": float(group["auroc"].mean()),
                "n_features": len(group),
                "n_activations": int(group["n"].sum()),
            }
        )
    return pd.DataFrame(rows)


def _effect_summary(effects: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows = []
    for (arm, where), group in effects.groupby(["arm", "where"], sort=False):
        row: dict[str, Any] = {"arm": arm, "where": where}
        for name in ("kl", "rise"):
            row |= named(name, bootstrap_mean(group[name].tolist(), seed=seed))
        rows.append(row | {"n_features": len(group), "n_tokens": int(group["n"].sum())})
    return pd.DataFrame(rows)


def _headline(
    left: pd.DataFrame, summary: pd.DataFrame, changed: pd.DataFrame, config: Config
) -> dict[str, Any]:
    own = left[(left["arm"] == _FLOW)].drop_duplicates("feature")

    def of(arm: str, reader: str, place: str) -> float | None:
        found = summary.query("arm == @arm and reader == @reader and place == @place")
        return round(float(found["left"].iloc[0]), 4) if len(found) else None

    def kl(arm: str, where: str) -> float | None:
        found = changed.query("arm == @arm and where == @where")
        return round(float(found["kl"].iloc[0]), 5) if len(found) else None

    ahead = f"+{config.ahead}"
    places = {"ahead": ahead, "end": "end"}
    found: dict[str, Any] = {
        "n_features": int(own["feature"].nunique()),
        "n_layers": int(own["feature"].str.split("/").str[0].nunique()),
        "n_activations": int(own["n"].sum()),
    }
    for arm in (_FLOW, _SINGLE):
        for reader in ("probe", "second seed"):
            for name, place in places.items():
                found[f"{arm}_left_{reader.replace(' ', '_')}_{name}"] = of(arm, reader, place)
        found[f"{arm}_left_words"] = of(arm, "words", "output")
        found[f"{arm}_kl_active"], found[f"{arm}_kl_before"] = kl(arm, "active"), kl(arm, "before")
    last = f"over-subtracted, r {OVER_SUBTRACTED[-1]:g}"
    found["over_subtracted_kl_active"] = kl(last, "active")
    found["projected_kl_active"] = kl("projected", "active")
    found["projected_kl_before"] = kl("projected", "before")
    found["over_subtracted_kl_at_same_left"] = _matched(summary, changed, ahead)
    return found


def _matched(summary: pd.DataFrame, changed: pd.DataFrame, ahead: str) -> float | None:
    """KL of over-subtraction where the probe finds as much left as under the flow, between r 0 and
    the smallest r; None outside."""
    arms = [_SINGLE, *(f"over-subtracted, r {r:g}" for r in OVER_SUBTRACTED)]
    probe = summary[(summary["reader"] == "probe") & (summary["place"] == ahead)]
    left = probe.set_index("arm")["left"].to_dict()
    kl = changed[changed["where"] == "active"].set_index("arm")["kl"].to_dict()
    if not {_FLOW, *arms} <= left.keys() or not {*arms} <= kl.keys():
        return None
    points = sorted((left[arm], kl[arm]) for arm in arms)
    if not points[0][0] <= left[_FLOW] <= points[-1][0]:
        return None
    found = np.interp(left[_FLOW], [x for x, _ in points], [y for _, y in points])
    return round(float(found), 5)


def _columns(left: pd.DataFrame, config: Config) -> pd.DataFrame:
    wanted = left[(left["arm"] == _FLOW) & (left["reader"] == f"probe +{config.ahead}")]
    return pd.DataFrame(
        {"feature": wanted["feature"], f"left {config.ahead} layers on, removed": wanted["left"]}
    ).reset_index(drop=True)


def _text(headline: dict[str, Any], drawn: pd.DataFrame, config: Config) -> str:
    def said(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.2f}"

    h, reachable = headline, int(drawn["long_flow"].sum())
    share = reachable / max(int(drawn["looked_at"].sum()), 1)
    matched = h["over_subtracted_kl_at_same_left"]
    beside = (
        "it is not reached between r 0 and the smallest r"
        if matched is None
        else f"there over-subtraction costs {matched:.3f} nats"
    )
    return (
        f"{h['n_features']} random features of {h['n_layers']} layers, {h['n_activations']} "
        f"activations on held-out text; {share:.0%} of the living features of these layers have a "
        f"flow that reaches {config.ahead} layers on, and the features are drawn from those.\n\n"
        f"Left {config.ahead} layers on for a linear probe: whole flow removed "
        f"{said(h['flow_left_probe_ahead'])}, its own layer alone "
        f"{said(h['single_left_probe_ahead'])}; at the last layer {said(h['flow_left_probe_end'])} "
        f"and {said(h['single_left_probe_end'])}. For a second seed's latent: "
        f"{said(h['flow_left_second_seed_ahead'])} and {said(h['single_left_second_seed_ahead'])}; "
        f"at the last layer {said(h['flow_left_second_seed_end'])} and "
        f"{said(h['single_left_second_seed_end'])}. Of the top tokens' probability: "
        f"{said(h['flow_left_words'])} and {said(h['single_left_words'])}.\n\n"
        f"KL where the feature is active: whole flow {h['flow_kl_active']:.3f}, own layer "
        f"{h['single_kl_active']:.3f}, over-subtracted (r {OVER_SUBTRACTED[-1]:g}) "
        f"{h['over_subtracted_kl_active']:.3f}, projected {h['projected_kl_active']:.3f} nats. At "
        f"what the whole flow leaves: {beside}. Before the feature's first activation: whole flow "
        f"{h['flow_kl_before'] or 0:.4f}, projected {h['projected_kl_before'] or 0:.4f}.\n\n"
        "1 is all, 0 is what silent tokens show. The flow's own member is read beside, and is near "
        "0 by construction; what independent readers find is what counts. Arms without the model "
        "say how much of it the skip connection alone would do."
    )


def _draw(summary: pd.DataFrame, changed: pd.DataFrame) -> Figure:
    figure, axes = panels(1, 2, width=5.0)
    arms = [arm for arm in summary["arm"].unique() if "without the model" not in arm]
    place = np.arange(len(arms))
    shown = [each for each in ("probe", "second seed", "words") if each in set(summary["reader"])]
    for k, reader in enumerate(shown):
        of = summary[summary["reader"] == reader].groupby("arm")["left"].mean().reindex(arms)
        axes[0].barh(place + 0.25 * k, of, height=0.23, color=COLOURS[k], label=reader)
    axes[0].set_xlabel("left of the feature (probes: mean of both places)")
    axes[0].legend(frameon=False, fontsize=7)
    for k, where in enumerate(each for each in WHERE if each in set(changed["where"])):
        of = changed[changed["where"] == where].set_index("arm")["kl"].reindex(arms)
        axes[1].barh(place + 0.2 * k, of, height=0.18, color=COLOURS[k], label=where)
    axes[1].set_xlabel("KL, nats a token")
    axes[1].legend(frameon=False, fontsize=7)
    for axis in axes:
        axis.set_yticks(place + 0.3, arms, fontsize=7)
        axis.invert_yaxis()
    return figure
