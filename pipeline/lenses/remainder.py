"""What keeps a target alive whose best predecessor was removed, and would another single
predecessor have done better?

1. The target's reading before the ReLU is linear in the stream: h_target = h_source + what the
   layer adds. So it is the sum of what the predecessor's direction gives, the other latents of the
   source, its reconstruction error, what the layer between adds, and a constant (biases). All are
   given as shares of the undisturbed activation, for removals that silenced the target and for
   those that did not; there also what the layer adds after the removal.
2. Exact only where the source's site and the target's differ by one layer's output, so neighbouring
   `resid_post` sites.
3. On `n_exhaustive` targets per pair every active latent is tried: is the top-1 predecessor the
   best of them?

Not in the paper, whose Table 1 gives both strategies on different targets.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import UserError
from pipeline.findings import Finding
from pipeline.flow.causal import Contexts, record_clean
from pipeline.flow.validation import TOP_1
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.layers import (
    Layer,
    NExhaustive,
    Trials,
    contexts_of,
    layers_of,
    remove_predecessors,
    spread,
    with_features,
)
from pipeline.run import Run
from sae import Sae

TITLE = "what keeps targets alive whose predecessor was removed (in neither paper)"
GROUP = "paper"
NEEDS = ("collect", "train", "link")
BEST = "best single active"
PARTS = ("predecessor", "other_latents", "error", "constant", "layer", "layer_after")
_TARGET = ["target", "context", "position", "target_latent"]


class Config(Trials):
    """How much is tested."""

    n_exhaustive: NExhaustive = 20


def look(run: Run, config: Config) -> Finding:
    """Take the targets' readings apart, and compare top-1 with the best of all active latents on
    the same targets."""
    layers = [layer for layer in layers_of(run) if _neighbouring(layer)]
    if not layers:
        raise UserError(
            "no two neighbouring resid_post sites are linked", fix="set collect.sites to resid_post"
        )
    contexts = contexts_of(run, config.n_contexts)
    done = [_of_layer(run, layer, contexts, config) for layer in spread(layers, config.n_pairs)]
    parts = pd.concat([found for found, _ in done], ignore_index=True)
    both = _both(pd.concat([trials for _, trials in done], ignore_index=True))
    summary = parts.groupby("success", as_index=False).agg(
        n=("success", "size"),
        kept_below_usual=("below_usual", "mean"),
        **{name: (name, "mean") for name in PARTS},
    )
    by_layer = parts.groupby(["target", "success"], as_index=False)[list(PARTS)].mean()
    shares = summary.melt("success", PARTS, "part", "share").dropna(subset="share")
    shares["part"] = shares["part"].str.replace("_", " ") + shares["success"].map(
        {True: ", target silenced", False: ", still active"}
    )
    return Finding(
        tables={
            "summary": summary,
            "by_layer": by_layer.rename(columns={"target": "target_site"}),
            "same_targets": both.rename(columns={"target": "target_site"}),
            "parts": with_features(parts),
        },
        figure=lambda: bars(
            shares, by=("part",), columns={"share": "share of the target's activation"}
        ),
        text=_text(summary, both, parts["target"].nunique()),
        headline={"top-1 is the best": round(float(both["same"].mean()), 4)} if len(both) else {},
    )


def _neighbouring(layer: Layer) -> bool:
    """Whether the residual predecessor is one whole block before."""
    link = layer.links.get("residual")
    if link is None or {layer.target.kind, link.source.kind} != {"resid_post"}:
        return False
    return link.source.layer == layer.target.layer - 1


def _of_layer(
    run: Run, layer: Layer, contexts: Contexts, config: Config
) -> tuple[pd.DataFrame, pd.DataFrame]:
    source, target = layer.links["residual"].source, layer.target
    saes = {site: run.saes[site] for site in (source, target)}
    recorded = record_clean(run.model, contexts, (source, target), progress=run.context.progress)
    trials = remove_predecessors(
        run,
        saes,
        source,
        target,
        {TOP_1: layer.links["residual"].best[:, None]},
        contexts,
        n_targets=config.n_targets,
        seed=config.seed,
        recorded=recorded,
        n_exhaustive=config.n_exhaustive,
        controls=(),
    )
    removed = _removed(trials).reset_index(drop=True)
    at = tuple(torch.tensor(removed[name].to_numpy(copy=True)) for name in ("context", "position"))
    taken = _taken_apart(removed, saes[source], saes[target], recorded[source][at])
    usual = _usual_smallest(saes[target], recorded[target][torch.from_numpy(contexts.usable)])
    return taken.assign(below_usual=~removed["success"] & (removed["after"] < usual)), trials


def _removed(trials: pd.DataFrame) -> pd.DataFrame:
    """Trials of the top-1 predecessor in which it was active."""
    return trials[(trials["strategy"] == TOP_1) & (trials["n_removed"] == 1)]


def _taken_apart(
    trials: pd.DataFrame, source: Sae, target: Sae, stream: Float[Tensor, "trial d_model"]
) -> pd.DataFrame:
    """Each target's reading as shares of its activation; `layer` and `layer_after` are what is left
    over."""
    latent = torch.tensor(trials["target_latent"].to_numpy(copy=True))
    predecessor = torch.tensor(trials["predecessor"].to_numpy(copy=True))
    before, rows = trials["before"].to_numpy(), target.W_enc[latent]
    codes = source.encode_sparse(stream)
    strength = (codes.value * (codes.index == predecessor[:, None])).sum(1)
    direct = strength * (rows * source.W_dec[predecessor]).sum(1)
    rebuilt = source.decode(codes)
    sums = {
        "predecessor": direct,
        "other_latents": (rows * (rebuilt - source.b_dec)).sum(1) - direct,
        "error": (rows * (stream - rebuilt)).sum(1),
        "constant": (rows * (source.b_dec - target.b_in)).sum(1) + target.b_enc[latent],
    }
    parts = {name: value.double().numpy() / before for name, value in sums.items()}
    rest = parts["other_latents"] + parts["error"] + parts["constant"]
    parts["layer"] = 1.0 - rest - parts["predecessor"]
    after = trials["after"] / before - rest
    parts["layer_after"] = np.where(trials["success"], np.nan, after)
    facts = trials[["source", *_TARGET, "predecessor", "document", "before", "after", "success"]]
    return facts.rename(columns={"predecessor": "source_latent"}).assign(**parts)


def _usual_smallest(sae: Sae, rows: Float[Tensor, "token d_model"]) -> float:
    """The median over tokens of the smallest activation that is kept."""
    value = torch.cat([sae.encode_sparse(part).value for part in rows.split(2048)])
    smallest = torch.where(value > 0, value, torch.inf).amin(1)
    return float(smallest[smallest.isfinite()].median()) if bool(smallest.isfinite().any()) else 0.0


def _both(trials: pd.DataFrame) -> pd.DataFrame:
    """Targets tested by both strategies."""
    columns = [*_TARGET, "predecessor", "success", "change"]
    best = trials.loc[trials["strategy"] == BEST, columns]
    both = _removed(trials)[columns].merge(best, on=_TARGET, suffixes=("_top_1", "_best"))
    return both.assign(same=both["predecessor_top_1"] == both["predecessor_best"])


def _text(summary: pd.DataFrame, both: pd.DataFrame, n_layers: int) -> str:
    lines = [
        f"  {'silenced' if row.success else 'still active'} (n {row.n}): predecessor "
        f"{row.predecessor:.2f}, "
        f"other latents {row.other_latents:.2f}, error {row.error:.2f}, constant "
        f"{row.constant:.2f}, "
        f"layer {row.layer:.2f}"
        + ("" if row.success else f"; after removal the layer adds {row.layer_after:.2f}")
        for row in summary.itertuples()
    ]
    failed = summary[~summary["success"].astype(bool)]
    if len(failed):
        lines.append(
            f"  of those still active {failed['kept_below_usual'].iloc[0]:.2f} end below the usual "
            "smallest value"
        )
    if len(both):
        mean = both[["success_top_1", "change_top_1", "success_best", "change_best"]].mean()
        lines.append(
            f"  on {len(both)} targets tested both ways: top-1 success {mean['success_top_1']:.2f},"
            f" change {mean['change_top_1']:.2f}; best of all active latents "
            f"{mean['success_best']:.2f}, {mean['change_best']:.2f}; the same latent in "
            f"{both['same'].mean():.2f}"
        )
    return (
        "What the paper saw: the best of all active latents succeeds in 0.73, the top-1 one in "
        "0.65 (Table 1).\n\n"
        f"What this model shows, {n_layers} layers, shares of the target's activation:\n"
        + "\n".join(lines)
    )
