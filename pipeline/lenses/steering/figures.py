"""Figures of steering results; each function takes a table and gives a figure.

Effects have columns feature, arm, target, dose, measure, unsteered, steered, difference, low, high.
Arms keep their colour in every figure; bands and bars are 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from featureflow.figures import COLOURS, legend, panels

_SOFT = "#666666"
TITLES = {
    "top_tokens": "top tokens in 100",
    "active": "share of tokens where the feature is active",
    "activation": "activation / typical strong activation",
    "nll": "nats a token, unsteered model",
    "coherent": "share coherent",
}


def dose_response(
    effects: pd.DataFrame, *, measures: Sequence[str] = ("top_tokens", "active", "coherent")
) -> Figure:
    """Steered level against dose, one line an arm, averaged over features; dashed: unsteered."""
    figure, axes = panels(1, len(measures))
    for axis, measure in zip(axes, measures, strict=True):
        part = effects[effects["measure"] == measure]
        mean = part.groupby(["arm", "target"], sort=False)[
            ["dose", "unsteered", "difference", "low", "high"]
        ].mean()
        base = mean["unsteered"]
        lines = mean.assign(
            value=base + mean["difference"], low=base + mean["low"], high=base + mean["high"]
        )
        draw_lines(axis, lines.reset_index(), x="dose", colours=colours_of(effects))
        axis.axhline(part["unsteered"].mean(), color=_SOFT, linestyle="--", linewidth=1)
        axis.set(xscale="log", xlabel="dose (nats of KL on neutral text)", ylabel=TITLES[measure])
    legend(axes[0])
    figure.suptitle("Dose and response, mean over features; bands: mean of their 95 % intervals")
    return figure


def tradeoff(effects: pd.DataFrame, *, concept: str = "active") -> Figure:
    """Concept against fluency, a point an arm and dose."""
    wide = effects.pivot_table(
        index=["arm", "target"], columns="measure", values="steered", sort=False
    ).reset_index()
    return front(
        wide,
        x="coherent",
        y=concept,
        xlabel="share of samples that stay coherent",
        ylabel=TITLES[concept],
    )


def front(table: pd.DataFrame, *, x: str, y: str, xlabel: str, ylabel: str) -> Figure:
    """Two goods, a point a row (arm, target) and a line an arm; dotted: what no other point
    beats."""
    figure, (axis,) = panels()
    draw_lines(
        axis, table.sort_values("target").assign(value=table[y]), x=x, colours=colours_of(table)
    )
    best = table.iloc[pareto_front(table[x].to_numpy(), table[y].to_numpy())]
    axis.plot(best[x], best[y], color=_SOFT, linestyle=":", zorder=0)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_title("Concept against fluency; dotted: Pareto front")
    legend(axis, outside=True)
    return figure


def curves(
    parts: Sequence[tuple[pd.DataFrame, str]], *, x: str, xlabel: str, title: str, log: bool = True
) -> Figure:
    """Panels side by side, each (table with columns arm, `x`, value and perhaps low and high, name
    of the value)."""
    figure, axes = panels(1, len(parts))
    colours = colours_of(pd.concat([table[["arm"]] for table, _ in parts]))
    for axis, (table, name) in zip(axes, parts, strict=True):
        draw_lines(axis, table.sort_values(x), x=x, colours=colours)
        axis.set(xscale="log" if log else "linear", xlabel=xlabel, ylabel=name)
        legend(axis)
    figure.suptitle(title)
    return figure


def effects_at(effects: pd.DataFrame, *, measure: str, target: float) -> Figure:
    """The difference to unsteered text with its interval, a row an arm and feature, at one dose."""
    part = effects[(effects["measure"] == measure) & (effects["target"] == target)]
    return intervals(
        part.assign(name=part["feature"] + "  " + part["arm"], mean=part["difference"]),
        xlabel=f"change of {TITLES[measure]}, against unsteered samples",
        title=f"At {target:g} nats; bars: 95 % intervals over prompts",
    )


def intervals(table: pd.DataFrame, *, xlabel: str, title: str, zero: float | None = 0.0) -> Figure:
    """A forest: one row a `name`, a dot at `mean`, a bar from `low` to `high`; coloured by `arm`
    where there is one."""
    figure, (axis,) = panels(width=7, height=1.2 + 0.22 * max(len(table), 1))
    colours = colours_of(table) if "arm" in table else {}
    for row, entry in enumerate(table.to_dict(orient="records")):
        colour = colours.get(entry.get("arm", ""), COLOURS[0])
        axis.plot([entry["low"], entry["high"]], [row, row], color=colour, linewidth=1.5)
        axis.plot(entry["mean"], row, marker="o", markersize=4, color=colour)
    if zero is not None:
        axis.axvline(zero, color=_SOFT, linewidth=0.8)
    axis.set_yticks(range(len(table)), table["name"], fontsize=7)
    axis.invert_yaxis()
    axis.set(xlabel=xlabel, title=title)
    return figure


def pareto_front(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Indices of the points that no other beats in both, by growing x."""
    order = np.lexsort((y, x))[::-1]
    best, kept = -np.inf, []
    for place in order:
        if y[place] > best:
            kept.append(place)
            best = y[place]
    return np.array(kept[::-1], dtype=int)


def colours_of(table: pd.DataFrame) -> dict[str, str]:
    """A colour an arm, in the order in which they come."""
    arms = list(dict.fromkeys(table["arm"]))
    return {arm: COLOURS[place % len(COLOURS)] for place, arm in enumerate(arms)}


def draw_lines(
    axis: Axes, table: pd.DataFrame, *, x: str, colours: dict[str, str] | None = None
) -> None:
    """A line an `arm` through its `value`s, and a band where the table has low and high."""
    colours = colours or colours_of(table)
    for arm, part in table.groupby("arm", sort=False):
        colour = colours[str(arm)]
        axis.plot(part[x], part["value"], marker="o", markersize=3, color=colour, label=arm)
        if "low" in part:
            axis.fill_between(
                part[x], part["low"], part["high"], alpha=0.12, color=colour, linewidth=0
            )
