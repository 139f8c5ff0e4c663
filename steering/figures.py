"""Figures of steering results. The only module here that plots; each function takes a table and a
path.

Effects have columns feature, arm, dose, measure, unsteered, steered, difference, low, high. Arms
keep their colour in every figure (a colour-blind safe set); bands and bars are 95 % intervals.
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
    effects: pd.DataFrame,
    path: Path,
    *,
    measures: Sequence[str] = ("own_tokens", "active", "coherent"),
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
    _finish(
        figure,
        axes[0],
        path,
        "Dose and response, mean over features; bands: mean of their 95 % intervals",
    )


def draw_tradeoff(effects: pd.DataFrame, path: Path, *, concept: str = "active") -> None:
    """Concept against fluency, a point an arm and dose, with the Pareto front over all."""
    wide = effects.pivot_table(
        index=["arm", "target"], columns="measure", values="steered", sort=False
    ).reset_index()
    draw_front(
        wide,
        path,
        x="coherent",
        y=concept,
        xlabel="share of samples that stay coherent",
        ylabel=TITLES[concept],
    )


def draw_front(
    table: pd.DataFrame, path: Path, *, x: str, y: str, xlabel: str, ylabel: str
) -> None:
    """Two goods, a point a row (arm, target) and a line an arm; dotted: what no other point
    beats."""
    figure, (panel,) = _panels(1)
    for arm, colour in _colours(table).items():
        part = table[table["arm"] == arm].sort_values("target")
        panel.plot(
            part[x], part[y], marker="o", markersize=4, color=colour, label=arm, linewidth=0.8
        )
    front = table.iloc[pareto_front(table[x].to_numpy(), table[y].to_numpy())]
    panel.plot(front[x], front[y], color="#666666", linestyle=":", zorder=0)
    panel.set(xlabel=xlabel, ylabel=ylabel)
    _finish(figure, panel, path, "Concept against fluency; dotted: Pareto front")


def draw_curves(
    panels: Sequence[tuple[pd.DataFrame, str]],
    path: Path,
    *,
    x: str,
    xlabel: str,
    title: str,
    log: bool = True,
) -> None:
    """Panels side by side, each (table with columns arm, `x`, value and perhaps low and high, name
    of the value)."""
    figure, axes = _panels(len(panels))
    colours = _colours(pd.concat([table[["arm"]] for table, _ in panels]))
    for panel, (table, name) in zip(axes, panels, strict=True):
        for arm, part in table.sort_values(x).groupby("arm", sort=False):
            panel.plot(
                part[x],
                part["value"],
                marker="o",
                markersize=3,
                color=colours[arm],
                label=arm,
                linewidth=1,
            )
            if "low" in part:
                panel.fill_between(
                    part[x], part["low"], part["high"], alpha=0.12, color=colours[arm], linewidth=0
                )
        panel.set(xscale="log" if log else "linear", xlabel=xlabel, ylabel=name)
        panel.legend(frameon=False, fontsize=6)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=64, metadata={"Software": None})


def draw_intervals(
    table: pd.DataFrame, path: Path, *, xlabel: str, title: str, zero: float | None = 0.0
) -> None:
    """A forest: one row a `name`, a dot at `mean`, a bar from `low` to `high`; coloured by `arm`
    where there is one."""
    figure = Figure(figsize=(7, 1.2 + 0.22 * max(len(table), 1)), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.add_subplot()
    colours = _colours(table) if "arm" in table else {}
    for row, entry in enumerate(table.to_dict(orient="records")):
        colour = colours.get(entry.get("arm", ""), _COLOURS[0])
        panel.plot([entry["low"], entry["high"]], [row, row], color=colour, linewidth=1.5)
        panel.plot(entry["mean"], row, marker="o", markersize=4, color=colour)
    if zero is not None:
        panel.axvline(zero, color="#666666", linewidth=0.8)
    panel.set_yticks(range(len(table)), table["name"], fontsize=7)
    panel.invert_yaxis()
    panel.set(xlabel=xlabel)
    panel.set_title(title, fontsize=10)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def draw_asymmetry(table: pd.DataFrame, path: Path, *, title: str) -> None:
    """Activation against suppression, a point a row (`name`, `activation`, `suppression`): on the
    diagonal both are as easy."""
    figure, (panel,) = _panels(1)
    panel.scatter(table["activation"], table["suppression"], s=16, color=_COLOURS[0])
    for entry in table.itertuples():
        panel.annotate(
            entry.name,
            (entry.activation, entry.suppression),
            fontsize=6,
            xytext=(3, 3),
            textcoords="offset points",
        )
    low, high = min(0.0, float(table[["activation", "suppression"]].min().min())), 1.0
    panel.plot([low, high], [low, high], color="#666666", linestyle=":", linewidth=0.8)
    panel.set(
        xlabel="activation: share of the possible rise reached",
        ylabel="suppression: share of the successes removed",
    )
    panel.set_title(title, fontsize=10)
    figure.savefig(path, dpi=100, metadata={"Software": None})


def draw_forest(effects: pd.DataFrame, path: Path, *, measure: str, target: float) -> None:
    """The difference to unsteered text with its interval, a row an arm and feature, at one dose."""
    part = effects[(effects["measure"] == measure) & (effects["target"] == target)]
    table = part.assign(name=part["feature"] + "  " + part["arm"], mean=part["difference"])
    xlabel = f"change of {TITLES[measure]}, against unsteered twins"
    draw_intervals(
        table, path, xlabel=xlabel, title=f"At {target:g} nats; bars: 95 % intervals over prompts"
    )


def draw_heat(
    table: pd.DataFrame, path: Path, *, value: str, title: str, xlabel: str = "dose (nats)"
) -> None:
    """Layer × dose (or strength): a table with columns layer, target and `value`."""
    grid = table.pivot_table(index="layer", columns="target", values=value)
    figure = Figure(
        figsize=(1.6 + 0.7 * grid.shape[1], 1.6 + 0.25 * grid.shape[0]), layout="constrained"
    )
    FigureCanvasAgg(figure)
    panel = figure.add_subplot()
    image = panel.imshow(grid.to_numpy(), aspect="auto", cmap="cividis", origin="lower")
    panel.set_xticks(range(grid.shape[1]), [f"{dose:g}" for dose in grid.columns])
    panel.set_yticks(range(grid.shape[0]), [f"L{layer:g}" for layer in grid.index])
    panel.set(xlabel=xlabel)
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
