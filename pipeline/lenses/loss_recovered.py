"""How much of the model's loss survives when an activation is replaced by its SAE's reconstruction?

1. Run the model on held-out contexts and keep the activations at every site wanted.
2. For each site and each replacement (reconstruction, zero, mean), put the replacement at the
   ordinary positions, leave BOS, special and sink positions as they are, and run the model from
   that site on: the blocks before it are skipped, because what they would compute is known
   (`data/model/partial_forward.py`).
3. Sum cross-entropy of the next token and KL(original ‖ replaced) by document; report what share of
   the ablation's damage the reconstruction avoids, with bootstrap intervals over documents.

    CE recovered = (CE_ablated − CE_replaced) / (CE_ablated − CE_original)
    KL recovered = 1 − KL_replaced / KL_ablated

Cost: one forward pass per batch, and for each site 2 + (number of its SAEs) passes over the blocks
after it. Memory: batches are cut so that logits take no more than `_LOGIT_BYTES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from typing_extensions import Doc

from data.model.language_model import LanguageModel
from data.model.partial_forward import continued_from
from featureflow.errors import UserError
from featureflow.progress import Progress, silent
from featureflow.sites import Site, parse_site, residual_sites
from featureflow.statistics import bootstrap_ratio
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.candidates import Others, digests_of_others, find_candidates, used_later
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.held_out import Contexts, choose_contexts
from pipeline.run import Run
from sae import Sae

TITLE = "what the model loses when it reads reconstructions instead of activations"
GROUP = "evaluation"
NEEDS = ("collect", "train")
_LOGIT_BYTES = 256 << 20
ORIGINAL, ABLATIONS = "original", ("zero", "mean")


class Config(Sampled):
    """On how much, and where, the model is run."""

    n_tokens: Annotated[int, Ge(1), Doc("held-out tokens run through the model")] = 2048
    sites: Annotated[
        tuple[str, ...], Doc("sites where the model is run; empty: n_sites of them")
    ] = ()
    n_sites: Annotated[
        int,
        Ge(1),
        Doc("residual sites where the model is run, spread over the depth, when none are named"),
    ] = 6
    n_resamples: Annotated[int, Ge(10), Doc("bootstrap resamples of documents")] = 1000
    others: Others = ()


def outside_digests(config: Config) -> dict[str, str]:
    """The files of `others`: the result depends on them too."""
    return digests_of_others(config.others)


@dataclass(frozen=True, kw_only=True, eq=False)
class Spliced:
    """An SAE to splice in at `site`. A transcoder reads another site, `reads`. `mean` is the site's
    mean."""

    name: str
    site: Site
    sae: Sae
    mean: Float[Tensor, "d_out"]
    reads: Site | None = None


def look(run: Run, config: Config) -> Finding:
    """One row an SAE at the chosen sites: losses in nats per token, and shares recovered."""
    candidates = find_candidates(run, config.others)
    sites = _chosen_sites(config, list(dict.fromkeys(c.site for c in candidates)))
    chosen = [candidate for candidate in candidates if candidate.site in sites]
    losses = measure_recovery(
        run.model,
        [
            Spliced(
                name=str(candidate.columns["name"]),
                site=candidate.site,
                sae=candidate.load(run.context.device),
                mean=torch.from_numpy(run.store.statistics(candidate.site).mean),
                reads=candidate.reads,
            )
            for candidate in chosen
        ],
        choose_contexts(run, config, config.n_tokens),
        n_resamples=config.n_resamples,
        seed=config.seed,
        progress=run.context.progress,
    )
    table = pd.DataFrame([c.columns | losses[str(c.columns["name"])] for c in chosen])
    used = used_later(table)
    shares = used[[f"ce_recovered_{against}" for against in ABLATIONS]].astype(float)
    headline = {
        f"{name}_median": round(float(value), 4)
        for name, value in shares.median().items()
        if np.isfinite(value)
    }
    return Finding(
        tables={"losses": table},
        figure=lambda: lines(
            used,
            x="layer",
            line="kind",
            columns={
                f"ce_recovered_{against}": f"CE recovered against {against} ablation"
                for against in ABLATIONS
            },
        ),
        text=_text(table, headline),
        headline={"n_sites": len(sites)} | headline,
    )


def _chosen_sites(config: Config, available: list[Site]) -> set[Site]:
    if config.sites:
        wanted = {parse_site(name) for name in config.sites}
        if missing := sorted(wanted - set(available)):
            raise UserError(
                "no dictionary to run the model with",
                where="lenses.loss-recovered.sites",
                found=", ".join(site.short for site in missing),
                expected=", ".join(site.short for site in available),
            )
        return wanted
    stream = residual_sites(available) or available
    spread = np.linspace(0, len(stream) - 1, min(config.n_sites, len(stream)))
    return {stream[round(index)] for index in spread}


def _text(table: pd.DataFrame, headline: dict[str, float]) -> str:
    first = table.iloc[0]
    shares = [
        f"{headline[f'ce_recovered_{against}_median']} against {against} ablation"
        for against in ABLATIONS
        if f"ce_recovered_{against}_median" in headline
    ]
    said = (
        f"The median SAE recovers {' and '.join(shares)} of the loss that the ablation costs."
        if shares
        else "The ablations do no harm to this model, so there is no share to recover."
    )
    return (
        f"{len(table)} SAEs at {table['site'].nunique()} sites, {first['ce_n_tokens']:.0f} tokens "
        f"of {first['ce_n_documents']:.0f} held-out documents,\n"
        f"original loss {first['ce_original']:.3f} nats. {said}\n"
        "1 means that the model does as well with the reconstruction; one site is replaced at a "
        "time."
    )


@torch.no_grad()
def measure_recovery(
    model: LanguageModel,
    spliced: Sequence[Spliced],
    contexts: Contexts,
    *,
    n_resamples: int,
    seed: int,
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """By name: `ce_…` and `kl_…` in nats per token over the counted positions, and the shares
    recovered with intervals. A share is NaN where the ablation does no damage."""
    documents, n = torch.unique(contexts.documents[contexts.counted], return_counts=True)
    sums: dict[tuple[Site | None, str], Float[np.ndarray, "document 2"]] = {}
    sites = tuple(dict.fromkeys(each.site for each in spliced))
    before = {site: Site(site.layer, "resid_pre") for site in sites}
    reads = [each.reads for each in spliced if each.reads is not None]
    recorded = tuple(dict.fromkeys([*sites, *before.values(), *reads]))
    size = max(1, _LOGIT_BYTES // (4 * contexts.ids.shape[1] * model.d_vocab))
    for start in range(0, len(contexts.ids), size):
        progress("splice reconstructions", start, len(contexts.ids))
        rows = slice(start, start + size)
        ids, counted = contexts.ids[rows], contexts.counted[rows]
        where = rearrange(contexts.spliced[rows], "batch position -> batch position 1")
        place = torch.searchsorted(documents, contexts.documents[rows][counted]).numpy()
        with model.recorded(recorded) as activations:
            logits = model.logits(ids)
        seen = dict(activations)
        losses = _Losses(logits, ids, counted)

        def add(
            run: tuple[Site | None, str],
            logits: Tensor,
            losses: _Losses = losses,
            place: np.ndarray = place,
        ) -> None:
            total = sums.setdefault(run, np.zeros((len(documents), 2)))
            np.add.at(total, place, losses.of(logits))

        add((None, ORIGINAL), logits)
        for site in sites:
            here = [each for each in spliced if each.site == site]
            mean, original = here[0].mean, seen[site]
            replacements = {"zero": torch.zeros_like(mean), "mean": mean} | {
                each.name: each.sae(seen[each.reads or site]) for each in here
            }
            for name, value in replacements.items():
                put = torch.where(where.to(original.device), value.to(original), original)
                add((site, name), logits_with(model, ids, site, put, seen[before[site]]))
    progress("splice reconstructions", len(contexts.ids), len(contexts.ids))
    found = {}
    for each in spliced:
        runs = {name: sums[each.site, name] for name in ABLATIONS}
        runs |= {ORIGINAL: sums[None, ORIGINAL], "spliced": sums[each.site, each.name]}
        found[each.name] = _recovery(runs, int(n.sum()), n_resamples=n_resamples, seed=seed)
    return found


def logits_with(
    model: LanguageModel,
    ids: Int[Tensor, "batch position"],
    site: Site,
    value: Float[Tensor, "batch position d_model"],
    resid_pre: Float[Tensor, "batch position d_model"],
) -> Float[Tensor, "batch position vocab"]:
    """Logits when the activation at `site` is `value`. `resid_pre` is what the stream held before
    the site's block; blocks that come before are not run."""
    is_stream = site.kind in ("resid_pre", "resid_post")
    last_skipped = site.layer if site.kind == "resid_post" else site.layer - 1
    with ExitStack() as stack:
        if last_skipped >= 0:
            stack.enter_context(
                continued_from(model, last_skipped, value if is_stream else resid_pre)
            )
        if last_skipped < 0 or not is_stream:
            stack.enter_context(model.edited({site: lambda _: value.to(model.device, model.dtype)}))
        return model.logits(ids)


class _Losses:
    """Losses at the counted positions of a batch, beside those of the untouched run."""

    def __init__(self, logits: Tensor, ids: Tensor, counted: Bool[Tensor, "batch position"]):
        self.counted = counted.to(logits.device)
        self.targets = ids.roll(-1, dims=1)[counted].to(logits.device)
        self.original = logits[self.counted].float()
        self.log_sum = self.original.logsumexp(-1)
        self.p = (self.original - self.log_sum[:, None]).exp_()

    def of(self, logits: Float[Tensor, "batch position vocab"]) -> Float[np.ndarray, "counted 2"]:
        """CE and KL, in nats, without the log-probabilities of all tokens: both follow from the
        logits and their log-sum."""
        q = logits[self.counted].float()
        log_sum = q.logsumexp(-1)
        ce = log_sum - q.gather(1, self.targets[:, None])[:, 0]
        kl = torch.linalg.vecdot(self.p, self.original - q) + log_sum - self.log_sum
        return torch.stack([ce, kl.clamp_min(0)], dim=1).double().cpu().numpy()


def _recovery(
    runs: dict[str, Float[np.ndarray, "document 2"]], n: int, *, n_resamples: int, seed: int
) -> dict[str, Any]:
    row: dict[str, Any] = {"ce_n_tokens": n, "ce_n_documents": len(runs[ORIGINAL])}
    means = {name: run.sum(0) / n for name, run in runs.items()}
    row |= {f"ce_{name}": float(means[name][0]) for name in runs}
    row |= {f"kl_{name}": float(means[name][1]) for name in runs if name != ORIGINAL}
    for against in ABLATIONS:
        share, low, high = float("nan"), float("nan"), float("nan")
        ablated = runs[against][:, 0]
        kept, damage = ablated - runs["spliced"][:, 0], ablated - runs[ORIGINAL][:, 0]
        if damage.sum() > 0:
            found = bootstrap_ratio(kept, damage, seed=seed, n=n_resamples)
            share, low, high = found.mean, found.low, found.high
        name, kl = f"ce_recovered_{against}", means[against][1]
        row |= {name: share, f"{name}_low": low, f"{name}_high": high}
        row[f"kl_recovered_{against}"] = float(1 - means["spliced"][1] / kl) if kl > 0 else np.nan
    return row
