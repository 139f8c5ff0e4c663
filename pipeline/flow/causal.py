"""Does removing a predecessor silence its target? The deactivation experiment of Feature Flow
(arXiv 2502.03032, 5.2).

For a pair of sites, a predecessor site P and a residual site R at or after it:

1. run contexts of held-out documents once, and encode P and R;
2. draw targets: a token and a latent of R that is active there, a few per context, spread over
   tokens;
3. a strategy names, for each target, latents of P (`Predecessors`); those that are active on that
   token are removed there and only there: `h ← h + (r − 1) Σ a_i d_i`, r = 0 by default. It edits
   the stream; the dictionary's error stays;
4. the model goes on from P, the target is read again: activation change = 1 − new / old, success =
   target silent;
5. the arm without the model hands the edited vector straight to R's encoder, as if every block
   between passed the edit on unchanged. What it gives is the overlap of a decoder row with an
   encoder row; only the difference of the two arms is what the model does.

Controls use the same targets: a latent that is active on the token and no strategy names, drawn at
random or the strongest. Exhaustive search tries every latent that is active and keeps the best, an
upper bound for one-predecessor explanations.

Cost: one row of the context per edit, through the blocks from P to R only
(`data/model/partial_forward.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from data.model.language_model import LanguageModel
from data.model.partial_forward import continued_from
from featureflow.progress import Progress, silent
from featureflow.sites import Site
from featureflow.statistics import bootstrap_ratio
from sae import Sae, SparseCodes

RANDOM_ACTIVE, STRONGEST_ACTIVE, EXHAUSTIVE = "random active", "strongest active", "exhaustive"
CONTROLS = (RANDOM_ACTIVE, STRONGEST_ACTIVE)


@dataclass(frozen=True, kw_only=True)
class Contexts:
    """Held-out text: one row a context. `usable` marks tokens that may be targets (no BOS, no
    separators)."""

    ids: Int64[np.ndarray, "context position"]
    document: Int64[np.ndarray, "context position"]
    usable: np.ndarray


@dataclass(frozen=True, kw_only=True)
class DeactivationOptions:
    """How much to test. `scale` is r: 0 removes, 1 changes nothing, negative values
    over-subtract."""

    n_targets: int = 200
    n_targets_per_context: int = 10
    controls: tuple[str, ...] = CONTROLS
    n_exhaustive: int = 0
    scale: float = 0.0
    batch_size: int = 32
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class _Targets:
    """The drawn targets: where each lies, its latent and its activation before any edit."""

    context: Int64[np.ndarray, "target"]
    position: Int64[np.ndarray, "target"]
    latent: Int64[np.ndarray, "target"]
    before: Float[np.ndarray, "target"]


def measure_deactivation(
    model: LanguageModel,
    dictionaries: Mapping[Site, Sae],
    *,
    source: Site,
    target: Site,
    predecessors: Mapping[str, Int64[np.ndarray, "target_latent candidate"]],
    contexts: Contexts,
    options: DeactivationOptions,
    recorded: Mapping[Site, Float[Tensor, "context position d_model"]] | None = None,
    progress: Progress = silent,
) -> pd.DataFrame:
    """One row per target and strategy: `source, target, strategy, document, context, position,
    target_latent, predecessor` (the first removed, −1 if none was active), `n_removed, before,
    after, change, success`, and `change_no_model, success_no_model` of the arm without the model.

    `predecessors[strategy][target_latent]` lists candidate latents of `source`, −1 for none. A row
    with `n_removed` 0 is a target whose candidates were silent; it was not run again. `recorded` is
    what `record_clean` gave for the sites of `sites_to_record`, to share one undisturbed run among
    many pairs.
    """
    generator = np.random.default_rng(options.seed)
    clean = _clean_of(
        recorded or record_clean(model, contexts, sites_to_record(source, target)), source, target
    )
    codes_source = dictionaries[source].encode_sparse(clean.source)
    codes_target = dictionaries[target].encode_sparse(clean.target)
    targets = _draw_targets(codes_target, contexts, options, generator)
    edits = [
        *_strategy_edits(targets, codes_source, predecessors),
        *_control_edits(targets, codes_source, predecessors, options, generator),
    ]
    after, without = _read_after(
        model, dictionaries, clean, contexts, targets, edits, source, target, options, progress
    )
    table = _as_table(targets, edits, after, without, contexts, source, target)
    return (
        pd.concat([table, _best_of_exhaustive(table)], ignore_index=True)
        if options.n_exhaustive
        else table
    )


@dataclass(frozen=True, kw_only=True)
class _Clean:
    """One undisturbed run: the stream that edits start from, and both sites."""

    start: Float[Tensor, "context position d_model"]
    source: Float[Tensor, "context position d_model"]
    target: Float[Tensor, "context position d_model"]
    start_layer: int


@dataclass(frozen=True, kw_only=True)
class _Edit:
    """Latents to remove for one target under one strategy, with their activations there."""

    strategy: str
    target: int
    latents: Int64[np.ndarray, "removed"]
    values: Float[np.ndarray, "removed"]


def sites_to_record(source: Site, target: Site) -> tuple[Site, ...]:
    """The sites that testing a pair needs to see undisturbed: both, and the stream that edited runs
    go on from."""
    return tuple(dict.fromkeys((_start_site(source), source, target)))


def record_clean(
    model: LanguageModel, contexts: Contexts, sites: Sequence[Site], *, progress: Progress = silent
) -> dict[Site, Float[Tensor, "context position d_model"]]:
    """One undisturbed run over all contexts: float32 activations at `sites`, kept in memory."""
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for done, ids in enumerate(torch.from_numpy(contexts.ids).split(8)):
        progress("run the model undisturbed", 8 * done, len(contexts.ids))
        for site, value in model.activations(ids, tuple(parts)).items():
            parts[site].append(value.float())
    return {site: torch.cat(values) for site, values in parts.items()}


def _clean_of(recorded: Mapping[Site, Tensor], source: Site, target: Site) -> _Clean:
    start = _start_site(source)
    return _Clean(
        start=recorded[start],
        source=recorded[source],
        target=recorded[target],
        start_layer=start.layer if start.kind == "resid_post" else -1,
    )


def _start_site(source: Site) -> Site:
    """Where an edited run starts from: the source itself, or the stream below a module's layer."""
    layer = source.layer if source.kind == "resid_post" else source.layer - 1
    return Site(layer, "resid_post") if layer >= 0 else Site(0, "resid_pre")


def _draw_targets(
    codes: SparseCodes,
    contexts: Contexts,
    options: DeactivationOptions,
    generator: np.random.Generator,
) -> _Targets:
    """Active (token, latent) pairs: at most one latent a token, at most so many tokens a context,
    in random order."""
    value, index = codes.value.cpu().numpy(), codes.index.cpu().numpy()
    context, position = np.nonzero(contexts.usable & (value > 0).any(-1))
    order = generator.permutation(len(context))
    context, position = context[order], position[order]
    rank_in_context = pd.Series(context).groupby(context).cumcount().to_numpy()
    keep = np.flatnonzero(rank_in_context < options.n_targets_per_context)[: options.n_targets]
    context, position = context[keep], position[keep]
    slots = [generator.choice(np.flatnonzero(row > 0)) for row in value[context, position]]
    chosen = np.array(slots, dtype=np.int64)
    return _Targets(
        context=context,
        position=position,
        latent=index[context, position, chosen],
        before=value[context, position, chosen],
    )


def _strategy_edits(
    targets: _Targets,
    codes: SparseCodes,
    predecessors: Mapping[str, Int64[np.ndarray, "latent candidate"]],
) -> Iterator[_Edit]:
    for target, (latents, values) in enumerate(_active_at(targets, codes)):
        for strategy, candidates in predecessors.items():
            wanted = np.isin(latents, candidates[targets.latent[target]])
            yield _Edit(
                strategy=strategy, target=target, latents=latents[wanted], values=values[wanted]
            )


def _control_edits(
    targets: _Targets,
    codes: SparseCodes,
    predecessors: Mapping[str, Int64[np.ndarray, "latent candidate"]],
    options: DeactivationOptions,
    generator: np.random.Generator,
) -> Iterator[_Edit]:
    for target, (latents, values) in enumerate(_active_at(targets, codes)):
        named = [candidates[targets.latent[target]] for candidates in predecessors.values()]
        others = np.flatnonzero(~np.isin(latents, np.concatenate([np.zeros(0, int), *named])))
        if len(others):
            drawn = {
                RANDOM_ACTIVE: generator.choice(others, size=1),
                STRONGEST_ACTIVE: others[[np.argmax(values[others])]],
            }
            for control in options.controls:
                one = drawn[control]
                yield _Edit(
                    strategy=control, target=target, latents=latents[one], values=values[one]
                )
        if target < options.n_exhaustive:
            for i in range(len(latents)):
                yield _Edit(
                    strategy=EXHAUSTIVE, target=target, latents=latents[[i]], values=values[[i]]
                )


def _active_at(targets: _Targets, codes: SparseCodes) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each target, the latents of the source that are active on its token, and how strongly."""
    index, value = codes.index.cpu().numpy(), codes.value.cpu().numpy()
    for context, position in zip(targets.context, targets.position, strict=True):
        active = value[context, position] > 0
        yield index[context, position][active], value[context, position][active]


def _read_after(
    model: LanguageModel,
    dictionaries: Mapping[Site, Sae],
    clean: _Clean,
    contexts: Contexts,
    targets: _Targets,
    edits: Sequence[_Edit],
    source: Site,
    target: Site,
    options: DeactivationOptions,
    progress: Progress,
) -> tuple[Float[np.ndarray, "edit"], Float[np.ndarray, "edit"]]:
    """The target's activation after each edit, with the model and without it; unchanged where
    nothing was removed."""
    after = targets.before[[edit.target for edit in edits]].astype(np.float64)
    without = after.copy()
    reader = dictionaries[target]
    # rows of one batch end at about the same position, so little is computed beyond what is read
    order = sorted(
        (i for i, edit in enumerate(edits) if len(edit.latents)),
        key=lambda i: targets.position[edits[i].target],
    )
    for done in range(0, len(order), options.batch_size):
        progress(f"deactivate {source.short} → {target.short}", done, len(order))
        batch = order[done : done + options.batch_size]
        chosen = np.array([edits[i].target for i in batch])
        context, position = targets.context[chosen], targets.position[chosen]
        length = int(position.max()) + 1
        delta = torch.stack([_delta(dictionaries[source], edits[i], options.scale) for i in batch])
        ids = torch.from_numpy(contexts.ids[context, :length])
        value = _rerun(model, clean, ids, context, position, delta, source, target)
        after[batch] = _activation(reader, value, targets.latent[chosen])
        unmoved = clean.target[torch.from_numpy(context), torch.from_numpy(position)]
        without[batch] = _activation(reader, unmoved + delta.to(unmoved), targets.latent[chosen])
    progress(f"deactivate {source.short} → {target.short}", len(order), len(order))
    return after, without


def _activation(
    sae: Sae, x: Float[Tensor, "row d_model"], latent: Int64[np.ndarray, "row"]
) -> Float[np.ndarray, "row"]:
    """One latent of each row."""
    codes = sae.encode_sparse(x)
    wanted = codes.index == torch.from_numpy(latent)[:, None].to(codes.index.device)
    return (codes.value * wanted).sum(-1).cpu().numpy()


def _delta(dictionary: Sae, edit: _Edit, scale: float) -> Float[Tensor, "d_model"]:
    values = torch.from_numpy(edit.values).to(dictionary.device, dictionary.dtype)
    return (
        (scale - 1.0)
        * values
        @ dictionary.W_dec[torch.from_numpy(edit.latents).to(dictionary.device)]
    )


def _rerun(
    model: LanguageModel,
    clean: _Clean,
    ids: Tensor,
    context: np.ndarray,
    position: np.ndarray,
    delta: Float[Tensor, "row d_model"],
    source: Site,
    target: Site,
) -> Float[Tensor, "row d_model"]:
    """The target site's activation at each row's token, when `delta` is added at the source
    there."""
    rows = torch.arange(len(context))
    at = torch.from_numpy(position)

    def add(value: Tensor) -> Tensor:
        edited = value.clone()
        edited[rows, at] += delta.to(edited.device, edited.dtype)
        return edited

    if clean.start_layer < 0:
        with model.edited({source: add}):
            return model.activations(ids, (target,))[target][rows, at].float()
    stream = clean.start[torch.from_numpy(context), : ids.shape[1]]
    with continued_from(model, clean.start_layer, stream), model.edited({source: add}):
        return model.activations(ids, (target,))[target][rows, at].float()


def _as_table(
    targets: _Targets,
    edits: Sequence[_Edit],
    after: np.ndarray,
    without: np.ndarray,
    contexts: Contexts,
    source: Site,
    target: Site,
) -> pd.DataFrame:
    which = np.array([edit.target for edit in edits], dtype=np.int64)
    before = targets.before[which].astype(np.float64)
    context, position = targets.context[which], targets.position[which]
    return pd.DataFrame(
        {
            "source": source.short,
            "target": target.short,
            "strategy": [edit.strategy for edit in edits],
            "document": contexts.document[context, position],
            "context": context,
            "position": position,
            "target_latent": targets.latent[which],
            "predecessor": [int(edit.latents[0]) if len(edit.latents) else -1 for edit in edits],
            "n_removed": [len(edit.latents) for edit in edits],
            "before": before,
            "after": after,
            "change": 1.0 - after / before,
            "success": after <= 0.0,
            "change_no_model": 1.0 - without / before,
            "success_no_model": without <= 0.0,
        }
    )


def _best_of_exhaustive(table: pd.DataFrame) -> pd.DataFrame:
    """Per target the one removal that changed it most, as the strategy `best single active`."""
    tried = table[table["strategy"] == EXHAUSTIVE]
    best = tried.loc[tried.groupby(["context", "position", "target_latent"])["change"].idxmax()]
    return best.assign(strategy="best single active")


def summarise_deactivation(
    table: pd.DataFrame,
    by: Sequence[str] = ("strategy",),
    *,
    n_bootstrap: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Success and activation change where a predecessor was removed, with 95 % intervals by
    resampling documents.

    `n_targets` counts all targets of the group, `n` those with an active predecessor,
    `active_share` is their ratio. `success_all` takes a target without an active predecessor as
    not silenced. `…_no_model` is the arm without the model, `…_by_model` the paired difference:
    what the blocks between the two sites add to the overlap of a decoder with an encoder. Both are
    left out where that arm was not run.
    """
    rows = []
    arms: tuple[str, ...] = ("",)
    if "success_no_model" in table:
        arms = ("", "_no_model", "_by_model")
        table = table.assign(
            success_by_model=table["success"].astype(float) - table["success_no_model"],
            change_by_model=table["change"] - table["change_no_model"],
        )
    for key, group in table[table["strategy"] != EXHAUSTIVE].groupby(list(by), sort=False):
        run = group[group["n_removed"] > 0]
        everywhere = group.assign(success_all=group["success"] & (group["n_removed"] > 0))
        row = dict(zip(by, key if isinstance(key, tuple) else (key,), strict=True))
        row |= {"n_targets": len(group), "n": len(run), "active_share": len(run) / len(group)}
        row |= mean_with_interval(everywhere, "success_all", n_bootstrap, seed)
        for arm in arms:
            row |= mean_with_interval(run, f"success{arm}", n_bootstrap, seed)
            row |= mean_with_interval(run, f"change{arm}", n_bootstrap, seed)
        rows.append(row)
    return pd.DataFrame(rows)


def mean_with_interval(
    run: pd.DataFrame, column: str, n_bootstrap: int, seed: int
) -> dict[str, float]:
    """The mean over rows and its percentile interval when whole documents are drawn with
    replacement."""
    sums = run.groupby("document")[column].agg(["sum", "count"]).to_numpy(dtype=np.float64)
    found = bootstrap_ratio(sums[:, 0], sums[:, 1], seed=seed, n=n_bootstrap)
    return {column: found.mean, f"{column}_low": found.low, f"{column}_high": found.high}


def evidence_of_edges(table: pd.DataFrame, strategy: str) -> pd.DataFrame:
    """Per tested edge: `source_latent, target_latent, causal_n, causal_success, causal_change`,
    from one strategy."""
    run = table[(table["strategy"] == strategy) & (table["n_removed"] == 1)]
    grouped = run.groupby(["source", "target", "predecessor", "target_latent"], as_index=False)
    evidence = grouped.agg(
        causal_n=("success", "size"),
        causal_success=("success", "mean"),
        causal_change=("change", "mean"),
    )
    return evidence.rename(columns={"predecessor": "source_latent"})
