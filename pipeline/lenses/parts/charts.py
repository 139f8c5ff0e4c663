"""The charts that most lenses need. Every function returns a figure and writes nothing."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from featureflow.figures import COLOURS, legend, panels


def bars(summary: pd.DataFrame, *, by: Sequence[str], columns: Mapping[str, str]) -> Figure:
    """Horizontal bars, one panel a column of the summary; `by` names the bars. `<column>_low` and
    `<column>_high` become whiskers."""
    names = summary[list(by)].astype(str).agg(" · ".join, axis=1)
    figure, axes = panels(
        1,
        len(columns),
        width=4.2 + 1.5 / len(columns),
        height=0.28 * len(summary) + 1.2,
        share_y=True,
    )
    place = np.arange(len(summary))
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        value = summary[column].to_numpy(dtype=float)
        error = None
        if f"{column}_low" in summary:
            bounds = summary[[f"{column}_low", f"{column}_high"]].to_numpy(dtype=float)
            error = np.abs(bounds.T - value)
        axis.barh(place, value, xerr=error, color=COLOURS[0], ecolor="#555555", height=0.7)
        axis.set_xlabel(title)
    axes[0].set_yticks(place, names, fontsize=7)
    axes[0].invert_yaxis()
    return figure


def lines(
    table: pd.DataFrame,
    *,
    x: str,
    line: str,
    columns: Mapping[str, str],
    x_label: str | None = None,
    dotted: Collection[str] = (),
) -> Figure:
    """One panel a column of the table, one line a value of `line`. `<column>_low` and
    `<column>_high` become a band; the lines named in `dotted` have no band."""
    figure, axes = panels(1, len(columns), width=4.2 + 1.8 / len(columns))
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        for place, (name, rows) in enumerate(table.groupby(line, sort=False)):
            ordered = rows.sort_values(x).dropna(subset=[column])
            colour, style = COLOURS[place % len(COLOURS)], ":" if name in dotted else ".-"
            axis.plot(ordered[x], ordered[column], style, color=colour, label=str(name))
            if f"{column}_low" in ordered and name not in dotted:
                low, high = (  # None where one document gives no interval
                    ordered[f"{column}_{end}"].astype(float) for end in ("low", "high")
                )
                axis.fill_between(ordered[x], low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set_xlabel(x_label or x)
        axis.set_ylabel(title)
        if x == "layer":
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(axes[-1], outside=True)
    return figure


def heat_maps(matrices: Mapping[str, pd.DataFrame]) -> Figure:
    """Matrices of shares (0 to 1) side by side, with their numbers."""
    figure, axes = panels(1, len(matrices), width=5.2, height=4.6)
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        _heat(axis, matrix)
        axis.set_title(name, loc="left", fontsize=10)
    return figure


def _heat(axis: Axes, matrix: pd.DataFrame) -> None:
    values = matrix.to_numpy(dtype=float)
    axis.imshow(values, vmin=0, vmax=1, cmap="Blues")
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        number = values[row, column]
        colour = "white" if number > 0.6 else "black"
        axis.text(column, row, f"{number:.2f}", ha="center", va="center", fontsize=6, color=colour)
    place = np.arange(len(matrix))
    axis.set_xticks(place, list(matrix.columns), rotation=60, ha="right", fontsize=7)
    axis.set_yticks(place, list(matrix.index), fontsize=7)
