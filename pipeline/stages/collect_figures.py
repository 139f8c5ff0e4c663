"""What was collected, at a glance: a table of sites, and their norms by layer."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from data.store import ActivationStore


def site_table(store: ActivationStore) -> pd.DataFrame:
    """One row a site: rows counted, norm quantiles, variance, numbers that are not finite."""
    rows = []
    for site in store.sites:
        statistics = store.statistics(site)
        quantiles = {
            f"norm_q{round(100 * q):02d}": value for q, value in statistics.norm_quantiles.items()
        }
        rows.append(
            {
                "site": site.short,
                "layer": site.layer,
                "kind": site.kind,
                "n": statistics.n,
                "mean_norm_of_mean": float((statistics.mean.astype("float64") ** 2).sum() ** 0.5),
                "total_variance": statistics.total_variance,
                "n_non_finite": statistics.n_non_finite,
                **quantiles,
            }
        )
    return pd.DataFrame(rows)


def draw_norms(table: pd.DataFrame, path: Path) -> None:
    """Median norm by layer for each kind of site, with the band from the 5th to the 95th
    percentile."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, part in table.sort_values("layer").groupby("kind", sort=True):
        (line,) = axes.plot(
            part["layer"], part["norm_q50"], marker="o", markersize=3, label=str(kind)
        )
        axes.fill_between(
            part["layer"], part["norm_q05"], part["norm_q95"], alpha=0.15, color=line.get_color()
        )
    axes.set(xlabel="layer", ylabel="norm of the activation (ordinary tokens)", yscale="log")
    axes.set_title("Median norm by layer; band: 5th to 95th percentile", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
