"""How well do two SAEs of the *same* layer agree? No link between layers can be expected to agree
better.

1. At `n_sites` residual sites, spread over the depth, an SAE is trained again as the run's own was
   (architecture, width, steps, rate, batch size), from another seed, on the same activations.
2. The two are linked as neighbouring layers are (cosine against the siblings null, activity on
   held-out tokens), and their links' correlation of activations is the ceiling of the site.
3. The run's own links into the site are put beside it.
4. A feature `replicates` when its link to the second seed is kept and their activations correlate
   by at least `least`.

Baselines: chance (another source of the same density) and the best partner by correlation. Cost:
one training per site. Source: the seed ceiling was measured on SmolLM2 at 0.63; "Unstable
Features, Reproducible Subspaces" (arXiv 2606.12138) flags features by two seeds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Le
from matplotlib.figure import Figure
from typing_extensions import Doc

from featureflow.errors import UserError
from featureflow.figures import COLOURS, panels
from featureflow.sites import Site
from pipeline.findings import Finding
from pipeline.flow.directions import sae_directions
from pipeline.flow.edges import edges_of
from pipeline.flow.functional import FEW_FIRINGS, compare_firing, encode_tokens
from pipeline.flow.judge import judge
from pipeline.flow.match import led_by, match
from pipeline.flow.null import NullSampler, Siblings
from pipeline.flow.options import LEAST_AGREEMENT
from pipeline.flow.partner import most_shared, stand_ins
from pipeline.flow.start_null import Recipe
from pipeline.lenses.base import Seeded
from pipeline.lenses.parts.layers import NTokens, spread
from pipeline.lenses.parts.threads import side_by_side
from pipeline.run import Run
from pipeline.training.reading import normalisation_at, read_rows
from sae import Sae
from sae.batches import InMemoryBatches
from sae.trainer import Trainer, random_start, train

TITLE = "how well two seeds of one layer agree: the ceiling of links"
NEEDS = ("collect", "train", "link")
OTHER_SEED = 104_729
MOST_ROWS = 262_144
"""Activations that the second SAE is trained on, at most; they are held in memory."""


class Config(Seeded):
    """Where, on how many tokens, and from when on a feature counts as found twice."""

    n_sites: Annotated[int, Ge(1), Doc("residual sites, spread over the depth")] = 3
    n_tokens: NTokens = 8192
    steps: Annotated[
        int | None, Ge(1), Doc("optimizer steps of the second SAE; none for those of the first")
    ] = None
    fdr: Annotated[float, Ge(0), Le(1), Doc("false-discovery rate of the links")] = 0.05
    least: Annotated[
        float, Ge(0), Le(1), Doc("smallest correlation for which a feature replicates")
    ] = LEAST_AGREEMENT


def look(run: Run, config: Config) -> Finding:
    """Train second seeds, link them with the first, and compare with the run's own links."""
    sites = [site for site in run.saes if site.is_residual]
    recipes = {
        site: recipe
        for site in spread(sites, config.n_sites)
        if (recipe := Recipe.of(run.saes.description(site)["metadata"])) is not None
    }

    def again(site: Site) -> Sae:
        return trained_again(run, site, recipes[site], seed=config.seed, steps=config.steps)

    rows, columns = [], []
    seconds = side_by_side(run.context, again, list(recipes))
    for site, second in zip(recipes, seconds, strict=True):
        found, features = _compared(run, site, second, config)
        rows.append(found | _linked(run, site))
        columns.append(features)
    if not rows:
        raise UserError(
            "none of these SAEs says how it was trained",
            where=str(run.artifact("train").path),
            expected="SAEs trained by this project",
        )
    table = pd.DataFrame(rows)
    headline = {
        "ceiling_correlation": round(float(table["correlation"].median()), 4),
        "link_correlation": _rounded(table["link_correlation"].median()),
        "replicating_share": round(float(table["replicating_share"].median()), 4),
    }
    return Finding(
        tables={"sites": table},
        text=_text(headline, table),
        headline=headline,
        figure=lambda: _draw(table),
        columns=pd.concat(columns, ignore_index=True),
    )


def trained_again(
    run: Run, site: Site, recipe: Recipe, *, seed: int = 0, steps: int | None = None
) -> Sae:
    """An SAE like the run's own, from another seed."""
    kept = run.store.kept_rows("train", sites=[site])[:MOST_ROWS]
    x = read_rows(run.store, site, kept)
    source = normalisation_at(run.store, site)
    n_latents, seed = run.saes[site].n_latents, recipe.seed + OTHER_SEED + seed
    start = recipe.architecture.prepared(random_start(n_latents, x.shape[1], seed=seed))
    steps = steps or recipe.schedule.steps
    warmup = min(recipe.schedule.warmup_steps, steps // 2)
    schedule = replace(recipe.schedule, steps=steps, warmup_steps=warmup)
    trainer = Trainer(
        architecture=recipe.architecture,
        schedule=schedule,
        weights={name: weight.to(run.context.device) for name, weight in start.items()},
        source=source.to(run.context.device),
        precision=recipe.precision,
    )
    batches = InMemoryBatches(
        x.to(run.context.device), batch_size=min(recipe.batch_size, len(x)), seed=seed
    )
    label = f"second seed {site.short}"
    train(
        trainer, batches, each_step=lambda step: run.context.progress(label, step, schedule.steps)
    )
    return trainer.finish(None, {})


def _compared(
    run: Run, site: Site, second: Sae, config: Config
) -> tuple[dict[str, Any], pd.DataFrame]:
    """Links from the second seed's latents to the run's own, as between neighbouring layers."""
    held_out, first = run.held_out(config.n_tokens), run.saes[site]
    codes = [encode_tokens(sae, held_out(site)) for sae in (second, first)]
    source, target = (
        sae_directions(sae, name=site.short).restricted(torch.from_numpy(each.n_fired > 0))
        for sae, each in zip((second, first), codes, strict=True)
    )
    pair = (codes[0], codes[1])
    chosen = torch.from_numpy(most_shared(source, target, pair))
    edges = edges_of(led_by(match(source, target, k=2), chosen, source, target), top_k=1)
    rng = np.random.default_rng([config.seed, site.layer])
    cofiring = compare_firing(
        codes[0], codes[1], (edges.source, edges.target), rng=rng, n_chance=8192
    )
    null = NullSampler(choice=Siblings(), n=8192).sample(
        source, target, torch.Generator().manual_seed(config.seed + site.layer)
    )
    few = codes[1].n_fired < FEW_FIRINGS
    others = list(stand_ins(source, target, pair, edges))
    evidence = judge(
        edges, [null], cofiring, few, stand_ins=others, fdr=config.fdr, same_start=False
    )
    top = edges.top & ~few[edges.target]
    correlation = cofiring.links.pearson
    kept = edges.top & (evidence.q <= config.fdr)
    twice = kept & (correlation >= config.least)
    agreed = np.full(first.n_latents, np.nan)
    agreed[edges.target[edges.top]] = correlation[edges.top]
    replicates = np.zeros(first.n_latents, dtype=bool)
    replicates[edges.target[twice]] = True
    living = codes[1].n_fired > 0
    return {
        "site": site.short,
        "n_features": int(living.sum()),
        "kept_share": float(kept[edges.top].mean()),
        "correlation": float(np.median(correlation[top])),
        "best_correlation": float(np.median(cofiring.best.pearson[edges.target[top]])),
        "chance_p99": float(np.quantile(cofiring.chance.pearson, 0.99)),
        "cosine": float(np.median(edges.cosine[top])),
        "replicating_share": float(replicates[living].mean()),
    }, pd.DataFrame(
        {
            "feature": [f"{site.short}/{latent}" for latent in np.flatnonzero(living)],
            "replicates": replicates[living],
            "replicate_correlation": agreed[living],
        }
    )


def _linked(run: Run, site: Site) -> dict[str, Any]:
    """The run's own best links into the site."""
    pairs = run.graph.pairs
    into = pairs[(pairs["target_site"] == site.short) & (pairs["relation"] == "residual")]
    if into.empty:
        return {"link_correlation": np.nan, "link_kept_share": np.nan}
    pair = into.iloc[0]
    kept = float(pair["n_links"]) / max(int(pair["n_targets"]), 1)
    return {"link_correlation": float(pair["pearson_median"]), "link_kept_share": kept}


def _text(headline: dict[str, Any], table: pd.DataFrame) -> str:
    link = headline["link_correlation"]
    beside = "" if link is None else f" Links of neighbouring layers there correlate by {link:.2f}."
    return (
        f"Two seeds of one layer correlate by {headline['ceiling_correlation']:.2f} (median over "
        f"{len(table)} sites; chance, 99th percentile: {table['chance_p99'].median():.2f})."
        f"{beside} {headline['replicating_share']:.0%} of the living features were found twice. "
        "A link between layers that agrees as well as two seeds do is as good as the SAEs allow; "
        "one that agrees better owes it to a common start."
    )


def _draw(table: pd.DataFrame) -> Figure:
    figure, axes = panels(1, 2, width=4.5)
    place = np.arange(len(table))
    names = {"correlation": "two seeds", "link_correlation": "link from the layer before"}
    for i, (column, label) in enumerate(names.items()):
        axes[0].bar(place + 0.35 * i, table[column], width=0.33, color=COLOURS[i], label=label)
    axes[0].plot(place + 0.17, table["chance_p99"], "k_", markersize=18, label="chance, 99 %")
    axes[0].set_ylabel("correlation of activations, median")
    axes[0].legend(frameon=False, fontsize=7)
    axes[1].bar(place, table["replicating_share"], color=COLOURS[0])
    axes[1].set_ylabel("share of features found twice")
    for axis in axes:
        axis.set_xticks(place + 0.17 * (axis is axes[0]), table["site"])
        axis.set_xlabel("site")
    return figure


def _rounded(value: float) -> float | None:
    return None if pd.isna(value) else round(float(value), 4)
