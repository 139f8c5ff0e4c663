"""Figures of one style, saved as PNG and SVG.

A function that draws returns a `Figure` (never through pyplot, so nothing is global); `save` writes
it. The same figure gives the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from featureflow.files import written_atomically

DPI = 130


def save(figure: Figure, path: Path) -> None:
    """Write `<path>.png` and `<path>.svg`; the ending `.png` or `.svg` of `path` is left out."""
    FigureCanvasAgg(figure)
    stem = path.stem if path.suffix in (".png", ".svg") else path.name
    with rc_context({"svg.hashsalt": "featureflow"}):
        for ending in ("png", "svg"):
            metadata = {"png": {"Software": None}, "svg": {"Date": None}}[ending]
            with written_atomically(path.with_name(f"{stem}.{ending}")) as beside:
                figure.savefig(beside, format=ending, dpi=DPI, metadata=metadata)
