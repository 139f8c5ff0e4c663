"""Which prediction of a feature's effect on words holds when the feature is really pushed?

1. At `n_layers` sites, features that are active on held-out text are added to the stream at
   `strength` times the median norm, on all ordinary positions of held-out contexts. The mean change
   of log-probability of every token of the corpus is the truth.
2. Four predictions name ten tokens each: *direct* u(d); *carried* u(d A), by the regression of
   `translators`; *jacobian* u(J d), the mean derivative of the last layer by this one on the same
   token; *permuted*, the carried tokens of another feature.
3. The score is the share of the ten among the 50 most raised tokens, and the rank correlation over
   all tokens of the corpus; intervals over features.

The Jacobian comes from one backward pass a batch: every token's last layer is read along a random
direction r, the gradient g at the same token is regressed on r, and other tokens' parts average
out. Cost: a forward pass over `n_contexts` contexts a feature; a backward pass over
`n_jacobian_tokens`. Source: the check of "Jump to Conclusions" (arXiv 2303.09435) by an
intervention, which the paper does not make (abstract only read here).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Doc

from data.model.partial_forward import continued_from
from featureflow.errors import UserError
from featureflow.sites import Site
from featureflow.statistics import bootstrap_mean, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.gradients import gradients
from pipeline.lenses.parts.held_out import Contexts, choose_contexts
from pipeline.lenses.parts.layers import spread
from pipeline.lenses.parts.read_out import N_TOKENS, vocabulary_of
from pipeline.lenses.translators import fit
from pipeline.run import Run

TITLE = "which words a feature raises when it is really pushed, against three predictions"
NEEDS = ("collect", "train", "translators")
WAYS = ("direct", "carried", "jacobian", "permuted")
N_RAISED = 50
_BATCH = 4


class Config(Sampled):
    """How many features are pushed, how strongly, and on how much text."""

    n_layers: Annotated[int, Ge(1), Doc("sites, spread over the depth")] = 3
    n_features: Annotated[int, Ge(2), Doc("features pushed at each site")] = 20
    n_contexts: Annotated[int, Ge(1), Doc("held-out contexts that they are pushed in")] = 4
    strength: Annotated[float, Gt(0), Doc("of the push, in median norms of the site")] = 0.3
    n_jacobian_tokens: Annotated[int, Ge(64), Doc("tokens that the Jacobian is read on")] = 8192


def look(run: Run, config: Config) -> Finding:
    """Scores of the predictions, by site. Raises UserError when no site lies before the last."""
    maps = run.lens("translators").arrays
    sites = [site for site in run.saes if site.kind == "resid_post" and site.short in maps]
    if not sites:
        raise UserError("no SAE lies before the last layer", where=str(run.root))
    sites = spread(sites, config.n_layers)
    jacobian = jacobians(run, sites, config)
    contexts = choose_contexts(run, config, config.n_contexts * run.store.n_context)
    rows = []
    for site in sites:
        rows += _at_site(run, site, maps[site.short], jacobian[site], contexts, config)
    table = pd.DataFrame(rows)
    summary = _summary(table, config.seed)
    best = summary.groupby("way")["raised"].mean()
    return Finding(
        tables={"summary": summary, "features": table},
        arrays={f"{site.short}.jacobian": J.numpy() for site, J in jacobian.items()},
        figure=lambda: bars(
            summary,
            by=["site", "way"],
            columns={"raised": "share among the 50 most raised", "spearman": "rank correlation"},
        ),
        text=_text(summary, config),
        headline={f"raised {way}": round(float(best[way]), 4) for way in WAYS},
    )


def jacobians(
    run: Run, sites: Sequence[Site], config: Config
) -> dict[Site, Float[Tensor, "d_model d_model"]]:
    """For each site the map J with which a change d there becomes d J at the last layer."""
    last = Site(run.model.n_layers - 1, "resid_post")
    ids = torch.from_numpy(
        run.tokens.id[: config.n_jacobian_tokens // run.store.n_context * run.store.n_context]
        .astype(np.int64)
        .reshape(-1, run.store.n_context)
    )
    ids = ids if len(ids) else torch.from_numpy(run.tokens.id[None, : run.store.n_context]).long()
    generator = torch.Generator().manual_seed(config.seed)
    read: list[Tensor] = []
    seen: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for done, batch in enumerate(ids.split(_BATCH)):
        run.context.progress("read the Jacobian", done * _BATCH, len(ids))
        r = torch.randn((*batch.shape, run.model.d_model), generator=generator)
        r[:, :1] = 0  # the start token is a sink

        def along(_: Tensor, stream: Any, r: Tensor = r) -> Tensor:
            return (stream[last] * r).sum()

        _, found = gradients(run.exact_model, batch, [*sites, last], along)
        read.append(r[:, 1:].flatten(0, 1))
        for site in sites:
            seen[site].append(found[site][:, 1:].flatten(0, 1))
    fitted = fit(lambda: iter(read), *((lambda site=site: iter(seen[site])) for site in sites))
    return {site: A.T.float() for site, (A, _) in zip(sites, fitted, strict=True)}


def _at_site(
    run: Run,
    site: Site,
    A: np.ndarray,
    J: Float[Tensor, "d_model d_model"],
    contexts: Contexts,
    config: Config,
) -> list[dict[str, Any]]:
    sae, vocabulary, model = run.saes[site], vocabulary_of(run), run.exact_model
    ids = contexts.ids[: config.n_contexts]
    with torch.no_grad():
        h = model.activations(ids, [site])[site].float()
    spliced = contexts.spliced[: config.n_contexts]
    active = (sae.encode(h[spliced]) > 0).sum(0)
    rng = np.random.default_rng([config.seed, site.layer])
    living = rng.permutation(np.flatnonzero(active.numpy() > 0))[: config.n_features]
    d = sae.W_dec.detach().float()[torch.from_numpy(living)]
    sent = {"direct": d, "carried": d @ torch.from_numpy(A), "jacobian": d @ J}
    sent["permuted"] = sent["carried"].roll(1, 0)
    norm = h[spliced].norm(dim=-1).median()
    clean = _mean_log_p(model, site, h, spliced, vocabulary.seen)
    rows = []
    for number, latent in run.each(f"push {site.short}", list(enumerate(living))):
        moved = h + config.strength * norm * d[number] * spliced[..., None]
        change = _mean_log_p(model, site, moved, spliced, vocabulary.seen) - clean
        raised = vocabulary.seen[change.topk(min(N_RAISED, len(change))).indices.numpy()]
        for way, direction in sent.items():
            ten = vocabulary.promoted(direction[number : number + 1])[0]
            scores = vocabulary.scores(direction[number : number + 1])[0]
            rows.append(
                {
                    "feature": f"{site.short}/{latent}",
                    "site": site.short,
                    "way": way,
                    "raised": float(np.isin(ten, raised).sum() / N_TOKENS),
                    "spearman": float(scipy.stats.spearmanr(scores, change).statistic),
                }
            )
    return rows


@torch.no_grad()
def _mean_log_p(
    model: Any, site: Site, h: Tensor, spliced: Tensor, seen: np.ndarray
) -> Float[Tensor, "seen"]:
    """Mean log-probability of the tokens `seen`, over the ordinary positions."""
    total, n = torch.zeros(len(seen)), 0
    for part, keep in zip(h.split(_BATCH), spliced.split(_BATCH), strict=True):
        with continued_from(model, site.layer, part):
            logits = model.logits(torch.zeros(part.shape[:2], dtype=torch.int64))
        log_p = logits[keep].float().log_softmax(-1)[:, torch.from_numpy(seen)]
        total, n = total + log_p.sum(0), n + len(log_p)
    return total / max(n, 1)


def _summary(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows = []
    for (site, way), part in table.groupby(["site", "way"], sort=False):
        row: dict[str, Any] = {"site": site, "way": way, "n_features": len(part)}
        for column in ("raised", "spearman"):
            row |= named(column, bootstrap_mean(part[column].tolist(), seed=seed))
        rows.append(row)
    return pd.DataFrame(rows)


def _text(summary: pd.DataFrame, config: Config) -> str:
    said = [
        f"  {row.site}, {row.way}: {ranged(row, 'raised')}, rank correlation {row.spearman:.2f}"
        for row in summary.itertuples()
    ]
    return (
        "The paper makes no such test (abstract only read here).\n\n"
        f"What this model shows: share of ten predicted tokens among the {N_RAISED} most raised by "
        f"a push of {config.strength:g} median norms,\n95 % intervals over features "
        "(permuted: the tokens of another feature)\n" + "\n".join(said)
    )
