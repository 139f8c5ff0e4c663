"""What evaluation found, drawn: quality by layer, and the frontier of sparsity and error where
several dictionaries share a site. Each function writes one PNG."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_TITLES = {
    "resid_post": "residual stream",
    "mlp_out": "MLP output",
    "attn_out": "attention output",
    "resid_pre": "before the block",
    "resid_mid": "between attention and MLP",
}
_COLOURS = {
    "resid_post": "#3b6fb6",
    "mlp_out": "#e07b39",
    "attn_out": "#4b9f79",
    "resid_pre": "#7a5195",
    "resid_mid": "#8c6d31",
}


def draw_by_layer(rows: pd.DataFrame, path: Path) -> None:
    """FVU with its interval and the PCA of as many components, L0, dead latents, CE recovered; one
    line a kind."""
    figure = _figure(9, 6.2)
    fvu, l0, dead, recovered = figure.subplots(2, 2, sharex=True).flat
    for kind, part in rows.sort_values("layer").groupby("kind", sort=True):
        colour, label = _COLOURS.get(str(kind), "#555555"), _TITLES.get(str(kind), str(kind))
        _banded(fvu, part, "fvu", colour, label)
        if part["pca_fvu"].notna().any():
            fvu.plot(part["layer"], part["pca_fvu"], color=colour, linestyle=":", linewidth=1.2)
        l0.plot(part["layer"], part["l0"], color=colour, marker="o", markersize=3)
        dead.plot(
            part["layer"], 100 * part["dead_fraction"], color=colour, marker="o", markersize=3
        )
        _points(recovered, part[part["ce_recovered_zero"].notna()], colour)
    fvu.set(title="FVU on held-out tokens (dotted: PCA with L0 components)", ylim=(0, None))
    l0.set(title="active latents per token (L0)", ylim=(0, None))
    dead.set(title="latents that never fired, %", ylim=(0, None), xlabel="layer")
    recovered.set(title="CE recovered against zero ablation", xlabel="layer")
    if not rows["ce_recovered_zero"].notna().any():
        recovered.text(
            0.5,
            0.5,
            "not measured, or the ablation does no harm",
            ha="center",
            transform=recovered.transAxes,
        )
    for axis in (fvu, l0, dead, recovered):
        axis.title.set_fontsize(9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    l0.set_ylim(0, 1.15 * rows["l0"].max())
    fvu.legend(frameon=False, fontsize=8, ncols=3, loc="lower center")
    figure.savefig(path, dpi=120, metadata={"Software": None})


def draw_frontier(rows: pd.DataFrame, pca: pd.DataFrame, path: Path) -> None:
    """L0 against FVU for every site that has several dictionaries, with the PCA's curve (components
    for L0)."""
    shared = rows[rows.duplicated("site", keep=False)]
    sites = list(dict.fromkeys(shared["site"]))
    figure = _figure(4.2 * min(len(sites), 3), 3.4 * -(-len(sites) // 3))
    for index, site in enumerate(sites):
        axis = figure.add_subplot(-(-len(sites) // 3), min(len(sites), 3), index + 1)
        part = shared[shared["site"] == site].sort_values("l0")
        curve = pca[(pca["site"] == site) & (pca["n_components"] >= 1)]
        curve = curve[curve["n_components"] <= 2 * part["l0"].max()]
        axis.plot(
            curve["n_components"],
            curve["fvu"],
            color="#999999",
            linestyle=":",
            label="PCA, k components",
        )
        low, high = part["fvu"] - part["fvu_low"], part["fvu_high"] - part["fvu"]
        axis.errorbar(
            part["l0"],
            part["fvu"],
            yerr=[low.clip(0), high.clip(0)],
            fmt="o-",
            color="#3b6fb6",
            markersize=4,
        )
        for row in part.itertuples():
            axis.annotate(
                str(row.source),
                (row.l0, row.fvu),
                fontsize=7,
                xytext=(4, 4),
                textcoords="offset points",
            )
        axis.set(xlabel="L0", ylabel="FVU", xscale="log", ylim=(0, None))
        axis.set_title(site, fontsize=9)
        axis.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _banded(axis: Axes, part: pd.DataFrame, column: str, colour: str, label: str) -> None:
    axis.plot(part["layer"], part[column], color=colour, marker="o", markersize=3, label=label)
    axis.fill_between(
        part["layer"],
        part[f"{column}_low"],
        part[f"{column}_high"],
        color=colour,
        alpha=0.2,
        linewidth=0,
    )


def _points(axis: Axes, part: pd.DataFrame, colour: str) -> None:
    if not len(part):
        return
    value = part["ce_recovered_zero"]
    low, high = value - part["ce_recovered_zero_low"], part["ce_recovered_zero_high"] - value
    axis.errorbar(
        part["layer"], value, yerr=[low.clip(0), high.clip(0)], fmt="o", color=colour, markersize=4
    )


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
