"""Figures of the flow graph: link strength against chance, classes by layer, and the flow of one feature.

The only module of this package that plots. Every function writes one PNG and returns nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.flow.nodes import CLASSES

_COLOURS = {"translated": "#3b6fb6", "processed": "#7a5195", "newborn": "#e07b39", "unexplained": "#b8b8b8"}
_TITLES = {
    "residual": "layer → next layer (residual)",
    "mlp": "MLP → residual stream",
    "attention": "attention → residual stream",
}


def draw_link_strengths(pairs: pd.DataFrame, path: Path) -> None:
    """Per pair of dictionaries: median best cosine, the null's median and 99th percentile, the threshold at the FDR."""
    relations = [name for name in _TITLES if name in set(pairs["relation"])]
    figure = Figure(figsize=(7.5, 2.6 * len(relations) + 0.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(len(relations), 1, sharey=True))
    for axis, relation in zip(axes, relations, strict=True):
        _strengths(axis, pairs[pairs["relation"] == relation].reset_index(drop=True))
        axis.set_title(_TITLES[relation], loc="left", fontsize=10)
    axes[0].legend(fontsize=8, loc="best")
    figure.savefig(path, dpi=130)


def draw_class_shares(nodes: pd.DataFrame, path: Path) -> None:
    """Share of carried, processed, new and unexplained features, layer by layer."""
    known = nodes[nodes["class"].notna()]
    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    axis = figure.subplots()
    if len(known):
        shares = pd.crosstab(known["layer"], known["class"].astype(str), normalize="index")
        below = np.zeros(len(shares))
        for name in CLASSES:
            height = shares[name].to_numpy() if name in shares else np.zeros(len(shares))
            axis.bar(shares.index.to_numpy(), height, bottom=below, width=0.85, color=_COLOURS[name], label=name)
            below += height
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axis.set_xlabel("layer")
    axis.set_ylabel("share of living features")
    axis.set_ylim(0, 1)
    figure.savefig(path, dpi=130)


def _strengths(axis: Axes, pairs: pd.DataFrame) -> None:
    place = np.arange(len(pairs))
    axis.plot(place, pairs["cosine_median"], color="#3b6fb6", marker="o", markersize=3, label="best cosine, median")
    axis.plot(place, pairs["null_median"].astype(float), color="#888888", label="chance, median")
    axis.plot(place, pairs["null_p99"].astype(float), color="#888888", linestyle="--", label="chance, 99th percentile")
    axis.scatter(
        place, pairs["threshold"].astype(float), marker="_", color="#c0392b", label="kept from here on", zorder=3
    )
    step = max(1, len(pairs) // 15)
    axis.set_xticks(place[::step], pairs["target_site"].astype(str)[::step], fontsize=7)
    axis.set_ylabel("cosine")
    axis.set_ylim(0, 1.02)
