"""A figure for the run's front page: how often features are active, and how many have a label that
held."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from featureflow.figures import KINDS, legend, panels
from featureflow.sites import parse_site


def draw_features(features: pd.DataFrame) -> Figure:
    """Two panels by layer: median firing density with its middle 90 %, and the share of living
    features with a label that passed its held-out test. `features` is the table of that name."""
    sites = {short: parse_site(short) for short in features["site"].unique()}
    figure, (density, labelled) = panels(2, 1, width=9.0, height=2.6, share_x=True)
    for kind, (title, colour) in KINDS.items():
        chosen = sorted((site.layer, short) for short, site in sites.items() if site.kind == kind)
        if not chosen:
            continue
        layers = [layer for layer, _ in chosen]
        alive = [features[(features["site"] == short) & features["alive"]] for _, short in chosen]
        low, middle, high = np.array([_quantiles(part["density"]) for part in alive]).T
        density.plot(layers, middle, "o-", color=colour, label=title, markersize=3)
        density.fill_between(layers, low, high, color=colour, alpha=0.12, linewidth=0)
        share = [part["label_accepted"].mean() if len(part) else np.nan for part in alive]
        labelled.plot(layers, share, "o-", color=colour, markersize=3)
    density.set(yscale="log")
    density.set_title("share of tokens a living feature is active on: median, middle 90 %")
    legend(density)
    labelled.set(xlabel="layer", ylim=(0, 1))
    labelled.set_title("living features with a label that held on other documents")
    return figure


def _quantiles(values: pd.Series) -> tuple[float, float, float]:
    if not len(values):
        return (np.nan, np.nan, np.nan)
    low, middle, high = np.quantile(np.maximum(values, 1e-6), [0.05, 0.5, 0.95])
    return float(low), float(middle), float(high)
