"""What is measured on every trace, so that a reader sees how far it can be trusted.

identity        logits with the hooks on and nothing removed, against a plain run
sum             Σ of a cut's parts against the stream
completeness    integrated gradients (5 steps) against really removing the middle cut's features
keep            at the middle cut, only the features that hold 80 % of Σ|score|: share of the effect
                that stays (F), against the largest activations and random ones, equally many
without         at the middle cut, without the 20 strongest features: the same comparison
replacement, completeness score    in place of the three before, through transcoders
                (pipeline/trace/transcoders.py)
supernodes      prediction against removal: rank correlation and Σ|error| / Σ|real|
control         mean |effect| of the removed supernodes against equally many random active features
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch

from featureflow.progress import Progress, silent
from featureflow.sites import Site
from pipeline.trace.stream import FEATURE, Edited, Traced, continued, edited, run_model
from pipeline.trace.supernodes import strongest
from pipeline.trace.transcoders import direct_effects

_IG_STEPS, _KEPT, _N_WITHOUT = 5, 0.8, 20


def checks_of(
    found: Traced, supernodes: pd.DataFrame, gone: Edited, *, seed: int, progress: Progress = silent
) -> pd.DataFrame:
    """One row a check: `check`, `value`, `note`."""
    middle = found.cuts[len(found.cuts) // 2]
    rows = [*_identity(found, gone), *_predictions(supernodes)]
    if found.is_linear:
        rows[2:2] = _graph_scores(found)
    else:
        kept = _keep_and_without(found, middle, np.random.default_rng(seed), progress)
        rows[2:2] = [completeness(found, middle), *kept]
    return pd.DataFrame(rows, columns=["check", "value", "note"])


def _identity(found: Traced, gone: Edited) -> Iterator[tuple[str, float, str]]:
    with torch.no_grad():
        plain = run_model(found.model, [found.ids], {})
    yield "identity", float((plain[0] - gone.logits[0]).abs().max()), "≤ 1e-4 of a logit"
    worst = max(_sum_error(found, site) for site in found.cuts)
    yield "sum", worst, "≤ 1e-4: features + error + bias + sink against the stream, times gradient"


def _sum_error(found: Traced, site: Site) -> float:
    nodes = found.nodes[found.nodes["cut"] == site.short]
    whole = float((found.gradient[site] * found.stream[site]).sum())
    size = max(float(nodes["score"].abs().sum()), 1e-12)
    return abs(float(nodes["score"].sum()) - whole) / size


def _graph_scores(found: Traced) -> Iterator[tuple[str, float, str]]:
    graph = direct_effects(found)
    note = f"graph of the {len(graph.features)} features of the largest score, as circuit-tracer's"
    yield "replacement score", graph.replacement, f"of the tokens' influence, errors apart; {note}"
    yield "completeness score", graph.completeness, f"of the nodes' inputs, no error; {note}"


def completeness(found: Traced, site: Site) -> tuple[str, float, str]:
    """Integrated gradients of a cut's features against their removal. The features' part of the
    stream is scaled to 0 and to the middles of five steps."""
    nodes = found.nodes[(found.nodes["cut"] == site.short) & (found.nodes["kind"] == FEATURE)]
    part = torch.zeros_like(found.stream[site][0])
    token, z = torch.tensor(nodes["token"].tolist()), torch.tensor(nodes["z"].tolist())
    rows = found.saes[site].W_dec[nodes["latent"].tolist()].detach()
    part.index_put_((token,), z[:, None] * rows, accumulate=True)
    alpha = torch.tensor([0.0, *((np.arange(_IG_STEPS) + 0.5) / _IG_STEPS)]).float()
    kept: dict[Site, torch.Tensor] = {}

    def scale(h: torch.Tensor) -> torch.Tensor:
        kept[site] = (h.detach() - (1 - alpha)[:, None, None] * part).requires_grad_()
        return kept[site]

    edits = {site: scale}
    target = found.target.feature
    if target is not None and target.site != site:
        edits[target.site] = lambda h: kept.setdefault(target.site, h)
    with torch.enable_grad(), continued(found, site, len(alpha)):
        logits = run_model(found.model, [found.ids] * len(alpha), edits)
        y = found.target.value(logits, kept, found.saes)
        (g,) = torch.autograd.grad(y.sum(), kept[site])
    real = found.y - float(y[0].detach())
    guess = float((g[1:] * part).sum() / _IG_STEPS)
    note = f"≤ 0.1: |integrated gradients − removal| / |removal| at {site.short}; {guess:+.2f}, "
    return "completeness", abs(guess - real) / max(abs(real), 1e-9), note + f"really {real:+.2f}"


def _keep_and_without(
    found: Traced, site: Site, generator: np.random.Generator, progress: Progress
) -> Iterator[tuple[str, float, str]]:
    here = found.nodes[(found.nodes["cut"] == site.short) & (found.nodes["kind"] == FEATURE)]
    kept = strongest(here, _KEPT).index
    n, n_without = len(kept), min(_N_WITHOUT, len(here))
    by_score = here["score"].abs().sort_values(ascending=False).index
    by_z = here["z"].sort_values(ascending=False).index
    random = generator.permutation(here.index)
    orders = {"score": by_score, "largest activations": by_z, "random": random}
    sets = [here, here.iloc[:0]]
    sets += [here.drop(order[:n]) for order in orders.values()]
    sets += [here.loc[order[:n_without]] for order in orders.values()]
    gone = edited(found, sets, progress=progress)
    y, top = gone.y.tolist(), gone.logits.argmax(-1).tolist()
    whole = y[1] - y[0]
    for number, name in enumerate(orders):
        f = (y[2 + number] - y[0]) / whole if whole else float("nan")
        stays = "stays" if top[2 + number] == top[1] else "goes"
        yield f"keep, {name}", f, f"{n} of {len(here)} features of {site.short}; top token {stays}"
    for number, name in enumerate(orders, len(orders)):
        stays = "stays" if top[2 + number] == top[1] else "goes"
        note = f"change of y without {n_without} features of {site.short}; top token {stays}"
        yield f"without, {name}", y[1] - y[2 + number], note


def _predictions(supernodes: pd.DataFrame) -> Iterator[tuple[str, float, str]]:
    real, guess = supernodes["removed"], supernodes["predicted"]
    if len(supernodes) > 2:
        yield "supernodes, rank", float(real.corr(guess, method="spearman")), "Spearman"
    size = max(float(real.abs().sum()), 1e-12)
    yield "supernodes, size", float((real - guess).abs().sum()) / size, "Σ|error| / Σ|real|"
    control = max(float(supernodes["control"].abs().mean()), 1e-12)
    note = "times the mean |effect| of equally many random active features"
    yield "control", float(real.abs().mean()) / control, note
