"""Are two SAEs the same: another run's (a second seed, another architecture, a release), or those
of two layers?

1. On the same held-out tokens: *mmcs*, mean of each row's largest cosine with the other's rows,
   beside the same for randomly rotated rows; *matched*, share of rows above the 99th percentile of
   the rotated ones.
2. *Angle*: Procrustes distance arccos(⟨X, Y Q⟩ / ‖X‖‖Y‖) of the reconstructions, 0 for rotated
   copies; null: tokens in another order.
3. *Relative representation*: every token as cosines with `n_anchors` anchor tokens, in both;
   correlation of the two, null as above.
4. *Latents*: median over latents of the largest correlation of activations with the other's; and
   *subspace*: unbiased CKA of the codes. Subspaces may agree where single latents do not.

Cost: one encoding of `n_tokens` each, products of codes. Sources: Williams et al. 2021, Generalized
Shape Metrics (arXiv 2110.14739); Moschella et al. 2022, Relative Representations (arXiv
2209.15430); abstracts only. Stitching and stochastic distances were not built.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Doc

from featureflow.errors import UserError
from featureflow.sites import Site, residual_sites
from pipeline.artifact import Artifact
from pipeline.findings import Finding
from pipeline.lenses.base import Seeded
from pipeline.lenses.layer_shape import cka
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.layers import spread
from pipeline.run import Run
from sae import Sae

TITLE = "how far two SAEs are apart: those of another run, or of two layers"
NEEDS = ("collect", "train")
MEASURES = ("mmcs", "matched", "angle", "relative", "latents", "subspace")


class Config(Seeded):
    """With whom, and on how much text."""

    other: Annotated[
        str, Doc("folder of another run of the same model; empty: layers with each other")
    ] = ""
    n_tokens: Annotated[int, Ge(64), Doc("held-out tokens")] = 2048
    n_sites: Annotated[int, Ge(1), Doc("sites, spread over the depth")] = 4
    n_anchors: Annotated[int, Ge(2), Doc("anchor tokens of the relative representation")] = 300


def outside_digests(config: Config) -> dict[str, str]:
    """The other run's SAEs: the result depends on them."""
    if not config.other or not (Path(config.other) / "train").is_dir():
        return {}
    return {"other": Artifact.open(Path(config.other) / "train", kind="train", schema=1).digest}


def look(run: Run, config: Config) -> Finding:
    """Distances, one row a pair of SAEs. Raises UserError when the runs share no site."""
    held_out = run.held_out(config.n_tokens)
    rows: list[dict[str, Any]] = []
    for first, second, a, b in _pairs(run, config):
        run.context.progress(f"compare {first} and {second}", len(rows), 0)
        x, y = (torch.cat([*held_out(site)]) for site, _ in (a, b))
        found = distances(a[1], b[1], x, y, config)
        rows.append({"site": a[0].short, "other_site": b[0].short} | found)
    table = pd.DataFrame(rows)
    shown = table.assign(pair=table["site"] + " – " + table["other_site"])
    return Finding(
        tables={"pairs": table},
        figure=lambda: bars(shown, by=["pair"], columns={name: name for name in MEASURES[:4]}),
        text=_text(table),
        headline={name: round(float(table[name].median()), 4) for name in MEASURES},
    )


def _pairs(run: Run, config: Config) -> list[tuple[str, str, tuple[Site, Sae], tuple[Site, Sae]]]:
    if not config.other:
        stream = spread(residual_sites(run.saes), config.n_sites)
        saes = {site: run.saes[site] for site in stream}
        found = [
            (a.short, b.short, (a, saes[a]), (b, saes[b]))
            for i, a in enumerate(stream)
            for b in stream[i + 1 :]
            if saes[a].d_out == saes[b].d_out
        ]
        if not found:
            raise UserError(
                "no two sites have one width",
                where=str(run.root),
                found=", ".join(f"{site.short}: {sae.d_out}" for site, sae in saes.items()),
            )
        return found
    other = Run.open(config.other, context=run.context)
    common = [site for site in run.saes if site in other.saes]
    if not common:
        raise UserError(
            "the two runs have SAEs at no common site",
            where=config.other,
            found=", ".join(site.short for site in other.saes),
            expected=", ".join(site.short for site in run.saes),
        )
    ours, theirs = (each.store.provenance.get("model_fingerprint") for each in (run, other))
    if ours != theirs:
        raise UserError(
            "the two runs are of different models", where=config.other, found=theirs, expected=ours
        )
    return [
        (s.short, f"{s.short} of {other.root.name}", (s, run.saes[s]), (s, other.saes[s]))
        for s in spread(common, config.n_sites)
    ]


def distances(
    a: Sae, b: Sae, x: Float[Tensor, "token d"], y: Float[Tensor, "token d"], config: Config
) -> dict[str, Any]:
    """Every measure, and its null."""
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(x), generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(b.d_out, b.d_out, generator=generator))
    u, v = (torch.nn.functional.normalize(each.W_dec.float(), dim=-1) for each in (a, b))
    best, rotated = (u @ v.T).amax(1), (u @ (v @ turn).T).amax(1)
    za, zb = a.encode(x), b.encode(y)
    ra, rb = (each - each.mean(0) for each in (a.decode(za), b.decode(zb)))
    anchors = torch.randperm(len(x), generator=generator)[: config.n_anchors]
    ca, cb = (_to_anchors(each, anchors) for each in (ra, rb))
    ga, gb = _gram(za), _gram(zb)
    return {
        "mmcs": float(best.mean()),
        "mmcs_null": float(rotated.mean()),
        "matched": float((best > rotated.quantile(0.99)).float().mean()),
        "angle": angle(ra, rb),
        "angle_null": angle(ra, rb[order]),
        "relative": _correlation(ca, cb),
        "relative_null": _correlation(ca, cb[order]),
        "latents": _best_correlation(za, zb),
        "latents_null": _best_correlation(za, zb[order]),
        "subspace": cka(ga, gb),
        "subspace_null": cka(ga, gb[order][:, order]),
    }


def angle(x: Float[Tensor, "token d"], y: Float[Tensor, "token d"]) -> float:
    """The angle between two sets of rows, after the best rotation of one; in radians."""
    inner = torch.linalg.svdvals((x.T @ y).double()).sum()
    return float(torch.arccos((inner / (x.norm().double() * y.norm().double())).clamp(-1, 1)))


def _to_anchors(x: Tensor, anchors: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(x, dim=-1)
    return unit @ unit[anchors].T


def _correlation(x: Tensor, y: Tensor) -> float:
    return float(np.corrcoef(x.flatten().numpy(), y.flatten().numpy())[0, 1])


def _best_correlation(x: Tensor, y: Tensor) -> float:
    """Median over living latents of the largest correlation with one of the other's."""
    x, y = (z[:, (z > 0).sum(0) >= 5].double() for z in (x, y))
    x, y = ((z - z.mean(0)) / z.std(0, correction=0).clamp_min(1e-12) for z in (x, y))
    return float((x.T @ y / len(x)).amax(1).median()) if x.numel() and y.numel() else float("nan")


def _gram(z: Tensor) -> Tensor:
    centred = z - z.mean(0)
    return (centred @ centred.T).fill_diagonal_(0)


def _text(table: pd.DataFrame) -> str:
    said = [
        f"  {row.site} and {row.other_site}: mmcs {row.mmcs:.2f} (rotated {row.mmcs_null:.2f}), "
        f"matched {row.matched:.0%}, angle {row.angle:.2f} (other order {row.angle_null:.2f}), "
        f"relative {row.relative:.2f} ({row.relative_null:.2f}), best latent {row.latents:.2f} "
        f"({row.latents_null:.2f}), subspace {row.subspace:.2f} ({row.subspace_null:.2f})"
        for row in table.itertuples()
    ]
    return (
        "What the papers saw (abstracts only): subspaces agree between networks where single "
        "neurons do not.\n\nWhat this model shows (nulls in brackets):\n" + "\n".join(said)
    )
