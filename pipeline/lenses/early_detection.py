"""How many layers ahead does a feature's flow announce it?

1. Random living features of some later residual sites, with an ancestor 1, 4, 8 and 12 layers up
   their flow.
2. On held-out tokens: recall = share of the feature's active tokens on which the ancestor is active
   too, precision = share of the ancestor's active tokens on which the feature will be. Beside them
   how often the feature is active at all (the base rate), and the same of a random feature of the
   ancestor's site with like density.
3. A soft gate: only activations of the ancestor above a quantile of its own count. The curve says
   what recall is given up for precision; with q = 0 every activation counts. The quantiles come
   from one half of the documents, recall and precision from the other.

Intervals are over features. Cost: stored activations only, no model. What comes of it is a warning
or a place to skip work; it is not a cause.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, MinLen
from jaxtyping import Bool, Float
from typing_extensions import Doc

from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site
from featureflow.statistics import bootstrap_mean, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Seeded
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.layers import NTokens, spread
from pipeline.run import Run

TITLE = "how many layers ahead a flow announces a feature"
NEEDS = ("collect", "train", "link")
QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.9)
_FEW = 8


class Config(Seeded):
    """Which features, how far ahead, and on how many tokens."""

    n_sites: Annotated[int, Ge(1), Doc("residual sites, spread over the later half")] = 3
    n_per_site: Annotated[int, Ge(1), Doc("features of each, drawn by the seed")] = 300
    distances: Annotated[tuple[int, ...], MinLen(1), Doc("layers up the flow")] = (1, 4, 8, 12)
    n_tokens: NTokens = 8192


def look(run: Run, config: Config) -> Finding:
    """Recall and precision by site and distance, and the curve of the gate. Raises UserError where
    no feature has an ancestor."""
    pairs = _pairs(run, config)
    if not pairs:
        raise UserError(
            "no feature has an ancestor so many layers up",
            where=str(run.artifact("link").path),
            expected=f"flows over {min(config.distances)} layers or more",
        )
    active = _activations(run, pairs, config)
    even = _first_half(run, config)
    rows = [row for pair in pairs for row in _of_pair(pair, active, even)]
    by_feature = pd.DataFrame(rows)
    curve = _summary(by_feature, config.seed)
    summary = curve[curve["quantile"] == 0].drop(columns="quantile").reset_index(drop=True)
    return Finding(
        tables={"summary": summary, "gate": curve, "features": by_feature},
        text=_text(summary),
        headline=_headline(summary),
        figure=lambda: lines(
            curve.assign(gate=curve["site"] + ", " + curve["ahead"].astype(str) + " ahead"),
            x="quantile",
            line="gate",
            columns={"recall": "recall", "precision": "precision"},
        ),
    )


_Pair = tuple[FeatureId, FeatureId, FeatureId, int]


def _pairs(run: Run, config: Config) -> list[_Pair]:
    """(feature, its ancestor, a random feature there, layers ahead)."""
    sites = list(run.steering.saes)
    generator = np.random.default_rng(config.seed)
    found = []
    for site in spread(sites[len(sites) // 2 :], config.n_sites):
        nodes = run.graph.nodes
        alive = nodes[(nodes["site"] == site.short) & nodes["alive"]]["latent"].to_numpy()
        for latent in generator.permutation(alive)[: config.n_per_site]:
            feature = FeatureId(site, int(latent))
            up = {
                site.layer - step.feature.site.layer: step.feature
                for step in run.graph.chain(feature, forward=False)
            }
            for ahead in config.distances:
                if ahead in up:
                    other = run.steering.random_features(up[ahead], seed=config.seed)[0]
                    found.append((feature, up[ahead], other, ahead))
    return found


def _activations(
    run: Run, pairs: list[_Pair], config: Config
) -> dict[FeatureId, Float[np.ndarray, "token"]]:
    held_out, wanted = run.held_out(config.n_tokens), {f for pair in pairs for f in pair[:3]}
    by_site: dict[Site, list[int]] = {}
    for feature in sorted(wanted, key=str):
        by_site.setdefault(feature.site, []).append(feature.latent)
    found: dict[FeatureId, Float[np.ndarray, "token"]] = {}
    for site, latents in run.each("read activations", by_site.items()):
        sae = run.saes[site]
        parts = [sae.encode(block.float())[:, latents] for block in held_out(site)]
        values = torch.cat(parts).cpu().numpy()
        found |= {FeatureId(site, latent): values[:, k] for k, latent in enumerate(latents)}
    return found


def _first_half(run: Run, config: Config) -> Bool[np.ndarray, "token"]:
    document = run.tokens.document[run.held_out(config.n_tokens).rows]
    return document <= np.median(document)


def _of_pair(
    pair: _Pair, active: dict[FeatureId, Float[np.ndarray, "token"]], half: np.ndarray
) -> list[dict[str, object]]:
    feature, ancestor, other, ahead = pair
    here = active[feature][~half] > 0
    if here.sum() < _FEW:
        return []
    rows = []
    for quantile in QUANTILES:
        row: dict[str, object] = {
            "feature": str(feature),
            "site": feature.site.short,
            "ahead": ahead,
            "ancestor_feature": str(ancestor),
            "quantile": quantile,
            "base_rate": float(here.mean()),
        }
        for name, source in (("", ancestor), ("_random", other)):
            own = active[source][half]
            limit = float(np.quantile(own[own > 0], quantile)) if quantile and own.any() else 0.0
            alarm = active[source][~half] > limit
            row[f"recall{name}"] = float(alarm[here].mean())
            row[f"precision{name}"] = float(here[alarm].mean()) if alarm.any() else np.nan
        rows.append(row)
    return rows


def _summary(by_feature: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows = []
    for (site, ahead, quantile), group in by_feature.groupby(
        ["site", "ahead", "quantile"], sort=False
    ):
        row = {"site": site, "ahead": ahead, "quantile": quantile, "n_features": len(group)}
        for name in ("recall", "precision"):
            found = bootstrap_mean(group[name].tolist(), seed=seed)
            row |= named(name, found)
        for name in ("base_rate", "recall_random", "precision_random"):
            row[name] = float(group[name].mean())
        rows.append(row)
    columns = ["site", "ahead", "quantile", "n_features", "recall", "precision", "base_rate"]
    return pd.DataFrame(rows) if rows else pd.DataFrame(columns=columns)


def _headline(summary: pd.DataFrame) -> dict[str, float]:
    by_ahead = summary.groupby("ahead")
    return {
        f"{name}_{ahead}_ahead": round(float(group[name].mean()), 4)
        for ahead, group in by_ahead
        for name in ("recall", "precision")
    }


def _text(summary: pd.DataFrame) -> str:
    said = [
        f"  {row.site}, {row.ahead} layers ahead: recall {ranged(row, 'recall')}, "
        f"precision {ranged(row, 'precision')}; base rate {row.base_rate:.3f}, "
        f"a random feature "
        f"{row.precision_random:.3f}; n {row.n_features}"
        for row in summary.itertuples()
    ]
    return (
        "How often an ancestor was active where the feature becomes active (recall), and how often "
        "the feature becomes active where its ancestor was (precision), on held-out text:\n"
        + "\n".join(said or ["  no feature is active often enough"])
    )
