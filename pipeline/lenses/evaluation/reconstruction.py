"""All dictionaries of one site on the same rows: encode, decode, measure; and the PCA of the same
budget beside them.

A transcoder encodes the rows of the site it reads and is measured against the site's. Each row is
read once for all. Cost: one encoding per dictionary, two covariances and one eigendecomposition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from data.store import ActivationStore
from featureflow.errors import Problem, UserError
from featureflow.sites import Site
from pipeline.lenses.evaluation.candidates import Candidate
from pipeline.lenses.evaluation.held_out import iter_rows
from sae import Sae
from sae.metrics import (
    CovarianceMeter,
    ReconstructionMeter,
    active_latents,
    n_components_to_match,
    pca_fvu,
)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a measurement, in ascending blocks. Without `train` there is no PCA baseline."""

    held_out: list[Int[np.ndarray, "row"]]
    train: list[Int[np.ndarray, "row"]]


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """How intervals are made."""

    n_resamples: int
    seed: int


def measure_site(
    store: ActivationStore,
    site: Site,
    candidates: Sequence[Candidate],
    rows: Rows,
    bootstrap: Bootstrap,
    *,
    device: str = "cpu",
) -> dict[str, Any]:
    """`rows`: one flat record a dictionary; `pca`: the PCA's FVU for 0, 1, … components. Plain JSON
    values."""
    centre = torch.from_numpy(store.statistics(site).mean)
    dictionaries = [(candidate, candidate.load(device)) for candidate in candidates]
    _check_widths(dictionaries, store)
    meters = [
        ReconstructionMeter(n_latents=sae.n_latents, d_out=sae.d_out, centre=centre)
        for _, sae in dictionaries
    ]
    covariance = CovarianceMeter(centre=centre)
    sites = tuple(dict.fromkeys([site, *(candidate.reads or site for candidate in candidates)]))
    for blocks in zip(*(iter_rows(store, other, rows.held_out) for other in sites), strict=True):
        x = {other: values for other, (values, _) in zip(sites, blocks, strict=True)}
        documents = blocks[0][1]
        for (candidate, sae), meter in zip(dictionaries, meters, strict=True):
            reconstruction, active = reconstruct(sae, x[candidate.reads or site])
            meter.update(x[site], reconstruction, active, documents)
        if rows.train:
            covariance.update(x[site])
    curve = _pca_curve(store, site, rows.train, covariance)
    return {
        "rows": [
            _row(candidate, sae, meter, curve, bootstrap)
            for (candidate, sae), meter in zip(dictionaries, meters, strict=True)
        ],
        "pca": curve.tolist(),
    }


def _check_widths(dictionaries: Sequence[tuple[Candidate, Sae]], store: ActivationStore) -> None:
    problems = []
    for candidate, sae in dictionaries:
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


def _pca_curve(
    store: ActivationStore,
    site: Site,
    train: list[Int[np.ndarray, "row"]],
    held_out: CovarianceMeter,
) -> np.ndarray:
    if not train:
        return np.zeros(0)
    fitted = CovarianceMeter(centre=held_out.centre)
    for x, _ in iter_rows(store, site, train):
        fitted.update(x)
    return pca_fvu(fitted, held_out)


def _architecture(sae: Sae) -> str:
    """What it was trained as, where that is known; else the activation it is used with."""
    trained_as = sae.metadata.get("architecture")
    kind = trained_as.get("kind") if isinstance(trained_as, dict) else trained_as
    return str(kind or sae.activation.kind)


def _row(
    candidate: Candidate,
    sae: Sae,
    meter: ReconstructionMeter,
    curve: np.ndarray,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    result = meter.result()
    interval = meter.fvu_interval(n_resamples=bootstrap.n_resamples, seed=bootstrap.seed)
    same_budget = min(round(result.l0), len(curve) - 1)
    row = {
        "name": candidate.name,
        "site": candidate.site.short,
        "layer": candidate.site.layer,
        "kind": candidate.site.kind,
        "source": candidate.source,
        "reads": None if candidate.reads is None else candidate.reads.short,
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
