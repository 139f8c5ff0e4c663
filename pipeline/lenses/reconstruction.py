"""How well does each SAE reconstruct held-out activations?

1. Held-out rows are drawn by seed: whole documents that no SAE was trained on.
2. Every SAE of the run (and those in `others`, of any format) encodes and decodes the same rows; a
   transcoder encodes the rows of the site it reads. FVU, L0, dead latents and cosine with intervals
   over documents (sae/metrics.py, formulas in docs/metrics.md).
3. Beside them the FVU of a PCA with as many components as latents are active, fitted on train rows,
   and of `N_ROWS` train rows taken as a dictionary, as many a token, by least squares.

Cost: one encoding of `n_tokens` per SAE; two covariances and one eigendecomposition per site. A
killed run keeps the sites it finished.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor
from typing_extensions import Doc

from data.store import ActivationStore
from data.store.store import Split
from featureflow.errors import Problem, UserError
from featureflow.figures import KINDS
from featureflow.sites import Site
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled, kept
from pipeline.lenses.parts.candidates import (
    Candidate,
    Others,
    digests_of_others,
    find_candidates,
    used_later,
)
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.held_out import choose_rows, iter_rows
from pipeline.run import Run
from sae import Sae
from sae.metrics import (
    CovarianceMeter,
    ReconstructionMeter,
    active_latents,
    n_components_to_match,
    pca_fvu,
    rows_fvu,
)

TITLE = "how well each SAE reconstructs held-out activations, beside a PCA"
GROUP = "evaluation"
NEEDS = ("collect", "train")
N_ROWS = 2048
"""Train rows that make the dictionary without training, and held-out rows it is measured on."""


class Config(Sampled):
    """On how much SAEs are measured."""

    n_tokens: Annotated[int, Ge(2), Doc("held-out tokens on which reconstruction is measured")] = (
        8192
    )
    n_pca_tokens: Annotated[
        int, Ge(0), Doc("train tokens the PCA baseline is fitted on; 0 leaves it out")
    ] = 8192
    n_resamples: Annotated[int, Ge(10), Doc("bootstrap resamples of documents")] = 1000
    others: Others = ()


def outside_digests(config: Config) -> dict[str, str]:
    """The files of `others`: the result depends on them too."""
    return digests_of_others(config.others)


def look(run: Run, config: Config) -> Finding:
    """One row an SAE, and the PCA's curve of every site. Raises UserError."""
    candidates = find_candidates(run, config.others)
    sites = list(dict.fromkeys(candidate.site for candidate in candidates))
    rows = {
        split: choose_rows(run, config, n, split=split, sites=sites) if n else []
        for split, n in _amounts(config).items()
    }
    metrics, curves = [], []
    for site in run.each("reconstruct", sites):
        here = [candidate for candidate in candidates if candidate.site == site]
        found = kept(
            site.short, lambda site=site, here=here: _of_site(run, site, here, rows, config)
        )
        metrics += found["rows"]
        curves += [(site.short, k, fvu) for k, fvu in enumerate(found["pca"])]
        for row in found["rows"]:
            run.context.metrics({n: row[n] for n in ("site", "source", "fvu", "l0", "cosine")})
    table = pd.DataFrame(metrics).astype({"pca_fvu": float, "rows_fvu": float})
    used = used_later(table)
    headline = _headline(table, used)
    return Finding(
        tables={
            "metrics": table,
            "pca": pd.DataFrame(curves, columns=["site", "n_components", "fvu"]),
        },
        figure=lambda: _by_layer(used),
        text=_text(headline),
        headline=headline,
    )


def _amounts(config: Config) -> dict[Split, int]:
    return {"validation": config.n_tokens, "train": config.n_pca_tokens}


def _of_site(
    run: Run,
    site: Site,
    candidates: Sequence[Candidate],
    rows: dict[Split, list[Int[np.ndarray, "row"]]],
    config: Config,
) -> dict[str, Any]:
    """`rows`: one flat record an SAE; `pca`: the PCA's FVU for 0, 1, … components. Plain JSON
    values; each row is read once for all SAEs."""
    store = run.store
    centre = torch.from_numpy(store.statistics(site).mean)
    saes = [(candidate, candidate.load(run.context.device)) for candidate in candidates]
    _check_widths(saes, store)
    meters = [
        ReconstructionMeter(n_latents=sae.n_latents, d_out=sae.d_out, centre=centre)
        for _, sae in saes
    ]
    covariance, some = CovarianceMeter(centre=centre), []
    sites = tuple(dict.fromkeys([site, *(candidate.reads or site for candidate in candidates)]))
    blocks_at = (iter_rows(store, other, rows["validation"]) for other in sites)
    for blocks in zip(*blocks_at, strict=True):
        x = {other: values for other, (values, _) in zip(sites, blocks, strict=True)}
        for (candidate, sae), meter in zip(saes, meters, strict=True):
            rebuilt, active = reconstruct(sae, x[candidate.reads or site])
            meter.update(x[site], rebuilt, active, blocks[0][1])
        if rows["train"]:
            covariance.update(x[site])
            some.append(x[site][: N_ROWS // len(rows["validation"]) + 1])
    curve, train = np.zeros(0), []
    if rows["train"]:
        fitted = CovarianceMeter(centre=centre)
        for x_train, _ in iter_rows(store, site, rows["train"]):
            fitted.update(x_train)
            train.append(x_train[: N_ROWS // len(rows["train"]) + 1])
        curve = pca_fvu(fitted, covariance)

    def untrained(k: int) -> float | None:
        return rows_fvu(torch.cat(train), torch.cat(some), k) if train else None

    return {
        "rows": [
            _row(candidate, sae, meter, curve, config)
            | {"rows_fvu": untrained(max(1, round(meter.result().l0)))}
            for (candidate, sae), meter in zip(saes, meters, strict=True)
        ],
        "pca": curve.tolist(),
    }


def _check_widths(saes: Sequence[tuple[Candidate, Sae]], store: ActivationStore) -> None:
    problems = []
    for candidate, sae in saes:
        widths = store.width(candidate.reads or candidate.site), store.width(candidate.site)
        if (sae.d_in, sae.d_out) != widths:
            found = f"{sae.d_in} in, {sae.d_out} out"
            expected = f"{widths[0]} in, {widths[1]} out"
            problems.append(
                Problem(what="width", where=str(candidate.path), expected=expected, found=found)
            )
    if problems:
        raise UserError("dictionaries of another width than their site", problems=tuple(problems))


@torch.no_grad()
def reconstruct(sae: Sae, x: Tensor) -> tuple[Tensor, Tensor]:
    """The reconstruction, and the latent of every non-zero code."""
    codes = sae.encode_sparse(x)
    active = active_latents(codes.index, codes.value)
    plain = type(sae) is Sae and sae.W_skip is None
    return (sae.decode(codes) if plain else sae(x)), active


def _row(
    candidate: Candidate, sae: Sae, meter: ReconstructionMeter, curve: np.ndarray, config: Config
) -> dict[str, Any]:
    result = meter.result()
    interval = meter.fvu_interval(n_resamples=config.n_resamples, seed=config.seed)
    same_budget = min(round(result.l0), len(curve) - 1)
    row = {
        **candidate.columns,
        "architecture": _architecture(sae),
        "d_in": sae.d_in,
        **asdict(result),
        "fvu_low": interval.low,
        "fvu_high": interval.high,
        "pca_fvu": float(curve[same_budget]) if len(curve) else None,
        "pca_components_to_match": n_components_to_match(curve, result.fvu) if len(curve) else None,
    }
    return {
        name: None if isinstance(value, float) and np.isnan(value) else value
        for name, value in row.items()
    }


def _architecture(sae: Sae) -> str:
    """What it was trained as, where that is known; else the activation it is used with."""
    trained_as = sae.metadata.get("architecture")
    kind = trained_as.get("kind") if isinstance(trained_as, dict) else trained_as
    return str(kind or sae.activation.kind)


def _headline(rows: pd.DataFrame, used: pd.DataFrame) -> dict[str, Any]:
    """Medians over the SAEs that later stages use (over all, where there are none of those), and
    how many explain more than a PCA of the same budget."""
    numbers = {"n_dictionaries": len(rows), "n_tokens": int(rows["n_tokens"].iloc[0])}
    columns = ["fvu", "pca_fvu", "rows_fvu", "l0", "dead_fraction"]
    medians = used[columns].astype(float).median().dropna()
    numbers |= {f"{name}_median": round(float(value), 4) for name, value in medians.items()}
    if used["pca_fvu"].notna().any():
        numbers["n_better_than_pca"] = int((used["fvu"] < used["pca_fvu"]).sum())
    return numbers


def _text(numbers: dict[str, Any]) -> str:
    baseline = (
        f", a PCA with as many components {numbers['pca_fvu_median']}, as many of {N_ROWS} train "
        f"rows {numbers['rows_fvu_median']}; "
        f"{numbers['n_better_than_pca']} SAEs are better than their PCA"
        if "n_better_than_pca" in numbers
        else ""
    )
    return (
        f"{numbers['n_dictionaries']} SAEs on {numbers['n_tokens']} held-out tokens. Of the "
        "variance, the median SAE\n"
        f"leaves {numbers['fvu_median']} unexplained with {numbers['l0_median']:g} active latents "
        f"a token{baseline}.\n"
        "The FVU says how close reconstructions are, not whether the model can use them: that is "
        "the lens loss-recovered."
    )


def _by_layer(rows: pd.DataFrame) -> Figure:
    """FVU with its interval and the PCA of as many components, L0, dead latents; one line a
    kind."""
    rows = rows.assign(
        line=[KINDS[kind][0] for kind in rows["kind"]], dead=100 * rows["dead_fraction"]
    )
    pca = rows.assign(line=rows["line"] + ", PCA", fvu=rows["pca_fvu"], l0=np.nan, dead=np.nan)
    return lines(
        pd.concat([rows, pca[pca["fvu"].notna()]]),
        x="layer",
        line="line",
        columns={
            "fvu": "FVU on held-out tokens",
            "l0": "active latents per token (L0)",
            "dead": "latents that were never active, %",
        },
        dotted=set(pca["line"]),
    )
