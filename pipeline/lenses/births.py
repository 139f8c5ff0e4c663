"""Does the layer where the flow graph sees a feature begin write the feature? A claim that neither
a skip connection nor a model with random weights can make.

1. Targets are active features on held-out tokens, at residual sites spread over the depth, whose
   life in the graph begins above the first layer and below their own site (`birth_layer` b).
2. What block l writes on that token (attention and MLP) is replaced by its mean over the tokens,
   h_l ← h_{l−1} + mean; the model goes on, and the target is read again.
3. l is the target's own birth layer (`own`), the birth layer of another target of the same site
   (`other`: the same layers in all, only not its own), and the layer whose write points most along
   the target's encoder on this token (`direct`, which needs no graph).
4. The arm without the model takes the same from the undisturbed stream at the target.
   Changes (1 − new / old) are cut at ±1, so that no weak target decides.

The claim is `own` − `other`: what the graph knows of *this* feature. A skip connection passes on
every layer's write alike. Cost: three rows of the context per target, through the blocks from l.
Source: this project; the replacement is mean ablation of one block on one token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from data.model.partial_forward import continued_from
from featureflow.errors import Command, UserError
from featureflow.sites import Site
from featureflow.statistics import mean_over, named, ranged
from pipeline.findings import Finding
from pipeline.flow.causal import Contexts, record_clean
from pipeline.lenses.base import Seeded
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.layers import (
    NContexts,
    NPairs,
    NTargets,
    contexts_of,
    per_context,
    spread,
)
from pipeline.run import Run
from sae import Sae

TITLE = "does the layer where a feature begins write it? Blocks removed, with and without the model"
NEEDS = ("collect", "train", "link")
ARMS = ("own", "other", "direct")
BATCH = 32


class Config(Seeded):
    """How much is tested."""

    n_pairs: NPairs = 4
    n_targets: NTargets = 200
    n_contexts: NContexts = 48


def look(run: Run, config: Config) -> Finding:
    """Remove blocks and read the targets again. Raises UserError where nothing can be tested."""
    chain = [site for site in run.saes if site.is_residual]
    first = chain[0].layer if chain else 0
    deep = [site for site in chain if site.kind == "resid_post" and site.layer >= first + 2]
    if not deep:
        raise UserError("no residual site is deep enough", expected="layer 2 or later")
    contexts = contexts_of(run, config.n_contexts)
    targets = spread(deep, config.n_pairs)
    streams = tuple(Site(i, "resid_post") for i in range(targets[-1].layer + 1))
    recorded = record_clean(run.model, contexts, streams, progress=run.context.progress)
    trials = pd.concat(
        [_of_site(run, site, first, contexts, recorded, config) for site in targets],
        ignore_index=True,
    )
    if trials.empty:
        raise UserError("no active feature begins above the first layer", fix=Command("link"))
    summary = _summary(trials, config.seed)
    by_site = pd.concat(
        [
            _summary(part, config.seed).assign(site=site)
            for site, part in trials.groupby("target_site", sort=False)
        ],
        ignore_index=True,
    )
    difference = summary.set_index("arm").loc["own − other"]
    return Finding(
        tables={"summary": summary, "sites": by_site, "trials": trials},
        text=_text(summary.set_index("arm"), targets),
        headline={
            "n": int(difference["n"]),
            **{name: round(float(difference[name]), 4) for name in _MEASURES},
        },
        figure=lambda: bars(
            summary,
            by=["arm"],
            columns={"change": "change of the target", "change_no_model": "without the model"},
        ),
    )


def _of_site(
    run: Run,
    site: Site,
    first: int,
    contexts: Contexts,
    recorded: Mapping[Site, Tensor],
    config: Config,
) -> pd.DataFrame:
    sae, rng = run.saes[site], np.random.default_rng([config.seed, site.layer])
    codes = sae.encode_sparse(recorded[site])
    born = _births(run, site, first)
    trials = _drawn(
        codes.value.cpu().numpy(), codes.index.cpu().numpy(), born, contexts, config, rng
    )
    if trials.empty:
        return trials
    writes = _writes(site, contexts, recorded)
    layers = {
        "own": born[trials["target_latent"]],
        "other": _of_others(born[trials["target_latent"]], rng),
        "direct": _most_direct(sae, trials, writes),
    }
    parts = []
    for arm, layer in layers.items():
        known = np.flatnonzero(layer >= 0)
        rows = trials.iloc[known].assign(arm=arm, removed_layer=layer[known])
        parts.append(rows.assign(**_removed(run, site, sae, rows, contexts, recorded, writes)))
    return pd.concat(parts, ignore_index=True).assign(
        target_site=site.short,
        target_feature=lambda table: site.short + "/" + table["target_latent"].astype(str),
    )


def _births(run: Run, site: Site, first: int) -> Int64[np.ndarray, "latent"]:
    """The birth layer of every latent; −1 where it is the site's own, or the first that has an
    SAE, before which nothing was looked at."""
    nodes = run.graph.nodes
    here = nodes[nodes["site"] == site.short]
    birth = np.full(int(here["latent"].max()) + 1, -1, dtype=np.int64)
    between = (here["birth_layer"] > first) & (here["birth_layer"] < site.layer) & here["alive"]
    birth[here["latent"][between]] = here["birth_layer"][between]
    return birth


def _drawn(
    value: np.ndarray,
    index: np.ndarray,
    born: np.ndarray,
    contexts: Contexts,
    config: Config,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Active features with a birth between, one a token, spread over contexts."""
    context, position, slot = np.nonzero((value > 0) & contexts.usable[..., None])
    latent = index[context, position, slot]
    order = rng.permutation(np.flatnonzero(born[latent] >= 0))
    table = pd.DataFrame(
        {
            "context": context[order],
            "position": position[order],
            "target_latent": latent[order],
            "before": value[context, position, slot][order].astype(float),
        }
    ).drop_duplicates(["context", "position"])
    rank = table.groupby("context").cumcount()
    chosen = table[rank < per_context(config.n_targets, contexts)][: config.n_targets]
    document = contexts.document[chosen["context"], chosen["position"]]
    return chosen.assign(document=document).reset_index(drop=True)


def _writes(
    site: Site, contexts: Contexts, recorded: Mapping[Site, Tensor]
) -> dict[int, Float[Tensor, "context position d_model"]]:
    """What each block from 1 on wrote, less its mean over usable tokens."""
    usable = torch.from_numpy(contexts.usable)
    found = {}
    for layer in range(1, site.layer):
        write = recorded[Site(layer, "resid_post")] - recorded[Site(layer - 1, "resid_post")]
        found[layer] = write - write[usable].mean(0)
    return found


def _of_others(own: Int64[np.ndarray, "trial"], rng: np.random.Generator) -> np.ndarray:
    """For each trial the birth layer of another one, drawn among those with another birth."""
    found = np.full(len(own), -1, dtype=np.int64)
    for i, layer in enumerate(own):
        if len(others := own[own != layer]):
            found[i] = rng.choice(others)
    return found


def _most_direct(
    sae: Sae, trials: pd.DataFrame, writes: Mapping[int, Tensor]
) -> Int64[np.ndarray, "trial"]:
    at = (torch.from_numpy(trials[name].to_numpy(copy=True)) for name in ("context", "position"))
    context, position = at
    row = sae.W_enc[torch.from_numpy(trials["target_latent"].to_numpy(copy=True))].float().cpu()
    direct = torch.stack([(w[context, position] * row).sum(-1) for w in writes.values()])
    return np.array(list(writes))[direct.argmax(0).numpy()]


def _removed(
    run: Run,
    site: Site,
    sae: Sae,
    rows: pd.DataFrame,
    contexts: Contexts,
    recorded: Mapping[Site, Tensor],
    writes: Mapping[int, Tensor],
) -> dict[str, np.ndarray]:
    """The change of each target with its layer's write replaced, with and without the model."""
    change, without = np.zeros((2, len(rows)))
    columns = ("context", "position", "target_latent", "before", "removed_layer")
    context, position, latent, before, layer = (rows[name].to_numpy() for name in columns)
    for batch in _batches(layer, position):
        here = Site(int(layer[batch[0]]), "resid_post")
        c, p = torch.from_numpy(context[batch]), torch.from_numpy(position[batch])
        length, delta = int(p.max()) + 1, -writes[here.layer][c, p]
        stream = recorded[here][c, :length].clone()
        stream[torch.arange(len(c)), p] += delta
        with continued_from(run.model, here.layer, stream):
            ids = torch.from_numpy(contexts.ids[context[batch], :length])
            after = run.model.activations(ids, (site,))[site][torch.arange(len(c)), p].float()
        wanted = torch.from_numpy(latent[batch])
        change[batch] = 1 - _read(sae, after, wanted) / before[batch]
        without[batch] = 1 - _read(sae, recorded[site][c, p] + delta, wanted) / before[batch]
        run.context.progress(f"remove blocks before {site.short}", int(batch[-1]), len(rows))
    cut = {"change": change.clip(-1, 1), "change_no_model": without.clip(-1, 1)}
    return {**cut, "success": change >= 1}


def _batches(layer: np.ndarray, position: np.ndarray) -> Iterator[Int64[np.ndarray, "row"]]:
    """Rows of one removed layer, those that end at about the same position together."""
    for value in np.unique(layer):
        own = np.flatnonzero(layer == value)
        own = own[np.argsort(position[own], kind="stable")]
        for start in range(0, len(own), BATCH):
            yield own[start : start + BATCH]


def _read(sae: Sae, rows: Tensor, latent: Tensor) -> np.ndarray:
    codes = sae.encode_sparse(rows)
    wanted = codes.index == latent[:, None].to(codes.index.device)
    return (codes.value * wanted).sum(-1).double().cpu().numpy()


_MEASURES = ("change", "change_no_model", "change_by_model", "success")


def _summary(trials: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One row an arm, and the difference of pairs; intervals over documents."""
    keys = ["target_site", "context", "position", "target_latent", "document"]
    trials = trials.assign(change_by_model=trials["change"] - trials["change_no_model"])
    wide = trials.set_index([*keys, "arm"])[list(_MEASURES)].astype(float).unstack("arm")
    wide = wide.reindex(columns=pd.MultiIndex.from_product([_MEASURES, ARMS]))
    paired = wide["change"].dropna().index
    rows = []
    for name, (left, right) in {
        **{arm: (arm, None) for arm in ARMS},
        "own − other": ("own", "other"),
        "direct − other": ("direct", "other"),
    }.items():
        row: dict[str, Any] = {"arm": name, "n": len(paired)}
        for measure in _MEASURES:
            values = wide.loc[paired, (measure, left)]
            if right is not None:
                values = values - wide.loc[paired, (measure, right)]
            document = values.index.get_level_values("document").to_numpy()
            row |= named(measure, mean_over(values.to_numpy(), document, seed=seed))
        rows.append(row)
    return pd.DataFrame(rows)


def _text(table: pd.DataFrame, targets: list[Site]) -> str:
    def told(arm: str, measure: str) -> str:
        return ranged(table.loc[arm], measure, ".3f")

    return (
        f"At {', '.join(site.short for site in targets)} ({int(table['n'].iloc[0])} targets) "
        "taking "
        f"away what the feature's birth layer wrote lowers it by {told('own', 'change')}, what the "
        f"birth layer of another feature wrote by {told('other', 'change')}: the difference, which "
        f"the graph knows, is {told('own − other', 'change')}. Without the model (the write taken "
        f"from the target's stream) that difference is {told('own − other', 'change_no_model')}; "
        f"the blocks add {told('own − other', 'change_by_model')}. The layer whose write points "
        f"most along the feature's encoder lowers it by {told('direct', 'change')}; that needs "
        "activations of the token and no graph."
    )
