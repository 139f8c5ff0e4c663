"""Which SAEs of a site does no other one beat on both L0 and FVU?

An SAE is on the frontier when no other of its site has an L0 that is no larger and an FVU that is
no larger, one of them smaller. A transcoder is compared with transcoders of the same input only: it
solves another task. Reads what the lens `reconstruction` measured; costs nothing.
"""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from featureflow.figures import COLOURS, legend, panels
from pipeline.findings import Finding
from pipeline.lenses.base import LensConfig
from pipeline.run import Run

TITLE = "the frontier of sparsity and error, where several SAEs share a site"
GROUP = "evaluation"
NEEDS = ("reconstruction",)
_COLUMNS = ["site", "reads", "source", "architecture", "n_latents", "l0"]
_COLUMNS += ["fvu", "fvu_low", "fvu_high", "on_frontier"]


class Config(LensConfig):
    """Nothing to choose."""


def look(run: Run, config: Config) -> Finding:
    """The frontier of every site with several SAEs, beside the PCA's curve."""
    measured = run.lens("reconstruction").tables
    frontier, pca = frontier_of(measured["metrics"]), measured["pca"]
    best = frontier[frontier["on_frontier"].astype(bool)]
    if not len(frontier):
        text = "Every site has one SAE: there is nothing to compare."
    else:
        text = f"Of {len(frontier)} SAEs at {frontier['site'].nunique()} sites, {len(best)} are "
        text += "beaten by no other SAE of their site on both L0 and FVU."
    return Finding(
        tables={"frontier": frontier},
        figure=(lambda: _draw(frontier, pca)) if len(frontier) else None,
        text=text,
        headline={"n_compared": len(frontier), "n_on_frontier": len(best)},
    )


def frontier_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of sites with several SAEs, by site and L0, each with `on_frontier`."""
    task = rows["site"] + "<" + rows["reads"].fillna("")
    shared = rows[task.duplicated(keep=False)]
    parts = [_marked(part) for _, part in shared.groupby(task[shared.index], sort=False)]
    return (
        pd.concat(parts, ignore_index=True)[_COLUMNS] if parts else pd.DataFrame(columns=_COLUMNS)
    )


def _marked(part: pd.DataFrame) -> pd.DataFrame:
    mine, others = part[["l0", "fvu"]].to_numpy()[:, None], part[["l0", "fvu"]].to_numpy()[None]
    beaten = (others <= mine).all(2) & (others < mine).any(2)
    return part.assign(on_frontier=~beaten.any(1)).sort_values("l0", kind="stable")


def _draw(rows: pd.DataFrame, pca: pd.DataFrame) -> Figure:
    """L0 against FVU for every site, with the PCA's curve (components for L0)."""
    sites = list(dict.fromkeys(rows["site"]))
    figure, axes = panels(-(-len(sites) // 3), min(len(sites), 3))
    for axis in axes[len(sites) :]:
        axis.remove()
    for axis, site in zip(axes, sites, strict=False):
        part = rows[rows["site"] == site].sort_values("l0")
        curve = pca[(pca["site"] == site) & pca["n_components"].between(1, 2 * part["l0"].max())]
        axis.plot(curve["n_components"], curve["fvu"], ":", color=COLOURS[7], label="PCA")
        whiskers = [
            (part["fvu"] - part["fvu_low"].astype(float)).clip(0),
            (part["fvu_high"].astype(float) - part["fvu"]).clip(0),
        ]
        axis.errorbar(
            part["l0"], part["fvu"], yerr=whiskers, fmt="o-", color=COLOURS[0], markersize=4
        )
        for row in part.itertuples():
            at, offset = (row.l0, row.fvu), "offset points"
            axis.annotate(str(row.source), at, (4, 4), textcoords=offset, fontsize=7)
        axis.set(xlabel="L0", ylabel="FVU", xscale="log", ylim=(0, None))
        axis.set_title(site)
        legend(axis)
    return figure
