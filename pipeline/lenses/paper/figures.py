"""Figures of the experiments, one function each; every function writes one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.flow.activity import GROUPS

_COLOURS = ("#b8b8b8", "#3b6fb6", "#e07b39", "#4c9f70", "#7a5195", "#2a9d8f", "#c0392b", "#222222")
_DPI = 130


def draw_group_shares(table: pd.DataFrame, path: Path) -> None:
    """One line a group over the layers that have the most groups: where a module has no dictionary,
    its firings are counted elsewhere, and shares cannot be compared."""
    n_possible = table.groupby("layer")["possible"].transform("sum")
    table = table[n_possible == n_possible.max()]
    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axis = figure.subplots()
    for colour, group in zip(_COLOURS, GROUPS, strict=True):
        rows = table[(table["group"] == group) & table["possible"]].sort_values("layer")
        axis.plot(rows["layer"], rows["share"], ".-", color=colour, label=group)
    axis.set_xlabel("layer")
    axis.set_ylabel("share of firings")
    axis.set_ylim(0, None)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=_DPI)


def draw_cooccurrence(matrices: Mapping[str, pd.DataFrame], path: Path) -> None:
    """Matrices side by side, with their numbers."""
    figure = Figure(figsize=(5.2 * len(matrices), 4.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(matrices)))
    for axis, (name, matrix) in zip(axes, matrices.items(), strict=True):
        _heat(axis, matrix)
        axis.set_title(name, loc="left", fontsize=10)
    figure.savefig(path, dpi=_DPI)


def draw_separation(summed: pd.DataFrame, path: Path) -> None:
    """One matrix a score: the share of tests with p < 0.001 between two groups."""
    scores = list(dict.fromkeys(summed["score"])) or ["residual"]
    figure = Figure(figsize=(5.0 * len(scores), 4.6), layout="constrained")
    for axis, score in zip(np.atleast_1d(figure.subplots(1, len(scores))), scores, strict=True):
        matrix = pd.DataFrame(np.nan, index=list(GROUPS), columns=list(GROUPS))
        for row in summed[summed["score"] == score].itertuples():
            matrix.loc[row.group_a, row.group_b] = matrix.loc[row.group_b, row.group_a] = row.share
        _heat(axis, matrix)
        axis.set_title(f"score of the {score} link", loc="left", fontsize=10)
    figure.savefig(path, dpi=_DPI)


def draw_bars(
    summary: pd.DataFrame, path: Path, *, by: Sequence[str], columns: Mapping[str, str]
) -> None:
    """Horizontal bars with their intervals, one panel a column of the summary; `by` names the
    bars."""
    names = summary[list(by)].astype(str).agg(" · ".join, axis=1)
    figure = Figure(
        figsize=(4.2 * len(columns) + 1.5, 0.28 * len(summary) + 1.2), layout="constrained"
    )
    axes = np.atleast_1d(figure.subplots(1, len(columns), sharey=True))
    place = np.arange(len(summary))
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        value = summary[column].to_numpy(dtype=float)
        error = None
        if f"{column}_low" in summary:
            bounds = summary[[f"{column}_low", f"{column}_high"]].to_numpy(dtype=float)
            error = np.abs(bounds.T - value)
        axis.barh(place, value, xerr=error, color="#3b6fb6", ecolor="#555555", height=0.7)
        axis.set_xlabel(title, fontsize=9)
    axes[0].set_yticks(place, names, fontsize=7)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=_DPI)


def draw_lines(
    table: pd.DataFrame,
    path: Path,
    *,
    x: str,
    line: str,
    columns: Mapping[str, str],
    x_label: str | None = None,
) -> None:
    """One panel a column of the table, one line a value of `line`."""
    figure = Figure(figsize=(4.2 * len(columns) + 1.8, 3.4), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(columns)))
    for axis, (column, title) in zip(axes, columns.items(), strict=True):
        for name, rows in table.groupby(line, sort=False):
            ordered = rows.sort_values(x)
            axis.plot(ordered[x], ordered[column], ".-", label=str(name))
        axis.set_xlabel(x_label or x)
        axis.set_ylabel(title, fontsize=9)
    axes[-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.savefig(path, dpi=_DPI)


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
