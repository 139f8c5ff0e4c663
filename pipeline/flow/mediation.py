"""How much of what an ancestor does to a feature goes through the chain between them? Path patching
along one chain.

A chain is one latent a site, from the ancestor a at its site S to the target t: a → f₁ → … → fₘ →
t. On a token where both ends fire, the model goes on from S several times, changed on that token
only:

1. `removed`          a is taken out, h ← h − z_a v_a; the chain's latents are read on the way
2. `chain held`       a is taken out, and at every site between the chain's latent is put back to
   its undisturbed
                      value, h ← h + (z_clean − z) v; what t loses now went around the chain
3. `chain alone`      a stays, and the chain's latents are put to the values of run 1; what t loses
   went through it
4. `random held`      as 2, with another latent that fires there at each site, drawn at random
5. `strongest held`   as 2, with the strongest other latent

The share of the effect that needs the chain is 1 − Σ change(2) / Σ change(1); that of the chain
alone is Σ change(3) / Σ change(1); 4 and 5 are controls of the first. Sums over targets, so that
targets which the ancestor hardly matters to do not divide by nothing. Every edit keeps the
dictionaries' errors in the stream. Since a target sees only its own and earlier tokens, and only
its own is changed, no effect leaves that token.

Cost: five rows of the context per target, through the blocks from S to the target. Source: path
patching (Goldowsky-Dill et al., arXiv 2304.05969), here with dictionary latents as the nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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

CHAIN_HELD, CHAIN_ALONE, RANDOM_HELD, STRONGEST_HELD = (
    "chain_held",
    "chain_alone",
    "random_held",
    "strongest_held",
)
RUNS = ("removed", CHAIN_HELD, CHAIN_ALONE, RANDOM_HELD, STRONGEST_HELD)


@dataclass(frozen=True, kw_only=True)
class Chains:
    """For every latent of the last site, its chain: `latent[i]` are the latents at `sites[i]`, -1
    where there is none. The last row counts up: a target is its own end."""

    sites: tuple[Site, ...]
    latent: Int64[np.ndarray, "site target"]


@dataclass(frozen=True, kw_only=True)
class _Trials:
    """Drawn tokens: where they are, the chain's latents, the two controls' latents, and their
    undisturbed values."""

    context: Int64[np.ndarray, "trial"]
    position: Int64[np.ndarray, "trial"]
    chain: Int64[np.ndarray, "site trial"]
    clean: Float[np.ndarray, "site trial"]
    others: Mapping[str, Int64[np.ndarray, "between trial"]]


@dataclass(frozen=True, kw_only=True)
class _Hold:
    """One latent a row at one site, put to a value by an edit of the stream at the row's token."""

    sae: Sae
    latent: Int64[Tensor, "row"]
    value: Float[Tensor, "row"]


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
    """One row per target whose ancestor fires on its token: `ancestor_site, target_site, steps,
    document, context, position, ancestor, target_latent, before`, and for each of `RUNS` the
    relative `change_…` of the target.

    The first site must be a `resid_post`, the chain at least two links long; `recorded` holds the
    undisturbed run at all its sites (`record_clean`)."""
    rng = np.random.default_rng(seed)
    codes = [dictionaries[site].encode_sparse(recorded[site]) for site in chains.sites]
    trials = _draw(codes, chains, contexts, n_targets, n_targets_per_context, rng)
    after = np.zeros((len(RUNS), len(trials.context)))
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
) -> Float[np.ndarray, "run row"]:
    """The target's activation in each of `RUNS`."""
    first, between, target = chains.sites[0], chains.sites[1:-1], chains.sites[-1]
    length = int(trials.position[batch].max()) + 1
    ids = torch.from_numpy(contexts.ids[trials.context[batch], :length])
    stream = recorded[first][torch.from_numpy(trials.context[batch]), :length]
    at = torch.from_numpy(trials.position[batch])
    chain = torch.from_numpy(trials.chain[:, batch])
    clean = torch.from_numpy(trials.clean[:, batch])

    def target_after(edits: Mapping[Site, Callable[[Tensor], Tensor]]) -> Tensor:
        with continued_from(model, first.layer, stream), model.edited(edits):
            value = model.activations(ids, (target,))[target]
        return _read(dictionaries[target], _rows(value, at), chain[-1])

    def held(latents: Tensor, values: Tensor) -> dict[Site, Callable[[Tensor], Tensor]]:
        return {
            site: _held(_Hold(sae=dictionaries[site], latent=latents[i], value=values[i]), at)
            for i, site in enumerate(between)
        }

    seen: dict[Site, Tensor] = {}
    removal = {first: _removed(dictionaries[first], chain[0], clean[0], at)}
    reading = {
        site: _noted(dictionaries[site], chain[1 + i], at, seen, site)
        for i, site in enumerate(between)
    }
    results = [target_after(removal | reading)]
    results.append(target_after(removal | held(chain[1:-1], clean[1:-1])))
    results.append(target_after(held(chain[1:-1], torch.stack([seen[site] for site in between]))))
    for name in (RANDOM_HELD, STRONGEST_HELD):
        latents = torch.from_numpy(trials.others[name][:, batch])
        rows = (torch.from_numpy(trials.context[batch]), at)
        values = torch.stack(
            [
                _read(dictionaries[site], recorded[site][rows], latents[i])
                for i, site in enumerate(between)
            ]
        )
        results.append(target_after(removal | held(latents, values)))
    return torch.stack(results).double().cpu().numpy()


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
    fires = _values_at(codes[0], context[whole], position[whole], chain[0, whole]) > 0
    order = rng.permutation(whole[fires])
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
        others=_others(codes[1:-1], context, position, chain[1:-1], rng),
    )


def _others(
    codes: Sequence[SparseCodes],
    context: np.ndarray,
    position: np.ndarray,
    chain: Int64[np.ndarray, "between trial"],
    rng: np.random.Generator,
) -> dict[str, Int64[np.ndarray, "between trial"]]:
    """At each site between, another latent that fires on the token: at random, and the strongest;
    the chain's own where nothing else fires."""
    found = {name: chain.copy() for name in (RANDOM_HELD, STRONGEST_HELD)}
    for i, code in enumerate(codes):
        index, value = (
            code.index.cpu().numpy()[context, position],
            code.value.cpu().numpy()[context, position],
        )
        free = (value > 0) & (index != chain[i][:, None])
        some = free.any(1)
        noise = np.where(free, rng.random(free.shape), -1.0)
        found[RANDOM_HELD][i, some] = np.take_along_axis(index, noise.argmax(1)[:, None], 1)[
            some, 0
        ]
        strength = np.where(free, value, -1.0)
        found[STRONGEST_HELD][i, some] = np.take_along_axis(index, strength.argmax(1)[:, None], 1)[
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


def _removed(sae: Sae, latent: Tensor, value: Tensor, at: Tensor) -> Callable[[Tensor], Tensor]:
    delta = -value[:, None].to(sae.W_dec) * sae.W_dec[latent.to(sae.device)]
    return lambda stream: _added(stream, delta, at)


def _held(hold: _Hold, at: Tensor) -> Callable[[Tensor], Tensor]:
    def put(stream: Tensor) -> Tensor:
        missing = hold.value - _read(hold.sae, _rows(stream, at), hold.latent)
        direction = hold.sae.W_dec[hold.latent.to(hold.sae.device)]
        return _added(stream, missing[:, None].to(direction) * direction, at)

    return put


def _noted(
    sae: Sae, latent: Tensor, at: Tensor, seen: dict[Site, Tensor], site: Site
) -> Callable[[Tensor], Tensor]:
    def look(stream: Tensor) -> Tensor:
        seen[site] = _read(sae, _rows(stream, at), latent)
        return stream

    return look


def _added(stream: Tensor, delta: Float[Tensor, "row d_model"], at: Tensor) -> Tensor:
    edited = stream.clone()
    edited[torch.arange(len(at)), at] += delta.to(edited.device, edited.dtype)
    return edited


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
    return pd.DataFrame(
        facts | {f"change_{run}": 1.0 - after[i] / before for i, run in enumerate(RUNS)}
    )


def summarise_mediation(
    table: pd.DataFrame, by: Sequence[str] = ("steps",), *, n_bootstrap: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Per group: `n`, the mean `change` of the target when the ancestor is removed, and the shares
    of that change that need the chain (`through_chain`), that the chain alone makes
    (`chain_alone`), and that need other latents (`through_random`, `through_strongest`); 95 %
    percentile intervals of a bootstrap over documents."""
    rows = []
    for key, group in table.groupby(list(by), sort=False):
        sums = group.groupby("document")[[f"change_{run}" for run in RUNS]].sum().to_numpy()
        counts = group.groupby("document").size().to_numpy()
        row = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True)) | {
            "n": len(group)
        }
        for name in _shares(sums, counts):
            found = bootstrap(
                lambda weights, sums=sums, counts=counts, name=name: _shares(
                    weights @ sums, weights @ counts
                )[name],
                len(counts),
                seed=seed,
                n=n_bootstrap,
            )
            row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
        rows.append(row)
    return pd.DataFrame(rows)


def _shares(
    sums: Float[np.ndarray, "draw run"], counts: Float[np.ndarray, "draw"]
) -> dict[str, Float[np.ndarray, "draw"]]:
    removed, held, alone, random, strongest = sums.T
    total = np.where(removed == 0, np.nan, removed)
    return {
        "change": removed / counts,
        "through_chain": 1 - held / total,
        "chain_alone": alone / total,
        "through_random": 1 - random / total,
        "through_strongest": 1 - strongest / total,
    }
