"""Which of several active predecessors matters, and does it take all of them?

For layers spread over the depth, active features of every activity group are drawn, and every
subset of their active top-1 predecessors is removed in one run of the model. Cost: targets × up to
7 subsets × one context through one block. Source: Feature Flow §5.2, Fig. 8 and 15.
"""

from __future__ import annotations

from itertools import combinations

import pandas as pd

from featureflow.statistics import ranged
from pipeline.findings import Finding
from pipeline.flow.activity import GROUPS, MEMBERS
from pipeline.flow.causal import summarise_deactivation
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.joint_edits import Cases, Change, changed_trials
from pipeline.lenses.parts.layers import Trials, with_features
from pipeline.run import Run

TITLE = "remove every subset of predecessors (Feature Flow, Fig. 8 and 15)"
GROUP = "paper"
NEEDS = ("collect", "train", "link")


class Config(Trials):
    """How much is tested."""


def look(run: Run, config: Config) -> Finding:
    """Success and change by group and removed subset."""
    trials = changed_trials(run, _changes, **dict(config), with_loss=False)
    trials = trials.assign(
        strategy=trials["removed"], n_removed=trials["removed"].str.count("&") + 1
    )
    summary = summarise_deactivation(trials, by=("group", "removed"), seed=config.seed)
    alone, both = _success(summary, "RES"), _success(summary, "RES&MLP")
    return Finding(
        tables={"summary": summary, "trials": with_features(trials)},
        figure=lambda: bars(
            summary,
            by=("group", "removed"),
            columns={"success": "success", "change": "activation change"},
        ),
        text="What the paper saw (Fig. 8, 15): removing one predecessor does less when others are "
        "active too; RES matters most;\n"
        "usually all predecessors must be removed.\n\n"
        f"What this model shows: in RES&MLP, removing RES alone silences {alone} of the targets, "
        f"both {both}.\n"
        "All groups and subsets are in the table `summary`.",
        headline={"RES&MLP, RES removed": alone, "RES&MLP, both removed": both},
    )


def _changes(cases: Cases) -> list[Change]:
    return [
        Change(case=i, relations=subset)
        for i, group in enumerate(cases.group)
        for size in range(1, len(MEMBERS[GROUPS[group]]) + 1)
        for subset in combinations(MEMBERS[GROUPS[group]], size)
    ]


def _success(summary: pd.DataFrame, removed: str) -> str:
    """In the group RES&MLP, when `removed` is removed."""
    rows = summary[(summary["group"] == "RES&MLP") & (summary["removed"] == removed)]
    if not len(rows):
        return "no"
    row = rows.iloc[0]
    return f"{ranged(row, 'success')}"
