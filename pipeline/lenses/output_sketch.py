"""What does it cost, in nats of the output, to push the stream at each layer in each direction?

1. On neutral text the output's Fisher matrix for shifts of all residual sites from a third of the
   depth on is estimated by sampled backward passes (steering/design.py). The estimate is the lens'
   array `rows`; `steer design` reads it, so a run makes it once.
2. Per site: KL of a push of a tenth of the median norm in a random direction and along a feature
   (median over its features), as the sketch predicts.
3. How far first order holds: for random features, the real KL of a push that should cost
   `check_dose`, over the predicted.

Cost: one forward pass and a backward pass a sample. Source: KL ≈ ½ w'Fw; FishBack (arXiv
2605.17231) uses the same metric, its text was not read here.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Gt, Le
from typing_extensions import Doc

from data.concepts.prompts import read_prompts
from featureflow.sites import FeatureId, Site
from pipeline.findings import Finding
from pipeline.lenses.base import Seeded
from pipeline.lenses.parts.charts import lines
from pipeline.run import Run
from steering.design import Sketch, sketch_of
from steering.dose import NeutralText, measure
from steering.plan import Node, Plan

TITLE = "what a push costs at each layer, in nats of the output; the sketch that designs use"
NEEDS = ("collect", "train")
_PUSH = 0.1


class Config(Seeded):
    """On how much text, with how many samples, and from which depth on."""

    n_texts: Annotated[int, Ge(2), Doc("neutral texts")] = 24
    n_tokens: Annotated[int, Ge(4), Doc("tokens of each")] = 32
    n_samples: Annotated[int, Ge(2), Doc("backward passes")] = 24
    depth: Annotated[
        float, Ge(0), Le(1), Doc("sites from this share of the depth on; first order fails before")
    ] = 1 / 3
    n_checks: Annotated[int, Ge(0), Doc("features a site whose predicted KL is checked")] = 1
    check_dose: Annotated[float, Gt(0), Doc("nats that a checked push should cost")] = 0.1


def look(run: Run, config: Config) -> Finding:
    """Sketch, predict and check."""
    model, saes = run.exact_model, run.steering.saes
    sites = [site for site in saes if site.layer >= config.depth * (model.n_layers - 1)]
    texts = read_prompts().neutral_texts[: config.n_texts]
    text = NeutralText.prepare(model, texts, n_tokens=config.n_tokens)
    sketch = sketch_of(
        model,
        text.batch,
        sites,
        n_samples=config.n_samples,
        seed=config.seed,
        progress=run.context.progress,
    )
    table = pd.DataFrame(_row(run, sketch, site, text, config) for site in sites)
    ratio = table["measured_over_predicted"].median()
    headline = {"measured_over_predicted": round(float(ratio), 3), "n_rows": len(sketch.rows)}
    return Finding(
        tables={"sites": table},
        text=_text(table, headline, config),
        headline=headline,
        figure=lambda: lines(
            table.assign(push="a tenth of the median norm"),
            x="layer",
            line="push",
            columns={"kl_random": "KL, random direction", "kl_along": "KL, along a feature"},
        ),
        arrays={"rows": sketch.rows.numpy(), "layers": np.array([site.layer for site in sites])},
    )


def read_sketch(run: Run) -> Sketch:
    """The run's sketch. Raises UserError that names the command when there is none."""
    arrays = run.lens("output-sketch").arrays
    sites = tuple(Site(int(layer), "resid_post") for layer in arrays["layers"])
    return Sketch(sites=sites, rows=torch.from_numpy(arrays["rows"]))


def _row(
    run: Run, sketch: Sketch, site: Site, text: NeutralText, config: Config
) -> dict[str, float | str]:
    saes, norm = run.steering.saes, run.steering.norms[site]
    units = saes[site].W_dec.float() / saes[site].W_dec.float().norm(dim=-1, keepdim=True)
    cost = sketch.cost(site, units).numpy()
    trace = float(sketch.rows[:, sketch.sites.index(site)].square().sum())
    generator = np.random.default_rng([config.seed, site.layer])
    ratios = []
    for latent in generator.permutation(len(cost))[: config.n_checks]:
        size = (2 * config.check_dose) ** 0.5 / max(float(cost[latent]), 1e-12)
        node = Node(at=str(FeatureId(site, int(latent))))
        plan = Plan(nodes=(node,), strength=size)
        kl = measure(run.exact_model, saes, plan, text, monitor=False).kl
        ratios.append(kl / config.check_dose)
    return {
        "site": site.short,
        "layer": site.layer,
        "median_norm": norm,
        "kl_random": 0.5 * (_PUSH * norm) ** 2 * trace / units.shape[1],
        "kl_along": 0.5 * float(np.median((_PUSH * norm * cost) ** 2)),
        "measured_over_predicted": float(np.median(ratios)) if ratios else np.nan,
    }


def _text(table: pd.DataFrame, headline: dict[str, float], config: Config) -> str:
    dear = table.loc[table["kl_along"].idxmax()]
    return (
        f"A push of a tenth of the median norm along a feature costs most at {dear['site']}: "
        f"{dear['kl_along']:.3g} nats a token (median over its features; a random direction "
        f"{dear['kl_random']:.3g}). Pushes that should cost {config.check_dose:g} nats really cost "
        f"{headline['measured_over_predicted']:.2f} times that (median over sites; "
        f"{table['measured_over_predicted'].max():.2f} at worst). First order ranks features; the "
        "strength of a plan is calibrated with real passes."
    )
