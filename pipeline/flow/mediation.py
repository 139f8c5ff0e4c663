"""How much of what an ancestor does to a feature goes through the chain between them, and how much
of it does the model do? Path patching along one chain.

A chain is one latent a site, from the ancestor a at its site S to the target t: a → f₁ → … → fₘ →
t. On a token where both ends are active, the model goes on from S several times, changed on that
token only:

1. `removed`           a is taken out, h ← h − z_a v_a; the chain's latents are read on the way
2. `copies_removed`    a is taken out, and at every site between the chain's latent too
3. `chain_held`        a is taken out, and at every site between the chain's latent is put back to
   its undisturbed value, h ← h + (z_clean − z) v; what t loses now went around the chain
4. `chain_alone`       a stays, and the chain's latents are put to the values of run 1
5. `random_held`, `strongest_held`         as 3, with another active latent at each site
6. `random_removed`, `strongest_removed`   as 1, with another active latent of S, not a

Every run has an arm without the model (`…_no_model`): the same edits on the undisturbed stream, as
if every block passed them on unchanged. Only the difference is what the blocks do. Of the removals
there is also `…_blocks`: the target is read with the skip connection's part, −z_a v_a, put back, so
that nothing but what the blocks write can change it; without the model that is zero.

The share of the effect that needs the chain is 1 − Σ change(3) / Σ change(1); that of the chain
alone is Σ change(4) / Σ change(1). Putting a direction back into a skip connection undoes its
removal by arithmetic, so both must be read against the arm without the model. Sums over targets, so
that targets which the ancestor hardly matters to do not divide by nothing. Every edit keeps the
dictionaries' errors in the stream. Since a target sees only its own and earlier tokens, and only
its own is changed, no effect leaves that token.

Cost: eight rows of the context per target, through the blocks from S to the target. Source: path
patching (Goldowsky-Dill et al., arXiv 2304.05969), here with dictionary latents as the nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from data.model.language_model import LanguageModel
from data.model.partial_forward import continued_from
from featureflow.progress import Progress, silent
from featureflow.sites import Site
from featureflow.statistics import bootstrap
from pipeline.flow.causal import Contexts
from sae import Sae, SparseCodes

CHAIN_HELD, CHAIN_ALONE, COPIES = "chain_held", "chain_alone", "copies_removed"
REMOVALS = ("removed", "random_removed", "strongest_removed")
HELD = ("random_held", "strongest_held")
RUNS = ("removed", COPIES, CHAIN_HELD, CHAIN_ALONE, *HELD, *REMOVALS[1:])
COLUMNS = (
    *(f"change_{run}" for run in RUNS),
    *(f"change_{run}_no_model" for run in RUNS),
    *(f"change_{run}_blocks" for run in REMOVALS),
)
Edits = Mapping[Site, Callable[[Tensor], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Chains:
    """For every latent of the last site, its chain: `latent[i]` are the latents at `sites[i]`, -1
    where there is none. The last row counts up: a target is its own end."""

    sites: tuple[Site, ...]
    latent: Int64[np.ndarray, "site target"]


@dataclass(frozen=True, kw_only=True)
class _Trials:
    """Drawn tokens: where they are, the chain's latents and their undisturbed values, and other
    latents that are active at each site but the last."""

    context: Int64[np.ndarray, "trial"]
    position: Int64[np.ndarray, "trial"]
    chain: Int64[np.ndarray, "site trial"]
    clean: Float[np.ndarray, "site trial"]
    others: Mapping[str, Int64[np.ndarray, "site trial"]]
    active_share: float


def measure_mediation(
    model: LanguageModel,
    dictionaries: Mapping[Site, Sae],
    chains: Chains,
    *,
    contexts: Contexts,
    recorded: Mapping[Site, Float[Tensor, "context position d_model"]],
    n_targets: int,
    n_targets_per_context: int = 5,
    batch_size: int = 32,
    seed: int = 0,
    progress: Progress = silent,
) -> pd.DataFrame:
    """One row per target whose ancestor is active on its token: `ancestor_site, target_site, steps,
    document, context, position, ancestor, target_latent, before`, the relative `change_…` of the
    target for each of `COLUMNS`, and `active_share`: of all active targets with a whole chain, how
    many have an active ancestor.

    The first site must be a `resid_post`, the chain at least two links long; `recorded` holds the
    undisturbed run at all its sites (`record_clean`)."""
    rng = np.random.default_rng(seed)
    codes = [dictionaries[site].encode_sparse(recorded[site]) for site in chains.sites]
    trials = _draw(codes, chains, contexts, n_targets, n_targets_per_context, rng)
    after = np.zeros((len(COLUMNS), len(trials.context)))
    # rows of one batch end at about the same position, so little is computed beyond what is read
    order = np.argsort(trials.position, kind="stable")
    label = f"hold chains {chains.sites[0].short} → {chains.sites[-1].short}"
    for done in range(0, len(order), batch_size):
        progress(label, done, len(order))
        batch = order[done : done + batch_size]
        after[:, batch] = _run_batch(model, dictionaries, chains, contexts, recorded, trials, batch)
    progress(label, len(order), len(order))
    return _as_table(chains, contexts, trials, after)


def _run_batch(
    model: LanguageModel,
    dictionaries: Mapping[Site, Sae],
    chains: Chains,
    contexts: Contexts,
    recorded: Mapping[Site, Tensor],
    trials: _Trials,
    batch: Int64[np.ndarray, "row"],
) -> Float[np.ndarray, "column row"]:
    """The target's activation for each of `COLUMNS`."""
    first, target = chains.sites[0], chains.sites[-1]
    length = int(trials.position[batch].max()) + 1
    ids = torch.from_numpy(contexts.ids[trials.context[batch], :length])
    context, at = (torch.from_numpy(x[batch]) for x in (trials.context, trials.position))
    stream = recorded[first][context, :length]
    clean = {site: recorded[site][context, at].float() for site in chains.sites}

    def with_model(edits: Edits) -> Float[Tensor, "row d_model"]:
        there = {site: _only_at(at, edit) for site, edit in edits.items()}
        with continued_from(model, first.layer, stream), model.edited(there):
            return _rows(model.activations(ids, (target,))[target], at)

    def without(edits: Edits) -> Float[Tensor, "row d_model"]:
        moved = torch.zeros_like(clean[first])
        for site in chains.sites[:-1]:
            if site in edits:
                moved = edits[site](clean[site] + moved) - clean[site]
        return clean[target] + moved

    def read(rows: Float[Tensor, "row d_model"]) -> Tensor:
        latent = torch.from_numpy(trials.chain[-1, batch])
        return _read(dictionaries[target], rows, latent)

    found: dict[str, Tensor] = {}
    for arm, run in (("", with_model), ("_no_model", without)):
        for name, edits in _edits_of(dictionaries, chains, clean, trials, batch):
            rows = run(edits)
            found[f"change_{name}{arm}"] = read(rows)
            if name in REMOVALS and not arm:
                skip = edits[first](clean[first]) - clean[first]
                found[f"change_{name}_blocks"] = read(rows - skip)
    return torch.stack([found[column] for column in COLUMNS]).double().cpu().numpy()


def _edits_of(
    dictionaries: Mapping[Site, Sae],
    chains: Chains,
    clean: Mapping[Site, Tensor],
    trials: _Trials,
    batch: Int64[np.ndarray, "row"],
) -> Iterator[tuple[str, Edits]]:
    """The edits of each of `RUNS`, as functions of a token's vector. The first run, which must be
    made before the others are asked for, notes the chain's latents."""
    first, between = chains.sites[0], chains.sites[1:-1]
    chain = dict(zip(chains.sites, torch.from_numpy(trials.chain[:, batch]), strict=True))

    def values(latents: Mapping[Site, Tensor], sites: Sequence[Site]) -> dict[Site, Tensor]:
        return {site: _read(dictionaries[site], clean[site], latents[site]) for site in sites}

    def put(latents: Mapping[Site, Tensor], wanted: Mapping[Site, Tensor]) -> dict[Site, Any]:
        """Each site's latent is put to a value."""
        return {site: _put(dictionaries[site], latents[site], wanted[site]) for site in wanted}

    def removal(latents: Mapping[Site, Tensor]) -> dict[Site, Any]:
        [value] = values(latents, [first]).values()
        return {first: _removed(dictionaries[first], latents[first], value)}

    seen: dict[Site, Tensor] = {}
    noting = {site: _noted(dictionaries[site], chain[site], seen, site) for site in between}
    out = removal(chain)
    yield "removed", out | noting
    yield COPIES, out | put(chain, {site: torch.zeros(len(batch)) for site in between})
    yield CHAIN_HELD, out | put(chain, values(chain, between))
    yield CHAIN_ALONE, put(chain, dict(seen))
    for name, held, removed in zip(trials.others, HELD, REMOVALS[1:], strict=True):
        others = torch.from_numpy(trials.others[name][:, batch])
        latents = dict(zip(chains.sites, others, strict=False))
        yield held, out | put(latents, values(latents, between))
        yield removed, removal(latents)


def _draw(
    codes: Sequence[SparseCodes],
    chains: Chains,
    contexts: Contexts,
    n_targets: int,
    n_per_context: int,
    rng: np.random.Generator,
) -> _Trials:
    """Usable tokens in random order, one target each, whose whole chain exists and whose ancestor
    fires."""
    value, index = codes[-1].value.cpu().numpy(), codes[-1].index.cpu().numpy()
    context, position, slot = np.nonzero((value > 0) & contexts.usable[..., None])
    chain = chains.latent[:, index[context, position, slot]]
    whole = np.flatnonzero((chain >= 0).all(0))
    active = _values_at(codes[0], context[whole], position[whole], chain[0, whole]) > 0
    order = rng.permutation(whole[active])
    token = context[order] * contexts.ids.shape[1] + position[order]
    order = order[np.sort(np.unique(token, return_index=True)[1])]
    rank = pd.Series(context[order]).groupby(context[order]).cumcount().to_numpy()
    order = order[rank < n_per_context][:n_targets]
    context, position, chain = context[order], position[order], chain[:, order]
    return _Trials(
        context=context,
        position=position,
        chain=chain,
        clean=np.stack(
            [
                _values_at(code, context, position, row)
                for code, row in zip(codes, chain, strict=True)
            ]
        ),
        others=_others(codes[:-1], context, position, chain[:-1], rng),
        active_share=float(active.mean()) if len(active) else np.nan,
    )


def _others(
    codes: Sequence[SparseCodes],
    context: np.ndarray,
    position: np.ndarray,
    chain: Int64[np.ndarray, "site trial"],
    rng: np.random.Generator,
) -> dict[str, Int64[np.ndarray, "site trial"]]:
    """At each site another latent that is active on the token: at random, and the strongest; the
    chain's own where nothing else is active."""
    found = {name: chain.copy() for name in ("random", "strongest")}
    for i, code in enumerate(codes):
        index, value = (
            code.index.cpu().numpy()[context, position],
            code.value.cpu().numpy()[context, position],
        )
        free = (value > 0) & (index != chain[i][:, None])
        some = free.any(1)
        noise = np.where(free, rng.random(free.shape), -1.0)
        found["random"][i, some] = np.take_along_axis(index, noise.argmax(1)[:, None], 1)[some, 0]
        strength = np.where(free, value, -1.0)
        found["strongest"][i, some] = np.take_along_axis(index, strength.argmax(1)[:, None], 1)[
            some, 0
        ]
    return found


def _values_at(
    codes: SparseCodes, context: np.ndarray, position: np.ndarray, latent: np.ndarray
) -> np.ndarray:
    index, value = (
        codes.index.cpu().numpy()[context, position],
        codes.value.cpu().numpy()[context, position],
    )
    hit: Bool[np.ndarray, "trial slot"] = index == latent[:, None]
    return (value * hit).sum(1, dtype=np.float64)


def _rows(value: Float[Tensor, "row position d_model"], at: Tensor) -> Float[Tensor, "row d_model"]:
    return value[torch.arange(len(at)), at].float()


def _read(
    sae: Sae, rows: Float[Tensor, "row d_model"], latent: Int64[Tensor, "row"]
) -> Float[Tensor, "row"]:
    """One latent's activation a row; 0 where it is silent."""
    codes = sae.encode_sparse(rows)
    return (
        (codes.value * (codes.index == latent[:, None].to(codes.index.device)))
        .sum(-1)
        .double()
        .cpu()
    )


def _removed(sae: Sae, latent: Tensor, value: Tensor) -> Callable[[Tensor], Tensor]:
    delta = -value[:, None].to(sae.W_dec) * sae.W_dec[latent.to(sae.device)]
    return lambda rows: rows + delta.to(rows)


def _put(sae: Sae, latent: Tensor, value: Tensor) -> Callable[[Tensor], Tensor]:
    def put(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        missing = value - _read(sae, rows, latent)
        direction = sae.W_dec[latent.to(sae.device)]
        return rows + (missing[:, None].to(direction) * direction).to(rows)

    return put


def _noted(
    sae: Sae, latent: Tensor, seen: dict[Site, Tensor], site: Site
) -> Callable[[Tensor], Tensor]:
    def look(rows: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        seen[site] = _read(sae, rows, latent)
        return rows

    return look


def _only_at(at: Tensor, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The edit of one token a row, as an edit of the whole stream."""
    rows = torch.arange(len(at))

    def whole(stream: Float[Tensor, "row position d_model"]) -> Tensor:
        edited = stream.clone()
        own = stream[rows, at]
        edited[rows, at] += (edit(own.float()) - own.float()).to(edited)
        return edited

    return whole


def _as_table(
    chains: Chains, contexts: Contexts, trials: _Trials, after: np.ndarray
) -> pd.DataFrame:
    before = trials.clean[-1]
    facts = {
        "ancestor_site": chains.sites[0].short,
        "target_site": chains.sites[-1].short,
        "steps": len(chains.sites) - 1,
        "document": contexts.document[trials.context, trials.position],
        "context": trials.context,
        "position": trials.position,
        "ancestor": trials.chain[0],
        "target_latent": trials.chain[-1],
        "before": before,
    }
    facts["active_share"] = trials.active_share
    return pd.DataFrame(facts | {name: 1.0 - after[i] / before for i, name in enumerate(COLUMNS)})


def summarise_mediation(
    table: pd.DataFrame, by: Sequence[str] = ("steps",), *, n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Per group: `n`, and with 95 % percentile intervals of a bootstrap over documents

    - `change`, `change_no_model`, `change_by_model`: the target's mean change when the ancestor is
      removed, with the model, without it, and the difference;
    - `blocks`: the mean change with the skip connection's part put back; `random_blocks` and
      `strongest_blocks`: the same for other latents than the ancestor, and `blocks_by_link` what
      the ancestor has more than the strongest other;
    - `copies_removed`, `copies_removed_by_model`: when the chain's latents are removed too;
    - `through_chain` (also `…_no_model`, `…_by_model`), `chain_alone`, `through_random` and
      `through_strongest`: shares of the change.
    """
    rows = []
    for key, group in table.groupby(list(by), sort=False):
        sums = group.groupby("document")[list(COLUMNS)].sum()
        counts = group.groupby("document").size().to_numpy()
        row = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True)) | {
            "n": len(group),
            "active_share": group["active_share"].mean(),
        }
        for name, of in MEASURES.items():

            def statistic(
                weights: Float[np.ndarray, "draw document"],
                of: Measure = of,
                sums: pd.DataFrame = sums,
                counts: np.ndarray = counts,
            ) -> Float[np.ndarray, "draw"]:
                n = weights @ counts
                return of({run: weights @ sums[f"change_{run}"].to_numpy() / n for run in NAMES})

            found = bootstrap(statistic, len(counts), seed=seed, n=n_bootstrap)
            row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(row)
    return pd.DataFrame(rows)


NAMES = tuple(column.removeprefix("change_") for column in COLUMNS)
Means = Mapping[str, Float[np.ndarray, "draw"]]
Measure = Callable[[Means], Float[np.ndarray, "draw"]]


def _held(means: Means, run: str, arm: str = "") -> Float[np.ndarray, "draw"]:
    """The share of the ancestor's effect that is gone when `run` holds something."""
    total = means[f"removed{arm}"]
    return 1 - means[f"{run}{arm}"] / np.where(total == 0, np.nan, total)


MEASURES: Mapping[str, Measure] = {
    "change": lambda m: m["removed"],
    "change_no_model": lambda m: m["removed_no_model"],
    "change_by_model": lambda m: m["removed"] - m["removed_no_model"],
    "blocks": lambda m: m["removed_blocks"],
    "random_blocks": lambda m: m["random_removed_blocks"],
    "strongest_blocks": lambda m: m["strongest_removed_blocks"],
    "blocks_by_link": lambda m: m["removed_blocks"] - m["strongest_removed_blocks"],
    "random_change": lambda m: m["random_removed"],
    "strongest_change": lambda m: m["strongest_removed"],
    "copies_removed": lambda m: m[COPIES],
    "copies_removed_by_model": lambda m: m[COPIES] - m[f"{COPIES}_no_model"],
    "through_chain": lambda m: _held(m, CHAIN_HELD),
    "through_chain_no_model": lambda m: _held(m, CHAIN_HELD, "_no_model"),
    "through_chain_by_model": lambda m: _held(m, CHAIN_HELD) - _held(m, CHAIN_HELD, "_no_model"),
    "chain_alone": lambda m: 1 - _held(m, CHAIN_ALONE),
    "through_random": lambda m: _held(m, "random_held"),
    "through_strongest": lambda m: _held(m, "strongest_held"),
}
"""What is summarised, from the mean change of every run."""
