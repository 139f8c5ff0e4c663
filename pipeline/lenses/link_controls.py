"""What would the judge keep where there is nothing to find? The flow graph's links under controls
that a referee would run.

At `n_pairs` neighbouring residual pairs, spread over the depth, and at their modules:

    forward        the pair as it is
    reversed       the later layer offered as the source: how much of a link is direction in depth
    far            a source half the depth away: what is left at a distance
    shuffled order a source drawn from the layers that are no neighbours, as if the order of the
                   layers were not known
    permuted       the target's held-out tokens in another order: activity says nothing any more
    clear          targets with a clear partner (cosine ≥ 0.7, correlation ≥ 0.5, first choice both
                   ways): how many of these the judge keeps
    orphans        half of the sources deleted; of the targets whose clear partner is gone the share
                   that is linked to something else. `n_relatives` counts those whose new source is
                   active with the deleted one (correlation ≥ 0.5): a part or a copy of it
    later MLP, later attention
                   module SAEs of *later* layers offered as a layer's own: they cannot precede it
    own MLP, own attention
                   the layer's own, to compare with

Each row is the share of living targets with a kept best link, with its median correlation. Nothing
here is claimed of a single link. Cost: one linking of a pair per row. Source: this project's own
referee; "leave partner out" is the test that tells a partner from its siblings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Gt, Lt
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import Doc

from featureflow.errors import Command, UserError
from featureflow.sites import Site
from pipeline.findings import Finding
from pipeline.flow.functional import agreement, encode_tokens
from pipeline.flow.link import link_dictionaries
from pipeline.flow.options import Calibrated, LinkOptions
from pipeline.flow.pairing import RELATIONS
from pipeline.flow.sae_cache import HeldOut
from pipeline.lenses.base import Seeded
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.layers import NPairs, NTokens, spread
from pipeline.run import Run
from sae import Sae, TopKActivation

TITLE = "what the judge of links keeps where there is nothing to find"
NEEDS = ("collect", "train", "link")
CLEAR_COSINE, CLEAR_CORRELATION = 0.7, 0.5
BEFORE, AFTER = Site(0, "resid_post"), Site(1, "resid_post")
"""Every pair is linked at these two places, so that a control cannot be told from a pair."""
Saes = Mapping[Site, Sae]


class Config(Seeded):
    """How much is tried."""

    n_pairs: NPairs = 3
    n_tokens: NTokens = 8192
    fdr: Annotated[float, Gt(0), Lt(1), Doc("false-discovery rate of the links")] = 0.05


def look(run: Run, config: Config) -> Finding:
    """Link pairs and their controls with the same judge. Raises UserError without two neighbouring
    residual sites."""
    chain = [site for site in run.saes if site.is_residual]
    if len(chain) < 2:
        raise UserError("there are no two residual sites", fix=Command("run", to="train"))
    rows = []
    for target in spread(chain[1:], config.n_pairs):
        for control, found in _controls(run, chain, target, config):
            rows.append({"target_site": target.short, "control": control} | found)
    table = pd.DataFrame(rows)
    summary = table.groupby("control", sort=False, as_index=False).agg(
        n_pairs=("kept_share", "size"),
        n_targets=("n_targets", "sum"),
        kept_share=("kept_share", "mean"),
        correlation=("correlation", "mean"),
        related_share=("related_share", "mean"),
        n_relatives=("n_relatives", "sum"),
    )
    headline = {
        name.replace(" ", "_"): round(float(share), 4)
        for name, share in zip(summary["control"], summary["kept_share"], strict=True)
    }
    return Finding(
        tables={"summary": summary, "pairs": table},
        text=_text(headline) + _of_one_start(run),
        headline=headline,
        figure=lambda: _draw(summary),
    )


def _controls(
    run: Run, chain: list[Site], target: Site, config: Config
) -> Iterator[tuple[str, dict[str, Any]]]:
    held_out = run.held_out(config.n_tokens)
    place = chain.index(target)
    source = chain[place - 1]
    far = chain[(place + len(chain) // 2) % len(chain)]
    forward = _links(run.saes, held_out, source, target, config)
    yield "forward", _shares(forward)
    yield "clear", _shares(forward[_clear(forward)])
    yield "reversed", _shares(_links(run.saes, held_out, target, source, config))
    if abs(far.layer - target.layer) > 1:
        yield "far", _shares(_links(run.saes, held_out, far, target, config))
    others = [site for site in chain if abs(site.layer - target.layer) > 1]
    if others:
        drawn = others[int(np.random.default_rng([config.seed, place]).integers(len(others)))]
        yield "shuffled order", _shares(_links(run.saes, held_out, drawn, target, config))
    shuffled = _permuted(held_out, target, config.seed)
    yield "permuted", _shares(_links(run.saes, shuffled, source, target, config))
    yield "orphans", _orphans(run, held_out, source, target, forward, config)
    names = {"mlp_out": "MLP", "attn_out": "attention"}
    for module in (site for site in run.saes if site.kind in names):
        if module.layer >= target.layer:
            whose = "own" if module.layer == target.layer else "later"
            name = f"{whose} {names[module.kind]}"
            yield name, _shares(_links(run.saes, held_out, module, target, config))


def _links(
    saes: Saes, held_out: HeldOut, source: Site, target: Site, config: Config
) -> pd.DataFrame:
    """Best links from `source` to `target`, judged like links of independent SAEs."""
    pair = {BEFORE: _unsigned(saes[source]), AFTER: _unsigned(saes[target])}
    places = {BEFORE: source, AFTER: target}
    links = link_dictionaries(
        pair,
        options=LinkOptions(top_k=1, thresholds=Calibrated(fdr=config.fdr), seed=config.seed),
        held_out=lambda site: held_out(places[site]),
    )
    edges = links.edges
    residual = edges["relation"] == RELATIONS[0]
    return edges[residual & (edges["rank"] == 0)].reset_index(drop=True)


def _unsigned(sae: Sae) -> Sae:
    """The SAE without what it says of its start and site: the judge sees a pair of strangers."""
    return Sae(
        W_enc=sae.W_enc,
        b_enc=sae.b_enc,
        W_dec=sae.W_dec,
        b_dec=sae.b_dec,
        b_in=sae.b_in,
        activation=sae.activation,
        metadata={},
    )


def _shares(links: pd.DataFrame) -> dict[str, Any]:
    kept = links[links["kept"]]
    return {
        "n_targets": len(links),
        "kept_share": float(links["kept"].mean()) if len(links) else np.nan,
        "related_share": float(links["related"].mean()) if len(links) else np.nan,
        "correlation": float(kept["pearson"].median()) if len(kept) else np.nan,
        "n_relatives": 0,
    }


def _permuted(held_out: HeldOut, moved: Site, seed: int) -> HeldOut:
    """The same tokens, in another order at one of the two sites."""

    def batches(site: Site) -> Iterator[Float[Tensor, "token d_in"]]:
        for i, batch in enumerate(held_out(site)):
            if site == moved:
                generator = torch.Generator().manual_seed(seed + i)
                batch = batch[torch.randperm(len(batch), generator=generator)]
            yield batch

    return batches


def _orphans(
    run: Run, held_out: HeldOut, source: Site, target: Site, forward: pd.DataFrame, config: Config
) -> dict[str, Any]:
    """Delete half of the sources; look at the targets whose clear partner is gone."""
    rng = np.random.default_rng([config.seed, target.layer])
    gone = rng.random(run.saes[source].n_latents) < 0.5
    left = dict(run.saes) | {source: _without(run.saes[source], gone)}
    links = _links(left, held_out, source, target, config)
    clear = forward[_clear(forward)].set_index("target_latent")["source_latent"]
    lost = clear[gone[clear]]
    orphans = links[links["target_latent"].isin(lost.index)]
    found = orphans[orphans["kept"]]
    codes = encode_tokens(run.saes[source], held_out(source))
    alike = agreement(
        codes, codes, lost[found["target_latent"]].to_numpy(), found["source_latent"].to_numpy()
    )
    return _shares(orphans) | {"n_relatives": int((alike >= CLEAR_CORRELATION).sum())}


def _clear(links: pd.DataFrame) -> pd.Series:
    """Which targets have a partner beyond doubt."""
    return (
        links["mutual"]
        & (links["cosine"] >= CLEAR_COSINE)
        & (links["pearson"] >= CLEAR_CORRELATION)
    )


def _without(sae: Sae, gone: np.ndarray) -> Sae:
    """The SAE whose latents in `gone` are never active and have no direction."""
    left = torch.from_numpy(~gone).to(sae.W_dec)
    low = torch.where(torch.from_numpy(gone), -1e9, 0.0).to(sae.b_enc)
    k = sae.activation.k if isinstance(sae.activation, TopKActivation) else None
    activation = sae.activation if k is None else TopKActivation(k=max(1, k // 2))
    return Sae(
        W_enc=sae.W_enc * left[:, None],
        b_enc=sae.b_enc + low,
        W_dec=sae.W_dec * left[:, None],
        b_dec=sae.b_dec,
        b_in=sae.b_in,
        activation=activation,
        metadata={},
    )


def _text(headline: dict[str, Any]) -> str:
    told = ", ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in headline.items())
    return (
        f"Share of living targets with a kept best link: {told}. Only what `forward` has beyond "
        "its controls speaks for a flow. `reversed` says how little a link knows of direction: "
        "that depth runs forward is assumed, not measured. `later` modules cannot have written "
        "what they match, so an own module is evidence only as far as it exceeds them."
    )


def _of_one_start(run: Run) -> str:
    pairs = run.graph.pairs
    n = int((pairs["start"] == "same_start").sum())
    if not n:
        return ""
    return (
        f" {n} of {len(pairs)} pairs are of one start, which these numbers ignore: there "
        "`forward` holds what the start left, not what training found."
    )


def _draw(summary: pd.DataFrame) -> Figure:
    columns = {"kept_share": "targets with a kept link", "correlation": "their correlation"}
    return bars(summary, by=["control"], columns=columns)
