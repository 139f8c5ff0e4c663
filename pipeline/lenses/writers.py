"""Which neurons and which heads write a feature?

1. A feature of an MLP's output: its pre-activation less the bias is Σ a_n (w_i·v_n) over neurons,
   exactly; of an attention's output Σ w_i·(W_O z_h) over heads. Both are averaged over the tokens
   where the feature is active.
2. share = a writer's mean contribution by the sum; k90 = the fewest writers that hold 90 % of the
   positive part; n_effective = (Σ|c|)² / Σ c².
3. Null: the same writers at the tokens where another feature is active.
4. Held to removal: the k90 strongest writers are taken off where the feature is active, and the SAE
   encodes again. Silenced: not active any more. Control: as many other neurons, drawn by how much
   they write there.

Cost: one forward pass over `n_tokens`; products of latents × neurons. Source: Geva et al. 2021
(arXiv 2012.14913) and Katz and Belinkov 2023 (arXiv 2305.13417) look at neurons and heads; neither
asks who writes a feature (texts not read here).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Doc

from featureflow.errors import UserError
from featureflow.sites import Site
from featureflow.statistics import mean_over, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.held_out import Contexts, choose_contexts
from pipeline.lenses.parts.neurons import record_neurons, values, values_of_heads
from pipeline.lenses.parts.read_out import vocabulary_of
from pipeline.run import Run
from sae import Sae

TITLE = "which neurons and heads write each feature, held to removal"
NEEDS = ("collect", "train")
FEW, MOST = 5, 0.9
_ROWS = 64


class Config(Sampled):
    """On how much text, how many writers are named, how many features are tested."""

    n_tokens: Annotated[int, Ge(64), Doc("held-out tokens")] = 6144
    n_named: Annotated[int, Ge(1), Doc("writers named a feature")] = 5
    n_tested: Annotated[int, Ge(1), Doc("features a site whose writers are removed")] = 60


def look(run: Run, config: Config) -> Finding:
    """Writers of every feature of a module, and what their removal does. Raises UserError when no
    module has an SAE."""
    sites = [site for site in run.saes if site.kind in ("mlp_out", "attn_out")]
    if not sites:
        raise UserError(
            "no MLP or attention has an SAE",
            where=str(run.root),
            fix="add mlp_out or attn_out to collect.sites",
        )
    contexts = choose_contexts(run, config, config.n_tokens)
    document = contexts.documents[contexts.spliced].numpy()
    writers, rows, cards = [], [], []
    for site in run.each("writers", sites):
        inputs, written, out = recorded(run, site, contexts)
        if not torch.allclose(
            inputs @ written + (out - inputs @ written).mean(0),
            out,
            rtol=0.05,
            atol=0.05 * float(out.abs().max()),
        ):
            continue  # what is added to the stream is normed after the projection
        groups = _groups(run, site, inputs.shape[1])
        table, removed = of_site(run.saes[site], inputs, written, out, groups, document, config)
        table.insert(0, "feature", [f"{site.short}/{i}" for i in table.pop("latent")])
        words = _words(run, site, written)
        table["promotes"] = [words.get(i, "") for i in table["writer"]]
        table["kind"] = "neuron" if site.kind == "mlp_out" else "head"
        writers.append(table)
        rows.append({"site": site.short, "layer": site.layer, "kind": site.kind} | removed)
        cards.append(_card(table))
    table, layers = pd.concat(writers, ignore_index=True), pd.DataFrame(rows)
    return Finding(
        tables={"layers": layers, "writers": table},
        figure=lambda: bars(
            layers,
            by=["site"],
            columns={"silenced": "silenced without its writers", "control": "without others"},
        ),
        text=_text(layers),
        headline={
            "silenced": round(float(layers["silenced"].mean()), 4),
            "control": round(float(layers["control"].mean()), 4),
        },
        columns=pd.concat(cards, ignore_index=True),
    )


def recorded(
    run: Run, site: Site, contexts: Contexts
) -> tuple[Float[Tensor, "token input"], Float[Tensor, "input d_model"], Tensor]:
    """What the site's last projection reads on ordinary tokens, what a unit of each input writes,
    and the site's own activation."""
    keep, model = contexts.spliced, run.model
    out = torch.cat([model.activations(i, [site])[site] for i in contexts.ids.split(8)])
    if site.kind == "mlp_out":
        a = record_neurons(model, contexts.ids, [site.layer])[site.layer]
        return a[keep], values(model, site.layer), out[keep].float().cpu()
    z = Site(site.layer, "z")
    read = torch.cat([model.activations(i, [z])[z] for i in contexts.ids.split(8)])
    written = values_of_heads(model, site.layer)
    assert written is not None
    return read[keep].float().cpu(), written, out[keep].float().cpu()


def _groups(run: Run, site: Site, n_inputs: int) -> Int[np.ndarray, "input"]:
    """The writer that every input of the projection belongs to: a neuron, or a head."""
    if site.kind == "mlp_out":
        return np.arange(n_inputs)
    n_heads = run.model.hf.config.get_text_config().num_attention_heads
    return np.arange(n_inputs) // (n_inputs // n_heads)


def of_site(
    sae: Sae,
    inputs: Float[Tensor, "token input"],
    written: Float[Tensor, "input d_model"],
    out: Float[Tensor, "token d_model"],
    groups: Int[np.ndarray, "input"],
    document: Int[np.ndarray, "token"],
    config: Config,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The strongest writers of every active latent, and the test by removal."""
    active = sae.encode(out) > 0
    living = np.flatnonzero(active.sum(0).numpy() >= FEW)
    one = torch.nn.functional.one_hot(torch.from_numpy(groups)).float()
    inner = sae.W_enc.detach().float()[living] @ written.T
    mean = active.float().T[living] @ inputs / active.sum(0)[living, None]
    c = ((mean * inner) @ one).numpy()
    rng = np.random.default_rng(config.seed)
    elsewhere = ((mean[rng.permutation(len(living))] * inner) @ one).numpy()
    order = np.argsort(-c, axis=1)
    positive = np.take_along_axis(np.maximum(c, 0), order, 1)
    k90 = (positive.cumsum(1) < MOST * positive.sum(1, keepdims=True)).sum(1) + 1
    total, effective = c.sum(1), np.abs(c).sum(1) ** 2 / np.maximum((c**2).sum(1), 1e-30)
    frames = []
    for rank in range(min(config.n_named, c.shape[1])):
        at = order[:, rank]
        rows = np.arange(len(living))
        frames.append(
            pd.DataFrame(
                {
                    "latent": living,
                    "rank": rank,
                    "writer": at,
                    "share": c[rows, at] / total,
                    "share_elsewhere": elsewhere[rows, at] / total,
                    "k90": k90,
                    "n_effective": effective,
                }
            )
        )
    table = pd.concat(frames, ignore_index=True)
    removed = pd.DataFrame(
        _removed(sae, inputs, written, out, groups, active, living, order, k90, document, config)
    )
    row: dict[str, Any] = {"n_features": len(living), "k90": float(np.median(k90))}
    row["n_effective"] = float(np.median(effective))
    for column in ("silenced", "control"):
        found = mean_over(removed[column].to_numpy(), removed["document"].to_numpy(), seed=0)
        row |= named(column, found)
    first = table[table["rank"] == 0]
    row["share_first"] = float(first["share"].median())
    return table, row | {"elsewhere_first": float(first["share_elsewhere"].median())}


def _removed(
    sae: Sae,
    inputs: Tensor,
    written: Tensor,
    out: Tensor,
    groups: np.ndarray,
    active: Tensor,
    living: np.ndarray,
    order: np.ndarray,
    k90: np.ndarray,
    document: np.ndarray,
    config: Config,
) -> Iterator[dict[str, Any]]:
    """For some features, every active token: silenced without its writers, and without others."""
    rng = np.random.default_rng([config.seed, 1])
    strength = written.norm(dim=-1)
    for place in rng.permutation(len(living))[: config.n_tested]:
        rows = active[:, living[place]].nonzero().squeeze(1)[:_ROWS]
        writers = order[place, : k90[place]]
        weight = np.bincount(groups, (inputs[rows].abs().mean(0) * strength).numpy())
        weight[writers] = 0
        n = min(len(writers), int((weight > 0).sum()))
        others: Any = (
            rng.choice(len(weight), n, replace=False, p=weight / weight.sum()) if n else []
        )
        gone = {}
        for name, taken in (("silenced", writers), ("control", others)):
            off = torch.from_numpy(np.isin(groups, taken))
            left = out[rows] - inputs[rows][:, off] @ written[off]
            gone[name] = (sae.encode(left)[:, living[place]] == 0).numpy().astype(float)
        for i, row in enumerate(rows.tolist()):
            yield {"document": document[row]} | {name: each[i] for name, each in gone.items()}


def _words(run: Run, site: Site, written: Tensor) -> dict[int, str]:
    """What each neuron promotes; heads write no one direction."""
    if site.kind != "mlp_out":
        return {}
    vocabulary = vocabulary_of(run)
    return dict(enumerate(vocabulary.words(vocabulary.promoted(written, 4))))


def _card(table: pd.DataFrame) -> pd.DataFrame:
    name = table["kind"].iloc[0]
    said = name + " " + table["writer"].astype(str) + table["share"].map(" ({:.0%})".format)
    lines = said.groupby(table["feature"], sort=False).apply(lambda s: ", ".join(s[:3]))
    return pd.DataFrame({"feature": lines.index, "written by": lines.to_numpy()})


def _text(layers: pd.DataFrame) -> str:
    said = [
        f"  {row.site}: {row.n_features} features; 90 % of the positive part by {row.k90:.0f} "
        f"writers (median); the first gives {row.share_first:.0%} ({row.elsewhere_first:.0%} at "
        f"another feature's tokens); silenced without them {ranged(row, 'silenced')}, "
        f"without as many others {ranged(row, 'control')}"
        for row in layers.itertuples()
    ]
    return (
        "Neither paper asks who writes a feature of a dictionary.\n\n"
        "What this model shows, 95 % intervals over documents:\n" + "\n".join(said)
    )
