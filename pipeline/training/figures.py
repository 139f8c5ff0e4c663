"""What training looked like: curves of every site, and FVU, L0 and dead latents by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

from featureflow.figures import KINDS, legend, panels
from featureflow.sites import Site

Curves = Mapping[Site, Sequence[Mapping[str, float]]]
_LINES = {"mlp_out": "--", "attn_out": ":"}


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
