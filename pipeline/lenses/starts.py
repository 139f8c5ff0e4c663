"""Independent, shared and chained SAEs × cosine, permutation, Pearson and transport, in one table.

1. The training section of the run's `train` artifact is taken over, at `n_layers` neighbouring
   residual sites in the middle of the model; every start gets the same total of optimizer steps (a
   chain's first SAE gets what its short successors leave). The three train artifacts are made by
   the train stage under `<run>/starts/<start>`, and kept.
2. For every pair of neighbouring sites and every start, each matcher is fitted on one half of the
   held-out tokens (compare_matchers, pipeline/flow/matchers.py).
3. Its links are judged as the graph judges links (pipeline/flow/judge.py): their cosine against
   the siblings null, for SAEs of one start also against what inertia leaves and by activity; for
   `transport` the cosine is that of the moved rows, and so is that null. `above_null` is the share
   of targets whose link is accepted at 5 %.
4. On the other half: correlation of activity, beside the best partner there and chance pairs of
   like density. In the model: the matched predecessor is removed (pipeline/flow/causal.py).

Targets are latents that were active at least `FEW_FIRINGS` times on the judging half; a missing
partner counts as no link. Which targets there are differs between starts, since their SAEs differ.
Cost: three trainings of `n_layers` × `steps`, then as the lens `matchers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from typing_extensions import Doc

from featureflow.errors import UserError
from featureflow.statistics import p_values, q_values, ranged
from pipeline.artifact import Artifact, digest_of
from pipeline.findings import Finding
from pipeline.flow.causal import Contexts, summarise_deactivation
from pipeline.flow.directions import Directions, directions_of
from pipeline.flow.edges import EdgeColumns
from pipeline.flow.functional import FEW_FIRINGS, compare_firing
from pipeline.flow.judge import judge
from pipeline.flow.matchers import (
    NOBODY,
    Best,
    Matcher,
    PairData,
    compare_matchers,
    cosine,
    pearson,
    permutation,
    ridge_map,
    transport,
)
from pipeline.flow.null import NullSample, NullSampler, Siblings
from pipeline.flow.pairing import Pair, pair_sites, start_relation
from pipeline.flow.partner import stand_ins
from pipeline.flow.sources import HeldOutRows
from pipeline.lenses.base import Seeded
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.layers import (
    NContexts,
    NTargets,
    NTokens,
    contexts_of,
    pair_data,
    remove_predecessors,
    rows_after_contexts,
    with_features,
)
from pipeline.run import Run
from pipeline.saes import FOLDER, Saes
from pipeline.stages import train
from pipeline.stages.link import trained_start_nulls
from pipeline.training.plan import Chain, Independent, Shared

TITLE = "independent, shared and chained SAEs, compared by four matchers (in neither paper)"
GROUP = "paper"
NEEDS = ("collect", "train")
MATCHERS: dict[str, Matcher] = {
    "cosine": cosine,
    "permutation": permutation,
    "pearson": pearson,
    "transport": transport,
}
RATE = 0.05
"""False-discovery rate up to which a link is above its null."""
N_NULL = 8192
_KEYS = ["start", "matcher"]


class Config(Seeded):
    """How much is trained and tested."""

    n_layers: Annotated[int, Ge(2), Doc("neighbouring layers, in the middle of the model")] = 6
    steps: Annotated[int, Ge(1), Doc("optimizer steps an SAE, on average over the layers")] = 800
    n_tokens: NTokens = 8192
    n_targets: NTargets = 150
    n_contexts: NContexts = 32


@dataclass(frozen=True, kw_only=True)
class Start:
    """SAEs of neighbouring residual sites, trained from one kind of start. `inertia`: the best
    cosines that a common start alone leaves between them (start_null.py)."""

    name: str
    saes: Saes
    inertia: NullSample | None


def look(run: Run, config: Config) -> Finding:
    """One row a start and matcher: share above the null, functional agreement, deactivation."""
    contexts = contexts_of(run, config.n_contexts)
    starts = [_trained(run, name, plan, config) for name, plan in _plans(run, config).items()]
    held_out = rows_after_contexts(run, config.n_tokens, config.n_contexts)
    tables, trials = [], []
    for start in starts:
        for pair in pair_sites(start.saes).pairs:
            where = {"source_site": pair.source.short, "target_site": pair.target.short}
            table, trial = _of_pair(run, start, pair, held_out, contexts, config)
            tables.append(table.assign(start=start.name, **where))
            trials.append(trial.assign(start=start.name))
    by_pair, removed = pd.concat(tables, ignore_index=True), pd.concat(trials, ignore_index=True)
    return _finding(by_pair, removed, config.seed)


def _plans(run: Run, config: Config) -> dict[str, train.Config]:
    """What is trained for each start: the run's own choices but for sites, steps and start.
    Raises UserError."""
    base = train.Config.model_validate(dict(run.artifact("train").config))
    sites, steps = _middle_sites(run, config.n_layers), config.steps
    if steps < len(sites):
        raise UserError(
            "too few steps to share out",
            where="--steps",
            expected=str(len(sites)),
            found=str(steps),
        )
    base = base.replace(sites=sites, steps=steps, overrides=(), imported=None)
    next_steps = max(1, steps // 4)
    return {
        "independent": base.replace(initialisation=Independent()),
        "shared": base.replace(initialisation=Shared()),
        "chain": base.replace(
            initialisation=Chain(next_steps=next_steps),
            steps=steps * len(sites) - next_steps * (len(sites) - 1),
        ),
    }


def _middle_sites(run: Run, n_layers: int) -> tuple[str, ...]:
    layers = sorted(site.layer for site in run.store.sites if site.kind == "resid_post")
    if n_layers > len(layers):
        raise UserError(
            "the store has not so many residual layers",
            where="--layers",
            expected=f"2 to {len(layers)}",
            found=str(n_layers),
        )
    first = (len(layers) - n_layers) // 2
    return tuple(f"L{layer}" for layer in layers[first : first + n_layers])


def _trained(run: Run, name: str, plan: train.Config, config: Config) -> Start:
    """The SAEs of one start, trained if they are not there."""
    collect, out = run.artifact("collect"), run.root / "starts" / name
    digest = digest_of(train.KIND, train.SCHEMA, plan, {"collect": collect.digest})
    if not Artifact.is_current(out, digest):
        train.run(plan, train.Inputs(collect=collect), out, run.context)
    saes = Saes(out / FOLDER, n_kept=2)
    nulls = trained_start_nulls(saes, run.store, run.context, n_per_relation=1, seed=config.seed)
    return Start(name=name, saes=saes, inertia=nulls.get("residual"))


def _of_pair(
    run: Run, start: Start, pair: Pair, held_out: HeldOutRows, contexts: Contexts, config: Config
) -> tuple[pd.DataFrame, pd.DataFrame]:
    fitted, other = (
        pair_data(start.saes, held_out, pair.source, pair.target, half=half) for half in (0, 1)
    )
    table, best = compare_matchers(fitted, (other.source_codes, other.target_codes), MATCHERS)
    judged = np.flatnonzero(other.target_codes.n_fired >= FEW_FIRINGS)
    seen = pd.DataFrame(
        [_judged(name, best[name], judged, start, pair, fitted, other, config) for name in best]
    )
    trials = remove_predecessors(
        run,
        {pair.source: fitted.source, pair.target: fitted.target},
        pair.source,
        pair.target,
        {name: index[:, None] for name, index in best.items()},
        contexts,
        n_targets=config.n_targets,
        seed=config.seed,
    )
    facts = [start.saes[site].metadata for site in (pair.source, pair.target)]
    return table.merge(seen, on="matcher").assign(
        fvu=_mean_fvu(facts), relation=start_relation(*facts)
    ), trials


def _judged(
    name: str,
    best: Best,
    judged: np.ndarray,
    start: Start,
    pair: Pair,
    fitted: PairData,
    other: PairData,
    config: Config,
) -> dict[str, object]:
    """How many of the judged targets have a link above its null, and how linked features are
    active together on tokens not fitted on."""
    target = judged[best[judged] != NOBODY]
    source = best[target]
    rng = np.random.default_rng([config.seed, pair.target.layer])
    cofiring = compare_firing(
        other.source_codes, other.target_codes, (source, target), rng=rng, n_chance=N_NULL
    )
    directions = _source_directions(name, fitted)
    columns = _columns(source, target, directions, fitted.target_directions)
    metadata = (fitted.source.metadata, fitted.target.metadata)
    same = start_relation(*metadata) == "same_start"
    generator = torch.Generator().manual_seed(config.seed + pair.target.layer)
    sampler = NullSampler(choice=Siblings(), n=N_NULL)
    nulls = [sampler.sample(directions, fitted.target_directions, generator)]
    if same and start.inertia is not None:
        nulls.append(start.inertia)
    codes = (other.source_codes, other.target_codes)
    evidence = judge(
        columns,
        nulls,
        cofiring,
        other.target_codes.n_fired < FEW_FIRINGS,
        stand_ins=list(stand_ins(directions, fitted.target_directions, codes, columns)),
        fdr=RATE,
        same_start=same,
    )
    together = q_values(p_values(cofiring.links.pearson, cofiring.chance.pearson))
    nothing = float("nan")
    return {
        "matcher": name,
        "above_null": float((evidence.q <= RATE).sum() / max(len(judged), 1)),
        "active_above_chance": float((together <= RATE).sum() / max(len(judged), 1)),
        "pearson_best": float(np.median(cofiring.best.pearson[judged])) if len(judged) else nothing,
        "pearson_chance_p99": float(np.quantile(cofiring.chance.pearson, 0.99))
        if len(source)
        else nothing,
        "agreement": float((cofiring.best.index[judged] == best[judged]).mean())
        if len(judged)
        else nothing,
    }


def _source_directions(name: str, pair: PairData) -> Directions:
    """The source's unit rows in the space where the matcher compares them."""
    if name != "transport":
        return pair.source_directions
    return directions_of(
        pair.source.W_dec.float() @ ridge_map(pair.rows), name="transported source"
    )


def _columns(
    source: np.ndarray, target: np.ndarray, left: Directions, right: Directions
) -> EdgeColumns:
    """The links as edges, each its target's first choice."""
    cosines = torch.einsum(
        "nd,nd->n", left.unit[torch.from_numpy(source)], right.unit[torch.from_numpy(target)]
    )
    first = np.zeros(len(source), dtype=np.int64)
    return EdgeColumns(
        source=source,
        target=target,
        rank=first,
        forward_rank=first - 1,
        cosine=cosines.double().cpu().numpy(),
        margin=np.zeros(len(source)),
    )


def _mean_fvu(facts: Sequence[Mapping[str, object]]) -> float:
    known = [
        value for metadata in facts if isinstance(value := metadata.get("held_out_fvu"), float)
    ]
    return float(np.mean(known)) if known else float("nan")


def _finding(by_pair: pd.DataFrame, trials: pd.DataFrame, seed: int) -> Finding:
    grouped = by_pair.groupby(_KEYS, as_index=False, sort=False)
    mean = grouped.mean(numeric_only=True).assign(
        above_null_low=grouped["above_null"].min()["above_null"],
        above_null_high=grouped["above_null"].max()["above_null"],
    )
    removed = summarise_deactivation(trials, by=("start", "strategy"), seed=seed)
    removed = removed.rename(columns={"strategy": "matcher", "n_targets": "n_trials"})
    summary = mean.drop(columns="n_targets").merge(removed, on=_KEYS, how="outer", sort=False)
    order = {name: i for i, name in enumerate([*by_pair["start"], *MATCHERS, *removed["matcher"]])}
    summary = summary.sort_values(_KEYS, key=lambda column: column.map(order))
    summary = summary.reset_index(drop=True)
    return Finding(
        tables={"summary": summary, "by_pair": by_pair, "trials": with_features(trials)},
        figure=lambda: bars(
            summary,
            by=_KEYS,
            columns={
                "above_null": "links above the null (bars: range over pairs)",
                "pearson_median": "Pearson, other tokens",
                "success": "success of removal",
                "change": "activation change",
            },
        ),
        text=_text(summary, by_pair),
        headline={
            f"{row.start}, {row.matcher}: {name}": round(float(getattr(row, name)), 4)
            for row in summary[summary["matcher"].isin(list(MATCHERS))].itertuples()
            for name in ("above_null", "success")
        },
    )


def _text(summary: pd.DataFrame, by_pair: pd.DataFrame) -> str:
    lines = []
    for row in summary.itertuples():
        removal = (
            f"success {ranged(row, 'success')}, change "
            f"{ranged(row, 'change')}, active {row.active_share:.2f}"
        )
        firing = (
            f"above null {row.above_null:.2f}, Pearson {row.pearson_median:.2f} (best "
            f"{row.pearson_best:.2f}, "
            f"chance {row.pearson_chance_p99:.2f}), "
            if row.matcher in MATCHERS
            else ""
        )
        lines.append(f"  {row.start}, {row.matcher}: {firing}{removal}")
    fvu = ", ".join(
        f"{name} {value:.3f}"
        for name, value in by_pair.groupby("start", sort=False)["fvu"].mean().items()
    )
    n_pairs = by_pair.groupby("start").size().max() // len(MATCHERS)
    return (
        "What the paper saw: on Gemma Scope (independent starts) cosine and Pearson succeed "
        "equally often (0.65).\n\n"
        f"What this model shows, {n_pairs} pairs of neighbouring layers, "
        f"unexplained variance {fvu}:\n" + "\n".join(lines)
    )
