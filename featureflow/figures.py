"""Figures of one style, saved as PNG and SVG.

    figure, (left, right) = panels(1, 2)
    left.plot(layer, fvu, color=COLOURS[0], label="residual stream")
    legend(left)
    save(figure, folder / "fvu_by_layer")

A function that draws returns its `Figure`; the caller saves it. Nothing goes through pyplot, so
nothing is global. The same figure gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cycler import cycler
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from featureflow.files import written_atomically
from featureflow.sites import SiteKind

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#222222", "#999999")
"""Okabe and Ito's colours, which colour-blind readers tell apart."""
KINDS: dict[SiteKind, tuple[str, str]] = {
    "resid_post": ("residual stream", COLOURS[0]),
    "mlp_out": ("MLP output", COLOURS[1]),
    "attn_out": ("attention output", COLOURS[2]),
    "resid_pre": ("before the block", COLOURS[3]),
    "resid_mid": ("between attention and MLP", COLOURS[4]),
    "mlp_in": ("MLP input", COLOURS[5]),
    "mlp_normalized": ("MLP input, normalised", COLOURS[7]),
    "z": ("attention heads", COLOURS[6]),
}
"""What a kind of site is called in a figure, and its colour."""
DPI = 130
_METADATA = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
"""What would make two files of the same figure differ."""
_STYLE: Any = {
    "axes.labelsize": 9,
    "axes.prop_cycle": cycler(color=COLOURS),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "lines.linewidth": 1.2,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}


def panels(
    n_rows: int = 1,
    n_columns: int = 1,
    *,
    width: float = 4.2,
    height: float = 3.4,
    share_x: bool = False,
    share_y: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure and its axes, row by row. `width` and `height` are of one panel, in inches."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(width * n_columns, height * n_rows), layout="constrained")
        grid = figure.subplots(n_rows, n_columns, squeeze=False, sharex=share_x, sharey=share_y)
    return figure, list(grid.flat)


def legend(axis: Axes, *, outside: bool = False) -> None:
    """The legend of the lines that have a label; right of the panel when `outside`."""
    if axis.get_legend_handles_labels()[0]:
        place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
        axis.legend(frameon=False, fontsize=7, **(place if outside else {}))


def save(figure: Figure, path: Path) -> None:
    """Write `<path>.png` and `<path>.svg`, or the one file whose ending (.png, .svg, .pdf) `path`
    has. Raises UserError when it cannot be written."""
    FigureCanvasAgg(figure)
    with rc_context({"svg.hashsalt": "featureflow"}):
        if path.suffix in _METADATA:
            places = [path]
        else:
            places = [path.with_name(path.name + ending) for ending in (".png", ".svg")]
        for place in places:
            with written_atomically(place) as beside:
                figure.savefig(
                    beside,
                    format=place.suffix.removeprefix("."),
                    dpi=DPI,
                    metadata=_METADATA[place.suffix],
                )
