"""How often is a feature carried from the layer before, from the MLP, from attention, or from
nowhere?

Every activation of a feature on held-out tokens belongs to one of eight groups, by which of its
best predecessors are active on the same token. The shares of the groups by layer, and each
feature's counts. Feature Flow drew 5 tokens from each of 250 samples; here every held-out token
counts. Cost: one encoding of the tokens per site. Source: Feature Flow §5.1, Fig. 5 and 12.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from pipeline.findings import Finding
from pipeline.flow.activity import GROUPS, counts, shares, stability
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.layers import Text, iter_activities, rows_after_contexts
from pipeline.run import Run

TITLE = "shares of the eight activity groups by layer (Feature Flow, Fig. 5 and 12)"
GROUP = "paper"
NEEDS = ("collect", "train", "link")
ENOUGH_ACTIVATIONS = 10


class Config(Text):
    """On how much text."""


def look(run: Run, config: Config) -> Finding:
    """The share of each group by layer, and each feature's counts by group."""
    rows, features = [], []
    held_out = rows_after_contexts(run, config.n_tokens, config.n_contexts)
    for layer, activity in iter_activities(run, held_out):
        found, share = counts(activity), shares(activity)
        site = layer.target.short
        rows += [
            {
                "site": site,
                "layer": layer.target.layer,
                "group": group,
                "possible": bool(activity.possible[place]),
                "share": float(share[place]),
                "n": int(found[:, place].sum()),
            }
            for place, group in enumerate(GROUPS)
        ]
        active = np.flatnonzero(found.sum(axis=1))
        features.append(
            pd.DataFrame(found[active], columns=list(GROUPS)).assign(
                feature=[f"{site}/{latent}" for latent in active],
                largest_share=stability(found, ENOUGH_ACTIVATIONS)[active],
            )
        )
    table, by_feature = pd.DataFrame(rows), pd.concat(features, ignore_index=True)
    n_possible = table.groupby("site")["possible"].transform("sum")
    whole = table[n_possible == n_possible.max()]
    pooled = whole.groupby("group")["n"].sum() / max(whole["n"].sum(), 1)
    return Finding(
        tables={"shares": table, "features": by_feature},
        # where a module has no SAE, its activations are counted elsewhere: shares differ in meaning
        figure=lambda: lines(
            whole[whole["possible"]],
            x="layer",
            line="group",
            columns={"share": "share of activations"},
        ),
        text=_text(pooled, whole, by_feature),
        headline={f"share {group}": round(float(pooled.get(group, 0.0)), 4) for group in GROUPS},
    )


def _text(pooled: pd.Series, whole: pd.DataFrame, features: pd.DataFrame) -> str:
    order = pooled.sort_values(ascending=False)
    listed = ", ".join(f"{group} {share:.1%}" for group, share in order.items() if share > 0)
    stable = features["largest_share"].dropna()
    typical = (
        f"{stable.median():.2f} (median of {len(stable)} features)"
        if len(stable)
        else "not known: few activations"
    )
    return (
        "What the paper saw (Fig. 5, 12): 'From nowhere' is the largest group on Gemma 2 2B, up to "
        "about half of all\n"
        "activations; groups with attention are rare; 'From RES' grows in the last third of the "
        "layers.\n\n"
        f"What this model shows, over {whole['site'].nunique()} layers and {int(whole['n'].sum())} "
        f"activations: {listed}.\n"
        f"A feature's most frequent group holds {typical} of its activations."
    )
