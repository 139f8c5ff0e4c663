"""Figures and tables of what the stages made: what was collected, how training went, how often
features are active. Each is by layer, one line a kind of site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

from data.store import ActivationStore
from featureflow.figures import KINDS, legend, panels
from featureflow.sites import Site, parse_site

Curves = Mapping[Site, Sequence[Mapping[str, float]]]
_LINES = {"mlp_out": "--", "attn_out": ":"}


def site_table(store: ActivationStore) -> pd.DataFrame:
    """One row a site: rows counted, norm quantiles, variance, numbers that are not finite."""
    rows = []
    for site in store.sites:
        statistics = store.statistics(site)
        quantiles = {
            f"norm_q{round(100 * q):02d}": value for q, value in statistics.norm_quantiles.items()
        }
        rows.append(
            {
                "site": site.short,
                "layer": site.layer,
                "kind": site.kind,
                "n": statistics.n,
                "mean_norm_of_mean": float((statistics.mean.astype("float64") ** 2).sum() ** 0.5),
                "total_variance": statistics.total_variance,
                "n_non_finite": statistics.n_non_finite,
                **quantiles,
            }
        )
    return pd.DataFrame(rows)


def draw_norms(table: pd.DataFrame) -> Figure:
    """Median norm by layer for each kind of site, with the band from the 5th to the 95th
    percentile."""
    figure, (axis,) = panels(width=7, height=4)
    for kind, part in table.sort_values("layer").groupby("kind", sort=False):
        title, colour = KINDS[kind]
        layers, low, high = part["layer"], part["norm_q05"], part["norm_q95"]
        axis.plot(layers, part["norm_q50"], "o-", markersize=3, color=colour, label=title)
        axis.fill_between(layers, low, high, alpha=0.15, color=colour, linewidth=0)
    axis.set(xlabel="layer", ylabel="norm of the activation (ordinary tokens)", yscale="log")
    axis.set_title("Median norm by layer; band: 5th to 95th percentile")
    legend(axis)
    return figure


def draw_curves(curves: Curves) -> Figure:
    """Training FVU and loss against steps, one line a site, coloured by layer."""
    figure, axes = panels(1, 2)
    deepest = max((site.layer for site in curves), default=1) or 1
    for site, records in curves.items():
        steps = [record["step"] for record in records]
        colour = colormaps["viridis"](site.layer / deepest)
        for axis, name in zip(axes, ("fvu", "loss"), strict=True):
            values = [record[name] for record in records]
            axis.plot(steps, values, _LINES.get(site.kind, "-"), color=colour, linewidth=0.8)
    for axis, label in zip(axes, ("FVU of the batches", "loss"), strict=True):
        axis.set(xlabel="step", ylabel=label, yscale="log")
    figure.suptitle(
        "Training curves; dark: early layers, light: late; solid: residual, dashed: MLP, dotted: "
        "attention"
    )
    return figure


def draw_layers(described: Mapping[Site, Mapping[str, Any]]) -> Figure:
    """Held-out FVU, held-out L0 and the share of dead latents by layer, one line a kind of site."""
    names = {
        "held_out_fvu": "FVU, held out",
        "held_out_l0": "L0, held out",
        "dead": "share of dead latents",
    }
    figure, axes = panels(1, 3, width=3.7)
    for kind in dict.fromkeys(site.kind for site in sorted(described)):
        title, colour = KINDS[kind]
        sites = sorted(site for site in described if site.kind == kind)
        for axis, name in zip(axes, names, strict=True):
            known = [site for site in sites if described[site][name] is not None]
            values = [described[site][name] for site in known]
            layers = [site.layer for site in known]
            axis.plot(layers, values, "o-", markersize=3, color=colour, label=title)
    for axis, label in zip(axes, names.values(), strict=True):
        axis.set(xlabel="layer", ylabel=label, ylim=(0, None))
    legend(axes[0])
    return figure


def draw_features(features: pd.DataFrame) -> Figure:
    """Two panels by layer: median density with its middle 90 %, and the share of living
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
