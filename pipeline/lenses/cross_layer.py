"""What do the latents of a cross-layer transcoder or crosscoder explain, and which act on which?

1. The dictionary is that of `train.imported.cross_layer`, or of a folder in any format
   (sae/formats/cross_layer.py).
2. Held-out rows of all sites are encoded layer by layer and decoded together. Every site that is
   written gets its FVU with an interval over documents, the FVU of its own layer's latents alone,
   L0 and dead latents.
3. Of each layer the `n_latents` that add most are kept. For each pair of them the virtual weight V,
   what one unit of the source adds to the target's pre-activation by way of the stream, is weighted
   by how they are active together: V · Σ a_source a_target / Σ a_target. That is what the source
   adds on average where the target is active. The largest are the edges.

A virtual weight leaves out what attention moves between tokens and the norm before the target; for
sites after a norm it is in units of the normalised stream. Source of 3: Ameisen et al. 2025,
"Circuit Tracing", target-weighted expected residual attribution. Cost: two passes of encoding, one
of decoding, a product of `n_latents²` for each pair of layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Doc

from featureflow.files import digest_of_file
from featureflow.sites import Site
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.held_out import choose_rows, iter_rows
from pipeline.run import Run
from pipeline.saes import CROSS_LAYER
from pipeline.training.imported import check_cross_layer
from sae.cross_layer import CrossLayer
from sae.formats import read_cross_layer
from sae.metrics import ReconstructionMeter

TITLE = "what a cross-layer transcoder or crosscoder explains, and which latents act on which"
NEEDS = ("collect", "train")
_LAYERS = ("site", "reads_site", "n_latents", "fvu", "fvu_low", "fvu_high", "fvu_own", "l0", "dead")
_EDGES = (
    *("source_layer", "source_latent", "target_layer", "target_latent"),
    *("virtual_weight", "expected"),
)
Rows = list[Int[np.ndarray, "row"]]
Latents = list[Int[Tensor, "chosen"]]


class Config(Sampled):
    """Which dictionary, and how much of it."""

    folder: Annotated[str, Doc("folder of the dictionary; empty for the run's own")] = ""
    model: Annotated[
        str, Doc("the name that its files give the model, if it is a relative of the run's")
    ] = ""
    n_tokens: Annotated[int, Ge(2), Doc("held-out tokens")] = 8192
    n_latents: Annotated[int, Ge(1), Doc("latents of each layer in the graph")] = 64
    n_edges: Annotated[int, Ge(1), Doc("edges that are listed")] = 2000
    n_resamples: Annotated[int, Ge(10), Doc("bootstrap resamples of documents")] = 1000


def outside_digests(config: Config) -> dict[str, str]:
    """The files of `folder`."""
    files = sorted(Path(config.folder).rglob("*")) if config.folder else []
    digests = [digest_of_file(file)[:16] for file in files if file.is_file()]
    return {f"folder:{config.folder}": "-".join(digests)} if digests else {}


def look(run: Run, config: Config) -> Finding:
    """One row a site, and the largest edges. Raises UserError for one that does not fit."""
    own = run.artifact("train").path / CROSS_LAYER
    if not config.folder and not own.is_dir():
        text = (
            "This run has no dictionary that writes into many layers. Name its folder "
            "(--folder), or import one with train.imported.cross_layer."
        )
        empty = {"layers": _LAYERS, "edges": _EDGES}
        return Finding(
            tables={n: pd.DataFrame(columns=list(c)) for n, c in empty.items()}, text=text
        )
    whole = read_cross_layer(config.folder or own)
    check_cross_layer(whole, run.store, config.model or None)
    sites = tuple(dict.fromkeys((*whole.reads, *whole.writes)))
    rows = choose_rows(run, config, config.n_tokens, sites=sites)
    layers, added = _measured(run, whole, rows, config)
    chosen = [each.topk(min(config.n_latents, len(each))).indices.sort().values for each in added]
    edges = _edges(run, whole, rows, chosen).head(config.n_edges)
    headline = {
        "n_latents": whole.n_latents,
        "n_tokens": sum(map(len, rows)),
        "fvu_median": round(float(layers["fvu"].median()), 4),
        "fvu_own_median": round(float(layers["fvu_own"].median()), 4),
        "l0_median": float(layers["l0"].median()),
        "n_edges": len(edges),
    }
    return Finding(
        tables={"layers": layers, "edges": edges},
        figure=lambda: lines(
            _by_line(layers),
            x="layer",
            line="line",
            columns={"fvu": "FVU on held-out tokens", "l0": "active latents per token (L0)"},
        ),
        text=_text(headline),
        headline=headline,
    )


def _measured(
    run: Run, whole: CrossLayer, rows: Rows, config: Config
) -> tuple[pd.DataFrame, list[Float[Tensor, "latent"]]]:
    """A row for each site that is written, and what every latent adds over all rows: its sum times
    the length of all that it writes."""
    meters: list[tuple[ReconstructionMeter, ReconstructionMeter]] = []
    for site, part in zip(whole.writes, whole.parts, strict=True):
        centre = torch.from_numpy(run.store.statistics(site).mean)
        size = {"n_latents": len(part.b_enc), "d_out": len(centre)}
        meters.append(tuple(ReconstructionMeter(**size, centre=centre) for _ in range(2)))  # type: ignore[arg-type]
    sums = [torch.zeros(len(part.b_enc)) for part in whole.parts]
    for done, (x, documents) in enumerate(_iter_blocks(run, whole, rows)):
        run.context.progress("cross-layer", done, len(rows))
        z, out = whole.encode(x), whole(x)
        for i, (site, latents) in enumerate(zip(whole.writes, z, strict=True)):
            active = latents.nonzero()[:, 1]
            alone = latents @ whole.rows(i, i) + whole.b_dec[i]
            if (skip := whole.W_skip[i]) is not None:
                alone = alone + x[whole.reads[i]] @ skip.T
            meters[i][0].update(x[site], out[site], active, documents)
            meters[i][1].update(x[site], alone, active, documents)
            sums[i] += latents.sum(0)
    found = []
    for i, (everything, own) in enumerate(meters):
        result = everything.result()
        interval = everything.fvu_interval(n_resamples=config.n_resamples, seed=config.seed)
        values: tuple[Any, ...] = (
            *(whole.writes[i].short, whole.reads[i].short, result.n_latents),
            *(result.fvu, interval.low, interval.high, own.result().fvu),
            *(result.l0, result.dead_fraction),
        )
        found.append(dict(zip(_LAYERS, values, strict=True)))
    lengths = [part.W_dec.square().sum((1, 2)).sqrt() for part in whole.parts]
    return pd.DataFrame(found), [a * b for a, b in zip(sums, lengths, strict=True)]


def _edges(run: Run, whole: CrossLayer, rows: Rows, chosen: Latents) -> pd.DataFrame:
    """All pairs of chosen latents whose source writes what the target reads, the largest expected
    addition first."""
    n = len(whole.parts)
    virtual = {
        (s, t): weights[:, chosen[t]]
        for s in range(n)
        for t in range(n)
        if s != t and (weights := whole.virtual_weights(s, t, latents=chosen[s].tolist())).any()
    }
    together = {pair: torch.zeros_like(weights) for pair, weights in virtual.items()}
    sums = [torch.zeros(len(latents)) for latents in chosen]
    for x, _ in _iter_blocks(run, whole, rows):
        z = [each[:, latents] for each, latents in zip(whole.encode(x), chosen, strict=True)]
        for (s, t), total in together.items():
            total += z[s].T @ z[t]
        for total, latents in zip(sums, z, strict=True):
            total += latents.sum(0)
    parts = []
    for (s, t), weights in virtual.items():
        expected = weights * together[s, t] / sums[t].clamp_min(1e-12)
        i, j = expected.nonzero(as_tuple=True)
        columns = (s, chosen[s][i], t, chosen[t][j], weights[i, j], expected[i, j])
        parts.append(pd.DataFrame(dict(zip(_EDGES, columns, strict=True))))
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=list(_EDGES))
    table["source_layer"] = [whole.reads[int(s)].layer for s in table["source_layer"]]
    table["target_layer"] = [whole.reads[int(t)].layer for t in table["target_layer"]]
    order = table["expected"].abs().sort_values(ascending=False, kind="stable").index
    return table.loc[order].reset_index(drop=True)


def _iter_blocks(
    run: Run, whole: CrossLayer, rows: Rows
) -> Iterator[tuple[dict[Site, Float[Tensor, "token width"]], Int[Tensor, "token"]]]:
    sites = tuple(dict.fromkeys((*whole.reads, *whole.writes)))
    for blocks in zip(*(iter_rows(run.store, site, rows) for site in sites), strict=True):
        yield {site: x for site, (x, _) in zip(sites, blocks, strict=True)}, blocks[0][1]


def _by_line(layers: pd.DataFrame) -> pd.DataFrame:
    rows = layers.assign(layer=range(len(layers)), line="all layers that write there")
    own = rows.assign(line="its own layer alone", fvu=rows["fvu_own"], l0=np.nan)
    return pd.concat([rows, own.drop(columns=["fvu_low", "fvu_high"])])


def _text(numbers: dict[str, Any]) -> str:
    return (
        f"{numbers['n_latents']} latents on {numbers['n_tokens']} held-out tokens. All layers "
        f"together leave {numbers['fvu_median']} of\nthe variance of the median site unexplained, "
        f"its own layer's latents alone {numbers['fvu_own_median']}, with\n"
        f"{numbers['l0_median']:g} active latents a token. {numbers['n_edges']} edges are listed. "
        "An edge is a product of weights and of\nactivity on the same token. It does not show that "
        "the target needs its source,\nand says nothing of what attention moves."
    )
