"""Do the same features appear in several activity groups?

For each pair of groups, the share of one group's features that the other group also has, pooled
over the layers with all predecessors. Cost: one encoding of the tokens per site. Source: Feature
Flow §5.1, Fig. 13.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from pipeline.findings import Finding
from pipeline.flow.activity import GROUPS, cooccurrence, counts
from pipeline.lenses.parts.charts import heat_maps
from pipeline.lenses.parts.layers import (
    Text,
    fullest,
    iter_activities,
    layers_of,
    rows_after_contexts,
)
from pipeline.run import Run

TITLE = "which groups share features (Feature Flow, Fig. 13)"
GROUP = "paper"
NEEDS = ("collect", "train", "link")

_FIG_13 = (
    (1.0, 0.49, 0.32, 0.19, 0.26, 0.17, 0.10, 0.11),
    (0.72, 1.0, 0.29, 0.20, 0.33, 0.22, 0.091, 0.13),
    (0.82, 0.50, 1.0, 0.25, 0.45, 0.18, 0.21, 0.18),
    (0.82, 0.59, 0.42, 1.0, 0.33, 0.45, 0.30, 0.28),
    (0.75, 0.66, 0.50, 0.22, 1.0, 0.22, 0.16, 0.22),
    (0.76, 0.72, 0.32, 0.49, 0.35, 1.0, 0.21, 0.33),
    (0.82, 0.51, 0.67, 0.57, 0.46, 0.37, 1.0, 0.42),
    (0.74, 0.62, 0.50, 0.47, 0.53, 0.50, 0.37, 1.0),
)
PAPER = pd.DataFrame(_FIG_13, index=list(GROUPS), columns=list(GROUPS))
"""Fig. 13, Gemma 2 2B: P(a feature of the row's group also appears in the column's group)."""


class Config(Text):
    """On how much text."""


def look(run: Run, config: Config) -> Finding:
    """One matrix of this model beside that of the paper."""
    wanted = {layer.target for layer in fullest(layers_of(run))}
    held_out = rows_after_contexts(run, config.n_tokens, config.n_contexts)
    found = [counts(a) for layer, a in iter_activities(run, held_out) if layer.target in wanted]
    pooled = cooccurrence(np.concatenate(found))
    matrix = pd.DataFrame(pooled, index=list(GROUPS), columns=list(GROUPS))
    both = matrix.notna().to_numpy() & ~np.eye(len(GROUPS), dtype=bool)
    gap = np.abs(matrix.to_numpy() - PAPER.to_numpy())[both]
    nowhere = matrix["nowhere"].drop("nowhere").dropna()
    seen = (
        f"{nowhere.min():.2f} to {nowhere.max():.2f}" if len(nowhere) else "no other group was seen"
    )
    return Finding(
        tables={
            name: table.rename_axis("group").reset_index()
            for name, table in (("cooccurrence", matrix), ("paper", PAPER))
        },
        figure=lambda: heat_maps({"this model": matrix, "paper": PAPER}),
        text="What the paper saw (Fig. 13): 72 to 82 % of the features of any group are also seen "
        "'From nowhere', so a\n"
        "group says something about an activation and little about a feature.\n\n"
        f"What this model shows, over {len(wanted)} layers: {seen}.",
        headline={
            "mean difference from the paper": round(float(gap.mean()), 4) if len(gap) else None
        },
    )
