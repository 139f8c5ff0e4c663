"""What was collected, at a glance: a table of sites, and their norms by layer."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from data.store import ActivationStore
from featureflow.figures import KINDS, legend, panels


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


def draw_norms(table: pd.DataFrame) -> Figure:
    """Median norm by layer for each kind of site, with the band from the 5th to the 95th
    percentile."""
    figure, (axis,) = panels(width=7, height=4)
    for kind, part in table.sort_values("layer").groupby("kind", sort=False):
        title, colour = KINDS[kind]
        layers, low, high = part["layer"], part["norm_q05"], part["norm_q95"]
        axis.plot(layers, part["norm_q50"], "o-", markersize=3, color=colour, label=title)
        axis.fill_between(layers, low, high, alpha=0.15, color=colour, linewidth=0)
    axis.set(xlabel="layer", ylabel="norm of the activation (ordinary tokens)", yscale="log")
    axis.set_title("Median norm by layer; band: 5th to 95th percentile")
    legend(axis)
    return figure
