"""How far did training turn each decoder row from its start, and does that tell anything?

1. The start of an independent SAE is drawn again from its seed; that of a chained one is its
   parent. Turn: cosine of each row with its own start.
2. Null: cosine with another row's start.
3. Rank correlation of the turn with how often a latent is active and with its largest link's
   cosine, where there is a flow graph. A frozen row has cosine 1.

Cost: seconds. Source: Carbonnelle and De Vleeschouwer 2018, Layer rotation (arXiv 1806.01603;
abstract only): how far layers turn goes with how well they generalise.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Doc

from featureflow.errors import UserError
from featureflow.sites import Site, parse_site
from pipeline.findings import Finding
from pipeline.flow.functional import encode_tokens
from pipeline.lenses.base import Seeded
from pipeline.lenses.parts.charts import lines
from pipeline.run import Run
from sae.trainer import random_start

TITLE = "how far training turned each decoder row from its start"
NEEDS = ("collect", "train", "link")


class Config(Seeded):
    """On how much text activity is looked at."""

    n_tokens: Annotated[int, Ge(16), Doc("held-out tokens")] = 4096


def look(run: Run, config: Config) -> Finding:
    """Turns by site. Raises UserError when no SAE says how it started."""
    held_out = run.held_out(config.n_tokens)
    edges = run.graph.edges[run.graph.edges["rank"] == 0]
    rows, features = [], []
    for site in run.each("turns", run.saes):
        start = start_of(run, site)
        if start is None:
            continue
        turned, other = turns(run.saes[site].W_dec.detach(), start, config.seed)
        n = encode_tokens(run.saes[site], held_out(site)).n_fired
        linked = np.full(len(n), np.nan)
        into = edges[edges["target_site"].astype(str) == site.short].sort_values("cosine")
        linked[into["target_latent"]] = into["cosine"]
        rows.append(
            {
                "site": site.short,
                "layer": site.layer,
                "kind": site.kind,
                "cosine": float(np.median(turned)),
                "null": float(np.median(other)),
                "silent": float(np.median(turned[n == 0])) if (n == 0).any() else np.nan,
                "with_activity": _spearman(turned, n.astype(float)),
                "with_link": _spearman(turned, linked),
            }
        )
        features.append(
            pd.DataFrame(
                {"feature": [f"{site.short}/{i}" for i in range(len(n))], "start_cosine": turned}
            )
        )
    if not rows:
        raise UserError(
            "none of these SAEs says how it started",
            where=str(run.artifact("train").path),
            expected="SAEs trained by this project",
        )
    table = pd.DataFrame(rows)
    return Finding(
        tables={"sites": table, "features": pd.concat(features, ignore_index=True)},
        figure=lambda: lines(
            table, x="layer", line="kind", columns={"cosine": "cosine with the start, median"}
        ),
        text=_text(table),
        headline={
            "cosine with the start": round(float(table["cosine"].median()), 4),
            "with another's start": round(float(table["null"].median()), 4),
        },
    )


def start_of(run: Run, site: Site) -> Float[Tensor, "latent d"] | None:
    """The decoder rows that training began with; None where the SAE does not say."""
    facts: Any = run.saes.description(site)["metadata"].get("initialisation") or {}
    if facts.get("parent"):
        parent = parse_site(facts["parent"])
        return run.saes[parent].W_dec.detach() if parent in run.saes else None
    if facts.get("kind") not in ("independent", "shared", "chain") or "seed" not in facts:
        return None
    shape = run.saes[site].W_dec.shape
    return random_start(shape[0], shape[1], seed=facts["seed"])["W_dec"]


def turns(
    rows: Float[Tensor, "latent d"], start: Float[Tensor, "latent d"], seed: int
) -> tuple[Float[np.ndarray, "latent"], Float[np.ndarray, "latent"]]:
    """Cosine of every row with its start, and with another row's."""
    order = torch.randperm(len(start), generator=torch.Generator().manual_seed(seed))
    own, other = (
        torch.cosine_similarity(rows.float(), each.float(), dim=-1).numpy()
        for each in (start, start[order])
    )
    return own, other


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    both = np.isfinite(a) & np.isfinite(b)
    if both.sum() < 3 or len(np.unique(b[both])) < 2:
        return float("nan")
    return float(scipy.stats.spearmanr(a[both], b[both]).statistic)


def _text(table: pd.DataFrame) -> str:
    said = [
        f"  {row.site}: {row.cosine:.2f} (another's start {row.null:.2f}, silent latents "
        f"{row.silent:.2f}); rank correlation with activity {row.with_activity:.2f}, with the "
        f"link's cosine {row.with_link:.2f}"
        for row in table.itertuples()
    ]
    return (
        "What the paper saw (abstract only): networks whose layers turn further generalise better."
        "\n\nWhat this model shows, median cosine of decoder rows with their start:\n"
        + "\n".join(said)
    )
