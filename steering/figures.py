"""Figures of steering results. The only module here that plots; each function takes a table and a path.

Effects have columns feature, arm, dose, measure, unsteered, steered, difference, low, high. Arms keep their colour in
every figure (a colour-blind safe set); bands and bars are 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
TITLES = {
    "own_tokens": "own tokens in 100",
    "active": "share of tokens where the feature fires",
    "activation": "activation / typical strong activation",
    "nll": "nats a token, unsteered model",
    "coherent": "share coherent",
}


def draw_dose_response(
    effects: pd.DataFrame, path: Path, *, measures: Sequence[str] = ("own_tokens", "active", "coherent")
) -> None:
    """Steered level against dose, one line an arm, averaged over features; dashed: unsteered."""
    figure, axes = _panels(len(measures))
    for panel, measure in zip(axes, measures, strict=True):
        part = effects[effects["measure"] == measure]
        for arm, colour in _colours(effects).items():
            own = part[part["arm"] == arm]
            line = own.groupby("target")[["dose", "unsteered", "difference", "low", "high"]].mean()
            if len(line):
                level = line["unsteered"] + line["difference"]
                panel.plot(line["dose"], level, marker="o", markersize=3, color=colour, label=arm)
                low, high = line["unsteered"] + line["low"], line["unsteered"] + line["high"]
                panel.fill_between(line["dose"], low, high, alpha=0.12, color=colour, linewidth=0)
        panel.axhline(part["unsteered"].mean(), color="#666666", linestyle="--", linewidth=1)
        panel.set(xscale="log", xlabel="dose (nats of KL on neutral text)", ylabel=TITLES[measure])
    _finish(figure, axes[0], path, "Dose and response, mean over features; bands: mean of their 95 % intervals")


def draw_tradeoff(effects: pd.DataFrame, path: Path, *, concept: str = "active") -> None:
    """Concept against fluency, a point an arm and dose, with the Pareto front over all."""
    figure, (panel,) = _panels(1)
    wide = effects.pivot_table(index=["arm", "target"], columns="measure", values="steered").reset_index()
    for arm, colour in _colours(effects).items():
        part = wide[wide["arm"] == arm].sort_values("target")
        panel.plot(part["coherent"], part[concept], marker="o", markersize=4, color=colour, label=arm, linewidth=0.8)
    front = pareto_front(wide["coherent"].to_numpy(), wide[concept].to_numpy())
    panel.plot(
        wide["coherent"].to_numpy()[front], wide[concept].to_numpy()[front], color="#666666", linestyle=":", zorder=0
    )
    panel.set(xlabel="share of samples that stay coherent", ylabel=TITLES[concept])
    _finish(figure, panel, path, "Concept against fluency; dotted: Pareto front")


def draw_forest(effects: pd.DataFrame, path: Path, *, measure: str, target: float) -> None:
    """The difference to unsteered text with its interval, a row an arm and feature, at one dose."""
    part = effects[(effects["measure"] == measure) & (effects["target"] == target)].reset_index(drop=True)
    figure = Figure(figsize=(7, 1.2 + 0.22 * max(len(part), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.add_subplot()
    colours = _colours(effects)
    for row, effect in part.iterrows():
        panel.plot([effect["low"], effect["high"]], [row, row], color=colours[effect["arm"]], linewidth=1.5)
        panel.plot(effect["difference"], row, marker="o", markersize=4, color=colours[effect["arm"]])
    panel.axvline(0, color="#666666", linewidth=0.8)
    panel.set_yticks(range(len(part)), [f"{e.feature}  {e.arm}" for e in part.itertuples()], fontsize=7)
    panel.invert_yaxis()
    panel.set(xlabel=f"change of {TITLES[measure]}, against unsteered twins")
    panel.set_title(f"At {target:g} nats; bars: 95 % intervals over prompts", fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def draw_heat(table: pd.DataFrame, path: Path, *, value: str, title: str) -> None:
    """Layer × dose: a table with columns layer, target and `value`."""
    grid = table.pivot_table(index="layer", columns="target", values=value)
    figure = Figure(figsize=(1.6 + 0.7 * grid.shape[1], 1.6 + 0.25 * grid.shape[0]), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.add_subplot()
    image = panel.imshow(grid.to_numpy(), aspect="auto", cmap="cividis", origin="lower")
    panel.set_xticks(range(grid.shape[1]), [f"{dose:g}" for dose in grid.columns])
    panel.set_yticks(range(grid.shape[0]), [f"L{layer}" for layer in grid.index])
    panel.set(xlabel="dose (nats)")
    panel.set_title(title, fontsize=10)
    figure.colorbar(image)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def pareto_front(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Indices of the points that no other beats in both, by growing x."""
    order = np.lexsort((y, x))[::-1]
    best, kept = -np.inf, []
    for place in order:
        if y[place] > best:
            kept.append(place)
            best = y[place]
    return np.array(kept[::-1], dtype=int)


def _colours(effects: pd.DataFrame) -> dict[str, str]:
    arms = list(dict.fromkeys(effects["arm"]))
    return {arm: _COLOURS[place % len(_COLOURS)] for place, arm in enumerate(arms)}


def _panels(n: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(4.2 * n + 0.6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(1, n, k + 1) for k in range(n)]


def _finish(figure: Figure, panel: Any, path: Path, title: str) -> None:
    panel.legend(frameon=False, fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120, metadata={"Software": None})
