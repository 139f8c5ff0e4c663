"""Figures of the flow graph: link strength against chance, classes by layer, and the flow of one
feature.

The only module of this package that plots.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from featureflow.figures import COLOURS, legend, panels
from featureflow.sites import FeatureId
from pipeline.flow.graph import FlowGraph
from pipeline.flow.nodes import CLASSES

_COLOURS = {
    "translated": COLOURS[0],
    "processed": COLOURS[3],
    "newborn": COLOURS[1],
    "unexplained": COLOURS[7],
}
_TITLES = {
    "residual": "layer → next layer (residual)",
    "mlp": "MLP → residual stream",
    "attention": "attention → residual stream",
}


def draw_link_strengths(pairs: pd.DataFrame) -> Figure:
    """Per pair of dictionaries: median best cosine, the null's median and 99th percentile, the
    threshold at the FDR."""
    relations = [name for name in _TITLES if name in set(pairs["relation"])]
    figure, axes = panels(len(relations), width=9.0, height=2.7, share_y=True)
    for axis, relation in zip(axes, relations, strict=True):
        _strengths(axis, pairs[pairs["relation"] == relation].reset_index(drop=True))
        axis.set_title(_TITLES[relation], loc="left")
    legend(axes[0], outside=True)
    return figure


def draw_class_shares(nodes: pd.DataFrame) -> Figure:
    """Share of carried, processed, new and unexplained features, layer by layer."""
    known = nodes[nodes["class"].notna()]
    figure, (axis,) = panels(width=7.5, height=3.2)
    if len(known):
        shares = pd.crosstab(known["layer"], known["class"].astype(str), normalize="index")
        below = np.zeros(len(shares))
        for name in CLASSES:
            height = shares[name].to_numpy() if name in shares else np.zeros(len(shares))
            axis.bar(
                shares.index.to_numpy(),
                height,
                bottom=below,
                width=0.85,
                color=_COLOURS[name],
                label=name,
            )
            below += height
    legend(axis, outside=True)
    axis.set(xlabel="layer", ylabel="share of living features", ylim=(0, 1))
    return figure


def draw_flow(
    graph: FlowGraph,
    feature: FeatureId | str,
    *,
    label_of: Callable[[str], str] | None = None,
    max_hops: int = 3,
    n_per_site: int = 4,
) -> Figure:
    """The flow through one feature: columns are layers, the chain is the middle line, strong links
    are thick."""
    here = graph.number(feature)
    chain = {graph.number(step.feature) for step in graph.chain(feature)}
    shown = _shown(graph, here, chain, max_hops, n_per_site)
    places = _places(graph, shown, chain)
    layers = [layer for layer, _ in places.values()]
    figure, (axis,) = panels(width=max(5.0, 1.15 * (max(layers) - min(layers) + 2)), height=4.2)
    _draw_links(axis, graph, places)
    for number, (x, y) in places.items():
        _draw_feature(axis, graph, number, x, y, here=number == here, label_of=label_of)
    axis.set_xticks(sorted({round(x) for x in layers}))
    axis.set_xlabel("layer")
    axis.set_yticks([])
    axis.margins(0.12, 0.2)
    axis.set_title(f"Flow through {graph.feature(here)}", loc="left")
    axis.spines["left"].set_visible(False)
    return figure


def _shown(
    graph: FlowGraph, here: int, chain: set[int], max_hops: int, n_per_site: int
) -> set[int]:
    """The chain, its modules, and the strongest features within reach, at most `n_per_site` for
    each site."""
    feature = graph.feature(here)
    reached = [
        *graph.ancestors(feature, max_hops=max_hops),
        *graph.descendants(feature, max_hops=max_hops),
    ]
    leaves = [leaf.feature for number in chain for leaf in graph.leaves(graph.feature(number))]
    shown = chain | {graph.number(leaf) for leaf in leaves}
    counts: dict[str, int] = {}
    for found in sorted(reached, key=lambda item: -item.strength):
        site = found.feature.site.short
        if counts.get(site, 0) < n_per_site and found.feature.site.is_residual:
            counts[site] = counts.get(site, 0) + 1
            shown.add(graph.number(found.feature))
    return shown


def _places(graph: FlowGraph, shown: set[int], chain: set[int]) -> dict[int, tuple[float, float]]:
    """The chain on the middle line, other residual features above it, modules below and a little to
    the left."""
    places: dict[int, tuple[float, float]] = {}
    taken: dict[str, int] = {}
    for number in sorted(shown):
        site = graph.feature(number).site
        if number in chain:
            places[number] = (site.layer, 0.0)
            continue
        taken[site.short] = taken.get(site.short, 0) + 1
        module = not site.is_residual
        below = -(0.6 if site.kind.startswith("mlp") else 1.3) - 0.3 * taken[site.short]
        height = below if module else 0.8 * taken[site.short]
        places[number] = (site.layer - (0.35 if module else 0.0), height)
    return places


def _draw_links(axis: Axes, graph: FlowGraph, places: dict[int, tuple[float, float]]) -> None:
    for row in graph.links_between(places).itertuples(index=False):
        (x0, y0), (x1, y1) = places[int(row.source)], places[int(row.target)]
        strength = float(row.cosine)
        style = "-" if row.mutual else "--"
        width, alpha = 0.5 + 2.5 * strength, 0.25 + 0.6 * strength
        axis.plot(
            [x0, x1], [y0, y1], style, color="#555555", linewidth=width, alpha=alpha, zorder=1
        )


def _draw_feature(
    axis: Axes,
    graph: FlowGraph,
    number: int,
    x: float,
    y: float,
    *,
    here: bool,
    label_of: Callable[[str], str] | None,
) -> None:
    name = str(graph.feature(number))
    kind = graph.nodes["class"].iat[number]
    marker = {"mlp_out": "s", "attn_out": "^"}.get(str(graph.nodes["kind"].iat[number]), "o")
    colour = _COLOURS.get(str(kind), "#dddddd")
    size, edge = (70, "black") if here else (38, "none")
    axis.scatter([x], [y], s=size, marker=marker, color=colour, edgecolor=edge, zorder=2)
    text = f"{name}\n{label_of(name)[:24]}" if label_of else name
    axis.annotate(text, (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=6)


def _strengths(axis: Axes, pairs: pd.DataFrame) -> None:
    place = np.arange(len(pairs))
    axis.plot(
        place,
        pairs["cosine_median"],
        color=COLOURS[0],
        marker="o",
        markersize=3,
        label="best cosine, median",
    )
    chance = (
        ("null_median", ".-", "chance, median"),
        ("null_p99", ".--", "chance, 99th percentile"),
    )
    for column, style, label in chance:
        axis.plot(
            place, pairs[column].astype(float), style, color="#888888", markersize=3, label=label
        )
    axis.scatter(
        place,
        pairs["threshold"].astype(float),
        marker="_",
        color=COLOURS[1],
        label="kept from here on",
        zorder=3,
    )
    step = max(1, len(pairs) // 15)
    axis.set_xticks(place[::step], pairs["target_site"].astype(str)[::step], fontsize=7)
    axis.set_ylabel("cosine")
    axis.set_ylim(0, 1.02)
