"""Independent, shared and chained dictionaries × cosine, permutation, Pearson and transport, in one
table.

For every pair of neighbouring sites and every start:

1. each matcher is fitted on one half of the held-out tokens (compare_matchers,
   pipeline/flow/matchers.py);
2. its links are judged as the graph judges links (pipeline/flow/judge.py): their cosine against
   rotation, for dictionaries of one start also against what inertia leaves and by firing; for
   `transport` the cosine is that of the moved rows, and so is the rotation null. `above_null` is
   the share of targets whose link is accepted at 5 %;
3. on the other half: correlation of firing, beside the best partner there and chance pairs of like
   density;
4. in the model: the matched predecessor is removed (pipeline/flow/causal.py).

Targets are latents that fired at least `FEW_FIRINGS` times on the judging half; a missing partner
counts as no link. Which targets there are differs between starts, since their dictionaries differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from data.model.language_model import LanguageModel
from featureflow.progress import Progress, silent
from featureflow.sites import Site
from featureflow.statistics import p_values, q_values
from pipeline.flow.causal import (
    Contexts,
    DeactivationOptions,
    measure_deactivation,
    summarise_deactivation,
)
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
from pipeline.flow.null import NullSample, NullSampler, Rotation
from pipeline.flow.pairing import Pair, pair_sites, start_relation
from pipeline.flow.shelf import HeldOut
from pipeline.lenses.paper.figures import draw_bars
from pipeline.lenses.paper.subject import Effort, Finding, pair_data
from sae import Sae

MATCHERS: dict[str, Matcher] = {
    "cosine": cosine,
    "permutation": permutation,
    "pearson": pearson,
    "transport": transport,
}
RATE = 0.05
"""False-discovery rate up to which a link is above its null."""
N_NULL = 8192


@dataclass(frozen=True, kw_only=True)
class Start:
    """Dictionaries of neighbouring residual sites, trained from one kind of start. `inertia`: the
    best cosines that a common start alone leaves between them (start_null.py)."""

    name: str
    dictionaries: Mapping[Site, Sae]
    inertia: NullSample | None


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """What all pairs are tested with."""

    held_out: HeldOut
    model: LanguageModel
    contexts: Contexts
    effort: Effort
    progress: Progress


def compare_starts(
    starts: Sequence[Start],
    *,
    held_out: HeldOut,
    open_model: Callable[[], LanguageModel],
    contexts: Callable[[LanguageModel, int], Contexts],
    effort: Effort,
    progress: Progress = silent,
) -> Finding:
    """One row a start and matcher: share above the null, functional agreement, deactivation."""
    model = open_model()
    bench = _Bench(
        held_out=held_out,
        model=model,
        contexts=contexts(model, effort.n_contexts),
        effort=effort,
        progress=progress,
    )
    tables, trials = [], []
    for start in starts:
        for pair in pair_sites(start.dictionaries).pairs:
            table, trial = _of_pair(start, pair, bench)
            tables.append(
                table.assign(start=start.name, source=pair.source.short, target=pair.target.short)
            )
            trials.append(trial.assign(start=start.name))
    by_pair, removed = pd.concat(tables, ignore_index=True), pd.concat(trials, ignore_index=True)
    return _finding(by_pair, removed, effort)


def _of_pair(start: Start, pair: Pair, bench: _Bench) -> tuple[pd.DataFrame, pd.DataFrame]:
    fitted, other = (
        pair_data(start.dictionaries, bench.held_out, pair.source, pair.target, half=half)
        for half in (0, 1)
    )
    table, best = compare_matchers(fitted, (other.source_codes, other.target_codes), MATCHERS)
    judged = np.flatnonzero(other.target_codes.n_fired >= FEW_FIRINGS)
    seen = pd.DataFrame(
        [_judged(name, best[name], judged, start, pair, fitted, other, bench) for name in best]
    )
    facts = [start.dictionaries[site].metadata for site in (pair.source, pair.target)]
    trials = measure_deactivation(
        bench.model,
        {pair.source: fitted.source, pair.target: fitted.target},
        source=pair.source,
        target=pair.target,
        predecessors={name: index[:, None] for name, index in best.items()},
        contexts=bench.contexts,
        options=DeactivationOptions(
            n_targets=bench.effort.n_targets,
            n_targets_per_context=max(1, -(-bench.effort.n_targets // len(bench.contexts.ids))),
            seed=bench.effort.seed + pair.target.layer,
        ),
        progress=bench.progress,
    )
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
    bench: _Bench,
) -> dict[str, object]:
    """How many of the judged targets have a link above its null, and how the links fire on tokens
    not fitted on."""
    target = judged[best[judged] != NOBODY]
    source = best[target]
    rng = np.random.default_rng([bench.effort.seed, pair.target.layer])
    cofiring = compare_firing(
        other.source_codes, other.target_codes, (source, target), rng=rng, n_chance=N_NULL
    )
    directions = _source_directions(name, fitted)
    columns = _columns(source, target, directions, fitted.target_directions)
    metadata = (fitted.source.metadata, fitted.target.metadata)
    same = start_relation(*metadata) == "same_start"
    generator = torch.Generator().manual_seed(bench.effort.seed + pair.target.layer)
    sampler = NullSampler(choice=Rotation(), n=N_NULL)
    nulls = [sampler.sample(directions, fitted.target_directions, generator)]
    if same and start.inertia is not None:
        nulls.append(start.inertia)
    evidence = judge(
        columns, nulls, cofiring, other.target_codes.n_fired < FEW_FIRINGS, same_start=same
    )
    together = q_values(p_values(cofiring.links.pearson, cofiring.chance.pearson))
    return {
        "matcher": name,
        "above_null": float((evidence.q <= RATE).sum() / max(len(judged), 1)),
        "fires_above_chance": float((together <= RATE).sum() / max(len(judged), 1)),
        "pearson_best": float(np.median(cofiring.best.pearson[judged]))
        if len(judged)
        else float("nan"),
        "pearson_chance_p99": float(np.quantile(cofiring.chance.pearson, 0.99))
        if len(source)
        else float("nan"),
        "agreement": float((cofiring.best.index[judged] == best[judged]).mean())
        if len(judged)
        else float("nan"),
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


def _finding(by_pair: pd.DataFrame, trials: pd.DataFrame, effort: Effort) -> Finding:
    grouped = by_pair.groupby(["start", "matcher"], as_index=False, sort=False)
    mean = grouped.mean(numeric_only=True).assign(
        above_null_low=grouped["above_null"].min()["above_null"],
        above_null_high=grouped["above_null"].max()["above_null"],
    )
    removed = summarise_deactivation(trials, by=("start", "strategy"), seed=effort.seed)
    removed = removed.rename(columns={"strategy": "matcher", "n_targets": "n_trials"})
    summary = mean.drop(columns="n_targets").merge(
        removed, on=["start", "matcher"], how="outer", sort=False
    )
    order = {name: i for i, name in enumerate([*MATCHERS, *removed["matcher"]])}
    starts = {name: i for i, name in enumerate(dict.fromkeys(by_pair["start"]))}
    summary = summary.sort_values(
        ["start", "matcher"],
        key=lambda column: column.map(starts if column.name == "start" else order),
    ).reset_index(drop=True)
    matched = summary[summary["matcher"].isin(list(MATCHERS))]
    return Finding(
        tables={"by_pair": by_pair, "trials": trials, "summary": summary},
        draw=lambda path: draw_bars(
            summary,
            path,
            by=("start", "matcher"),
            columns={
                "above_null": "links above the null (bars: range over pairs)",
                "pearson_median": "Pearson, other tokens",
                "success": "success of removal",
                "change": "activation change",
            },
        ),
        text=_text(summary, by_pair),
        summary={
            f"{row.start}, {row.matcher}: {name}": round(float(getattr(row, name)), 4)
            for row in matched.itertuples()
            for name in ("above_null", "success")
        },
    )


def _text(summary: pd.DataFrame, by_pair: pd.DataFrame) -> str:
    lines = []
    for row in summary.itertuples():
        removal = (
            f"success {row.success:.2f} [{row.success_low:.2f}, {row.success_high:.2f}], change "
            f"{row.change:.2f}"
            f" [{row.change_low:.2f}, {row.change_high:.2f}], active {row.active_share:.2f}"
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
