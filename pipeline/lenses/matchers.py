"""Which idea of "the same feature in the layer before" finds the better predecessor?

Every matcher of pipeline/flow/matchers.py is fitted on one half of the held-out tokens, on the same
pairs and targets. It is judged by activity on the other half, and by removing each partner in the
model. Cost: one fit per matcher and pair, then targets × matchers × one context through one block.
"""

from __future__ import annotations

import pandas as pd

from pipeline.findings import Finding
from pipeline.flow.causal import summarise_deactivation
from pipeline.flow.matchers import compare_matchers
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.layers import (
    NTokens,
    Trials,
    contexts_of,
    pair_data,
    remove_predecessors,
    residual_pairs,
    rows_after_contexts,
    spread,
    with_features,
)
from pipeline.run import Run

TITLE = "six ideas of the same feature, compared on the same targets"
GROUP = "paper"
NEEDS = ("collect", "train", "link")


class Config(Trials):
    """How much is compared."""

    n_tokens: NTokens = 8192


def look(run: Run, config: Config) -> Finding:
    """Every matcher on the same targets: activity on tokens it did not see, and removal in the
    model."""
    contexts = contexts_of(run, config.n_contexts)
    held_out = rows_after_contexts(run, config.n_tokens, config.n_contexts)
    pairs, saes = spread(residual_pairs(run), config.n_pairs), run.saes.keeping(2)
    tables, tested = [], []
    for source, target in pairs:
        fitted, judge = (pair_data(saes, held_out, source, target, half=half) for half in (0, 1))
        table, best = compare_matchers(fitted, (judge.source_codes, judge.target_codes))
        tables.append(table.assign(source_site=source.short, target_site=target.short))
        partners = {name: index[:, None] for name, index in best.items()}
        tested.append(
            remove_predecessors(
                run,
                saes,
                source,
                target,
                partners,
                contexts,
                n_targets=config.n_targets,
                seed=config.seed,
            )
        )
    by_pair, trials = (pd.concat(parts, ignore_index=True) for parts in (tables, tested))
    removed = summarise_deactivation(trials, seed=config.seed)
    mean = by_pair.groupby("matcher", as_index=False, sort=False).mean(numeric_only=True)
    summary = mean.merge(removed, left_on="matcher", right_on="strategy", how="outer").sort_values(
        "success"
    )
    summary["matcher"] = summary["matcher"].fillna(summary["strategy"])
    lines = [
        f"  {row.matcher}: Pearson {row.pearson_median:.2f}, success {row.success:.2f}, change "
        f"{row.change:.2f}"
        for row in summary.itertuples()
    ]
    return Finding(
        tables={"summary": summary, "by_pair": by_pair, "trials": with_features(trials)},
        figure=lambda: bars(
            summary,
            by=("matcher",),
            columns={"success": "success", "pearson_median": "Pearson, other tokens"},
        ),
        text="What the paper saw: top-1 cosine and Pearson succeed equally often (0.65, Table "
        "1).\n\n"
        f"What this model shows, over {len(pairs)} pairs:\n" + "\n".join(lines),
        headline={
            f"success {row.matcher}": round(float(row.success), 4) for row in summary.itertuples()
        },
    )
