"""Remove an ancestor some layers up: how much of the target's loss is the model's doing, and how
much flows through the chain between?

For target layers spread over the depth, and ancestors 2, 3, 4 and 6 residual sites up, the chain of
each target is the composition of best predecessors, as in the paper. The measurement is path
patching (pipeline/flow/mediation.py), each run with an arm without the model: a direction that is
removed stays removed in the skip connection whatever the model does. `blocks` puts the skip
connection's part back and asks what only the blocks can have done, beside the same for the
strongest other active latent: what the flow graph knows of the model is the difference. Chains
whose links the calibrated graph keeps are summarised beside all. Not in either paper: Feature Flow
§5.2 removes direct predecessors only.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from featureflow.errors import UserError
from featureflow.sites import Site
from featureflow.statistics import ranged
from pipeline.findings import Finding
from pipeline.flow.causal import record_clean
from pipeline.flow.mediation import Chains, measure_mediation, summarise_mediation
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.layers import (
    Layer,
    Trials,
    contexts_of,
    layers_of,
    per_context,
    spread,
    with_features,
)
from pipeline.run import Run

TITLE = "remove ancestors, hold the chain between (indirect effects; in neither paper)"
GROUP = "paper"
NEEDS = ("collect", "train", "link")
STEPS = (2, 3, 4, 6)
"""Links between the ancestor and its target."""
ALL, KEPT = "all", "kept links only"


class Config(Trials):
    """How much is tested."""


def look(run: Run, config: Config) -> Finding:
    """Remove ancestors, hold the chain, and see how much of the effect is left."""
    layers = {layer.target: layer for layer in layers_of(run) if "residual" in layer.links}
    if not (possible := [site for site in layers if _sites_before(layers, site, STEPS[0])]):
        raise UserError(
            "no chain is long enough",
            expected=f"{STEPS[0] + 1} neighbouring resid_post dictionaries",
            fix="set collect.sites to resid_post",
        )
    contexts, tables = contexts_of(run, config.n_contexts), []
    for target in spread(possible, config.n_pairs):
        ways = [sites for steps in STEPS if (sites := _sites_before(layers, target, steps))]
        recorded = record_clean(run.model, contexts, ways[-1], progress=run.context.progress)
        saes = {site: run.saes[site] for site in ways[-1]}
        for sites in ways:
            found = _composed(layers, sites)
            table = measure_mediation(
                run.model,
                saes,
                found,
                contexts=contexts,
                recorded=recorded,
                n_targets=config.n_targets,
                n_targets_per_context=per_context(config.n_targets, contexts),
                seed=config.seed + target.layer,
                progress=run.context.progress,
            )
            kept = _kept_chains(run.graph.edges, found)
            tables.append(table.assign(kept=kept[table["target_latent"].to_numpy()]))
    return _finding(pd.concat(tables, ignore_index=True), config)


def _finding(trials: pd.DataFrame, config: Config) -> Finding:
    if not len(trials):
        raise UserError("no target is active together with its ancestor", fix="raise --contexts")
    parts = {ALL: trials, KEPT: trials[trials["kept"]]}
    summary = pd.concat(
        [
            summarise_mediation(part, seed=config.seed).assign(chains=name)
            for name, part in parts.items()
            if len(part)
        ],
        ignore_index=True,
    )
    by_layer = summarise_mediation(trials, by=("target_site", "steps"), seed=config.seed)
    everything = summary[summary["chains"] == ALL]
    return Finding(
        tables={
            "summary": summary,
            "by_layer": by_layer,
            "trials": with_features(trials.rename(columns={"ancestor": "ancestor_latent"})),
        },
        figure=lambda: bars(
            everything,
            by=("steps",),
            columns={
                "change": "change when the ancestor is removed",
                "change_by_model": "of it, by the model",
                "blocks": "change by the blocks alone",
                "blocks_by_link": "… beyond the strongest other",
                "through_chain_by_model": "through the chain, by the model",
            },
        ),
        text=_text(everything, trials["target_site"].nunique()),
        headline={
            f"{name}, {row.steps} steps": round(float(getattr(row, name)), 4)
            for row in everything.itertuples()
            for name in ("change", "change_by_model", "blocks_by_link")
        },
    )


def _text(summary: pd.DataFrame, n_layers: int) -> str:
    lines = [
        f"  {row['steps']} links up (n {row['n']}, {row['active_share']:.0%} of all active targets "
        f"with a chain): change {ranged(row, 'change')}, without the model "
        f"{row['change_no_model']:.2f}, by the model {ranged(row, 'change_by_model')};\n"
        f"    by the blocks alone {ranged(row, 'blocks')}, beyond the strongest other "
        f"{ranged(row, 'blocks_by_link')};\n"
        f"    the chain removed too {row['copies_removed']:.2f}, by the model "
        f"{ranged(row, 'copies_removed_by_model')};\n"
        f"    through the chain {row['through_chain']:.2f}, without the model "
        f"{row['through_chain_no_model']:.2f}; through the strongest others "
        f"{row['through_strongest']:.2f}"
        for row in summary.to_dict(orient="records")
    ]
    return (
        "What the paper saw: it removes direct predecessors only; effects over several layers were "
        "not measured.\n\n"
        f"What this model shows, {n_layers} target layers, targets whose ancestor is active, 95 % "
        "intervals by document:\n"
        + "\n".join(lines)
        + "\n\nOnly what differs from the arm without "
        "the model, and from other latents, says something of the model."
    )


def _sites_before(
    layers: Mapping[Site, Layer], target: Site, steps: int
) -> tuple[Site, ...] | None:
    """The residual sites from `steps` links before the target up to it; None when the chain of
    sites is shorter or starts where the model cannot go on from."""
    sites = [target]
    while len(sites) <= steps:
        if sites[-1] not in layers:
            return None
        sites.append(layers[sites[-1]].links["residual"].source)
    return tuple(reversed(sites)) if sites[-1].kind == "resid_post" else None


def _composed(layers: Mapping[Site, Layer], sites: tuple[Site, ...]) -> Chains:
    """Best predecessors composed, from the last site back to the first."""
    latents = [np.arange(len(layers[sites[-1]].links["residual"].best))]
    for site in reversed(sites[1:]):
        here = latents[-1]
        latents.append(
            np.where(here < 0, -1, layers[site].links["residual"].best[np.maximum(here, 0)])
        )
    return Chains(sites=sites, latent=np.stack(latents[::-1]))


def _kept_chains(edges: pd.DataFrame, found: Chains) -> np.ndarray:
    """Whether the graph keeps every link of each target's chain."""
    kept = np.ones(found.latent.shape[1], dtype=bool)
    edges = edges[(edges["rank"] == 0) & (edges["relation"] == "residual")]
    for i, site in enumerate(found.sites[1:], start=1):
        links = edges[(edges["target_site"] == site.short) & edges["kept"]]
        good = np.zeros(
            max(found.latent[i].max(), links["target_latent"].max() if len(links) else 0) + 1,
            dtype=bool,
        )
        good[links["target_latent"]] = True
        kept &= (found.latent[i] >= 0) & good[np.maximum(found.latent[i], 0)]
    return kept
