"""What training looked like: curves of every site, and FVU, L0 and dead latents by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from featureflow.sites import Site

Curves = Mapping[Site, Sequence[Mapping[str, float]]]


def draw_curves(curves: Curves, path: Path) -> None:
    """Training FVU and loss against steps, one line a site, coloured by layer."""
    figure, axes = _figure(1, 2, width=9)
    from matplotlib import colormaps

    deepest = max((site.layer for site in curves), default=1) or 1
    styles = {"mlp_out": "--", "attn_out": ":"}
    for site, records in curves.items():
        steps = [record["step"] for record in records]
        for axis, name in zip(axes, ("fvu", "loss"), strict=True):
            colour = colormaps["viridis"](site.layer / deepest)
            axis.plot(
                steps,
                [r[name] for r in records],
                styles.get(site.kind, "-"),
                color=colour,
                linewidth=0.8,
            )
    for axis, name in zip(axes, ("FVU of the batches", "loss"), strict=True):
        axis.set(xlabel="step", ylabel=name, yscale="log")
    figure.suptitle(
        "Training curves; dark: early layers, light: late; solid: residual, dashed: MLP, dotted: "
        "attention"
    )
    figure.savefig(path, dpi=120, metadata={"Software": None})


def draw_layers(described: Mapping[Site, Mapping[str, Any]], path: Path) -> None:
    """Held-out FVU, held-out L0 and the share of dead latents by layer, one line a kind of site."""
    figure, axes = _figure(1, 3, width=11)
    names = {
        "held_out_fvu": "FVU, held out",
        "held_out_l0": "L0, held out",
        "dead": "share of dead latents",
    }
    for kind in sorted({site.kind for site in described}):
        sites = sorted(site for site in described if site.kind == kind)
        for axis, name in zip(axes, names, strict=True):
            points = [
                (s.layer, described[s][name]) for s in sites if described[s][name] is not None
            ]
            axis.plot(
                [p[0] for p in points], [p[1] for p in points], marker="o", markersize=3, label=kind
            )
    for axis, label in zip(axes, names.values(), strict=True):
        axis.set(xlabel="layer", ylabel=label)
        axis.set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _figure(rows: int, columns: int, *, width: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns)
