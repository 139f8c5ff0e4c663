"""How is the residual stream shaped, layer by layer: rank, entropy, bends, outliers, position and
context?

Of held-out rows (no start, special and sink rows), intervals over documents where a mean is shown:

1. *Rank* (raw and with coordinates standardised): matrix entropy −Σ λ log λ of a context's Gram
   matrix of unit rows, by log of its size; effective rank e^S; participation ratio (Σλ)²/Σλ² of
   the covariance; intrinsic dimension by two neighbours.
2. *Curvature*: mean angle between successive differences h_{t+1} − h_t. Null: rows in random order.
3. *Outliers*: coordinates whose mean is more than 3 σ from the others'; anisotropy (mean cosine of
   random pairs) as it is, with those coordinates at 0, with as many random ones at 0, and centred.
4. *Position and document*: shares of variance of position means and document means (alternating),
   beside the same shares with positions and documents permuted.
5. *Augmentation*: how often the nearest other half-document (mean row) is the other half of the
   same document. Chance: one by the number of halves.
6. *Between layers*: unbiased CKA (standardised) and mean cosine within a context, by layer.

Cost: one read of `n_rows` rows a layer. Sources: Skean et al. 2025, Layer by Layer (arXiv
2502.02013); Song and Zhong 2023, Uncovering Hidden Geometry (arXiv 2310.04861); Luo et al. 2021,
Positional Artefacts (arXiv 2011.04393); abstracts only.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Doc

from featureflow.sites import residual_sites
from featureflow.statistics import mean_over, named
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.held_out import choose_rows
from pipeline.lenses.parts.read_out import document_of, rows_at
from pipeline.run import Run

TITLE = "the shape of the stream by layer: rank, curvature, outliers, position, context, CKA"
NEEDS = ("collect",)
OUTLIER = 3.0
_NEAR = 1500


class Config(Sampled):
    """On how many rows."""

    n_rows: Annotated[int, Ge(64), Doc("held-out rows read at every layer")] = 6144


def look(run: Run, config: Config) -> Finding:
    """One row a layer, and the similarity of every two layers."""
    sites = residual_sites(run.store.sites)
    blocks = choose_rows(run, config, config.n_rows)
    where = np.concatenate(blocks)
    document, position = document_of(run, blocks), run.tokens.position[where].astype(np.int64)
    run_of = np.cumsum(np.diff(where, prepend=where[0]) != 1)
    rows, grams, outlying = [], {}, []
    for site in run.each("shape of", sites):
        x = rows_at(run, site, blocks)
        row: dict[str, Any] = {"site": site.short, "layer": site.layer}
        row |= ranks(x, run_of, config.seed) | bends(x, run_of, document, config.seed)
        found, dims = outliers(x, config.seed)
        row |= found | shares(x, position, document, config.seed)
        row |= halves(x, document) | {"within_context": _within(x, run_of)}
        outlying += [{"site": site.short, "dimension": int(i), "z": float(z)} for i, z in dims]
        rows.append(row)
        grams[site.short] = _gram_of(x[:_NEAR])
    table = pd.DataFrame(rows)
    similar = pd.DataFrame(
        [
            {"site": a, "other_site": b, "cka": cka(x, y)}
            for a, x in grams.items()
            for b, y in grams.items()
        ]
    )
    shuffled = torch.randperm(min(_NEAR, len(where)), generator=torch.Generator().manual_seed(0))
    middle = grams[sites[len(sites) // 2].short]
    null = cka(middle, middle[shuffled][:, shuffled])
    return Finding(
        tables={"layers": table, "outliers": pd.DataFrame(outlying), "similarity": similar},
        figure=lambda: lines(
            table.melt(["layer"], list(_SHOWN), "measure", "value").assign(
                measure=lambda t: t["measure"].map(_SHOWN)
            ),
            x="layer",
            line="measure",
            columns={"value": "value"},
        ),
        text=_text(table, null),
        headline={
            "context share, first and last layer": f"{table['context_share'].iloc[0]:.3f}, "
            f"{table['context_share'].iloc[-1]:.3f}",
            "position share": round(float(table["position_share"].median()), 4),
            "anisotropy": round(float(table["anisotropy"].median()), 4),
            "anisotropy without outliers": round(float(table["anisotropy_without"].median()), 4),
        },
    )


_SHOWN = {
    "entropy": "matrix entropy",
    "curvature_share": "curvature by that of random order",
    "anisotropy": "anisotropy",
    "anisotropy_without": "anisotropy without outliers",
    "context_share": "document's share of variance",
    "position_share": "position's share of variance",
    "halves": "halves of documents found",
    "within_context": "mean cosine within a context",
}


def ranks(x: Float[Tensor, "row d"], run_of: Int[np.ndarray, "row"], seed: int) -> dict[str, float]:
    """Entropy of contexts' Gram matrices, effective rank, participation ratio, dimension."""
    found: dict[str, float] = {}
    standard = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
    for name, rows in (("", x), ("_standardised", standard)):
        entropies = [entropy(rows[torch.from_numpy(run_of == r)]) for r in np.unique(run_of)[:32]]
        values = torch.linalg.eigvalsh(torch.cov(rows.T)).clamp_min(0)
        share = values / values.sum()
        found[f"entropy{name}"] = float(np.nanmean(entropies))
        found[f"effective_rank{name}"] = float(torch.exp(-torch.xlogy(share, share).sum()))
        found[f"participation{name}"] = float(1 / share.square().sum())
    found["dimension"] = two_neighbours(x, seed)
    return found


def entropy(x: Float[Tensor, "row d"]) -> float:
    """Entropy of the eigenvalues of the Gram matrix of unit rows, by the log of its largest
    rank."""
    if len(x) < 4:
        return float("nan")
    unit = torch.nn.functional.normalize(x, dim=-1)
    values = torch.linalg.eigvalsh(unit @ unit.T).clamp_min(0) / len(x)
    return float(-torch.xlogy(values, values).sum() / np.log(min(x.shape)))


def two_neighbours(x: Float[Tensor, "row d"], seed: int) -> float:
    """Intrinsic dimension by the ratio of distances to the two nearest rows (Facco et al.)."""
    chosen = np.random.default_rng(seed).permutation(len(x))[:_NEAR]
    part = x[torch.from_numpy(chosen)].double()
    near = torch.cdist(part, part).topk(3, largest=False).values[:, 1:]
    ratio = (near[:, 1] / near[:, 0].clamp_min(1e-12)).log()
    ratio = ratio[torch.isfinite(ratio) & (near[:, 0] > 1e-9)].sort().values
    kept = ratio[: int(0.9 * len(ratio))]  # of the largest tenth only that they are larger counts
    cut = (len(ratio) - len(kept)) * kept[-1]
    return float(len(kept) / (kept.sum() + cut).clamp_min(1e-12))


def bends(
    x: Float[Tensor, "row d"],
    run_of: Int[np.ndarray, "row"],
    document: Int[np.ndarray, "row"],
    seed: int,
) -> dict[str, float]:
    """Mean angle of successive differences, and by that of rows in random order."""
    angle, at = _angles(x, run_of)
    found = mean_over(angle, document[at], seed=seed)
    order = np.arange(len(x))
    rng = np.random.default_rng(seed)
    for r in np.unique(run_of):
        own = np.flatnonzero(run_of == r)
        order[own] = rng.permutation(own)
    null = float(_angles(x[torch.from_numpy(order)], run_of)[0].mean())
    return named("curvature", found) | {"curvature_share": found.mean / null}


def _angles(
    x: Float[Tensor, "row d"], run_of: Int[np.ndarray, "row"]
) -> tuple[Float[np.ndarray, "bend"], Int[np.ndarray, "bend"]]:
    step = torch.nn.functional.normalize(x[1:] - x[:-1], dim=-1)
    cosine = (step[1:] * step[:-1]).sum(-1).clamp(-1, 1)
    inside = run_of[2:] == run_of[:-2]
    return torch.arccos(cosine).double().numpy()[inside], np.flatnonzero(inside) + 1


def outliers(
    x: Float[Tensor, "row d"], seed: int
) -> tuple[dict[str, float], list[tuple[int, float]]]:
    """Outlying coordinates, and anisotropy with and without them."""
    mean = x.mean(0)
    z = (mean - mean.mean()) / mean.std()
    dims = (z.abs() > OUTLIER).nonzero().squeeze(1)
    rng = np.random.default_rng(seed)
    random = torch.from_numpy(rng.permutation(x.shape[1])[: len(dims)])
    pairs = torch.from_numpy(rng.integers(0, len(x), (2, 4096)))

    def cosine(rows: Tensor, without: Tensor | None = None) -> float:
        if without is not None and len(without):
            rows = rows.clone()
            rows[:, without] = 0
        return float(torch.cosine_similarity(rows[pairs[0]], rows[pairs[1]], dim=-1).mean())

    found = {
        "n_outliers": float(len(dims)),
        "anisotropy": cosine(x),
        "anisotropy_without": cosine(x, dims),
        "anisotropy_random": cosine(x, random),
        "anisotropy_centred": cosine(x - mean),
    }
    return found, [(int(i), float(z[i])) for i in dims]


def shares(
    x: Float[Tensor, "row d"],
    position: Int[np.ndarray, "row"],
    document: Int[np.ndarray, "row"],
    seed: int,
) -> dict[str, float]:
    """Shares of variance of position and document means, and with both permuted."""
    rng = np.random.default_rng(seed)
    own = _explained(x, position, document)
    null = _explained(x, rng.permutation(position), rng.permutation(document))
    return {
        "position_share": own[0],
        "context_share": own[1],
        "position_null": null[0],
        "context_null": null[1],
    }


def _explained(
    x: Float[Tensor, "row d"], position: np.ndarray, document: np.ndarray
) -> tuple[float, float]:
    """By alternating means, as the design is not balanced."""
    rest = x - x.mean(0)
    total = float(rest.square().sum())
    factors = [
        torch.from_numpy(np.unique(each, return_inverse=True)[1]) for each in (position, document)
    ]
    parts = [torch.zeros_like(rest), torch.zeros_like(rest)]
    for _ in range(5):
        for i, factor in enumerate(factors):
            left = rest - parts[1 - i]
            n = torch.bincount(factor).clamp_min(1)[:, None]
            mean = torch.zeros(len(n), x.shape[1]).index_add_(0, factor, left) / n
            parts[i] = mean[factor]
    return tuple(float(part.square().sum()) / total for part in parts)  # type: ignore[return-value]


def halves(x: Float[Tensor, "row d"], document: Int[np.ndarray, "row"]) -> dict[str, float]:
    """How often a half of a document is nearest (cosine, centred) to its other half."""
    means = []
    for each in np.unique(document):
        own = np.flatnonzero(document == each)
        if len(own) >= 8:
            a, b = np.array_split(own, 2)
            means += [x[torch.from_numpy(a)].mean(0), x[torch.from_numpy(b)].mean(0)]
    if len(means) < 6:
        return {"halves": float("nan"), "halves_chance": float("nan")}
    unit = torch.nn.functional.normalize(torch.stack(means) - x.mean(0), dim=-1)
    near = unit @ unit.T
    near.fill_diagonal_(-2)
    right = near.argmax(1) == torch.arange(len(means)) ^ 1
    return {"halves": float(right.float().mean()), "halves_chance": 1 / (len(means) - 1)}


def _within(x: Float[Tensor, "row d"], run_of: Int[np.ndarray, "row"]) -> float:
    unit = torch.nn.functional.normalize(x, dim=-1)
    found = []
    for r in np.unique(run_of):
        own = unit[torch.from_numpy(run_of == r)]
        if len(own) > 1:
            found.append(
                float((own.sum(0).square().sum() - len(own)) / (len(own) * (len(own) - 1)))
            )
    return float(np.mean(found))


def _gram_of(x: Float[Tensor, "row d"]) -> Float[Tensor, "row row"]:
    standard = (x - x.mean(0)) / x.std(0).clamp_min(1e-6)
    return (standard @ standard.T).fill_diagonal_(0)


def cka(k: Float[Tensor, "row row"], m: Float[Tensor, "row row"]) -> float:
    """Unbiased linear CKA of two Gram matrices with zero diagonals."""

    def hsic(a: Tensor, b: Tensor) -> float:
        n = len(a)
        first, sums = (a * b).sum(), a.sum() * b.sum() / ((n - 1) * (n - 2))
        rest = 2 * (a.sum(0) @ b.sum(0)) / (n - 2)
        return float(first + sums - rest)

    return hsic(k, m) / np.sqrt(max(hsic(k, k) * hsic(m, m), 1e-30))


def _text(table: pd.DataFrame, null: float) -> str:
    said = [
        f"  {row.site}: entropy {row.entropy:.2f} (standardised {row.entropy_standardised:.2f}), "
        f"participation {row.participation:.0f} ({row.participation_standardised:.0f}), dimension "
        f"{row.dimension:.0f}, curvature {row.curvature:.2f} ({row.curvature_share:.2f} of random "
        f"order), {row.n_outliers:.0f} outliers, anisotropy {row.anisotropy:.2f} → "
        f"{row.anisotropy_without:.2f} without them ({row.anisotropy_random:.2f} without as many "
        f"others), position {row.position_share:.1%} ({row.position_null:.1%} permuted), document "
        f"{row.context_share:.1%} ({row.context_null:.1%}), halves {row.halves:.2f} "
        f"({row.halves_chance:.3f})"
        for row in table.itertuples()
    ]
    return (
        "What the papers saw (abstracts only): middle layers carry the richest features and "
        "compress; position is a low-rank spiral\nnearly orthogonal to the context's part; two or "
        "three coordinates make most of the anisotropy.\n\nWhat this model shows:\n"
        + "\n".join(said)
        + f"\nCKA of a layer with its own rows in another order: {null:.3f}. A model with rotary "
        "positions has no spiral to show."
    )
