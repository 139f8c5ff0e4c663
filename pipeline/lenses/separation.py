"""Do the scores of a feature's links tell its activity groups apart?

Mann–Whitney tests between groups on s(R), s(M), s(A), layer by layer: over activations, as the
paper did, and with each feature once a group. The p-values depend on the number of activations:
1,250 tokens, as in the paper. Source: Feature Flow §5.1, Fig. 4 and 14.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from pipeline.findings import Finding
from pipeline.flow.activity import GROUPS, separation, separation_shares
from pipeline.lenses.parts.charts import heat_maps
from pipeline.lenses.parts.layers import Seed, Text, iter_activities, rows_after_contexts
from pipeline.run import Run

TITLE = "which link scores tell groups apart (Feature Flow, Fig. 4 and 14)"
GROUP = "paper"
NEEDS = ("collect", "train", "link")
N_TEST_TOKENS = 1250
PAPER = {
    ("residual", "nowhere", "ATT"): 0.76,
    ("residual", "MLP", "MLP&ATT"): 0.67,
    ("residual", "RES&MLP", "RES&MLP&ATT"): 0.56,
    ("mlp", "MLP", "MLP&ATT"): 0.72,
    ("mlp", "RES&MLP", "RES&MLP&ATT"): 0.58,
    ("attention", "ATT", "RES&ATT"): 0.67,
    ("attention", "RES&ATT", "MLP&ATT"): 0.72,
    ("attention", "MLP&ATT", "RES&MLP&ATT"): 0.56,
}
"""Fig. 14, Gemma 2 2B: the pairs with a share of significant tests below 0.80; every other pair has
0.80 or more."""


class Config(Text):
    """On how much text."""

    seed: Seed = 0


def look(run: Run, config: Config) -> Finding:
    """Every test, and the share of tests with p < 0.001 by score and pair of groups."""
    tests = []
    held_out = rows_after_contexts(run, config.n_tokens, config.n_contexts)
    for layer, activity in iter_activities(run, held_out):
        rng = np.random.default_rng([config.seed, layer.target.layer])
        scores = {relation: link.score for relation, link in layer.links.items()}
        tokens = rng.permutation(np.unique(activity.token))[:N_TEST_TOKENS]
        for sample, part in (
            ("activations", activity.on_tokens(tokens)),
            ("features", activity.one_per_feature(rng)),
        ):
            tests.append(separation(part, scores).assign(site=layer.target.short, sample=sample))
    table = pd.concat(tests, ignore_index=True)
    summed = pd.concat(
        [separation_shares(part).assign(sample=name) for name, part in table.groupby("sample")]
        or [separation_shares(table).assign(sample="")],
        ignore_index=True,
    )
    keys = zip(summed["score"], summed["group_a"], summed["group_b"], strict=True)
    summed["paper"] = [PAPER.get(key, np.nan) for key in keys]
    by_kind = summed.groupby(["sample", "expected"])["share"].mean()
    headline = {
        f"{sample}, {'differs in' if expected else 'same in'} the score's predecessor": round(
            float(share), 4
        )
        for (sample, expected), share in by_kind.items()
    }
    lines = [f"  {name}: {share:.2f} of tests with p < 0.001" for name, share in headline.items()]
    return Finding(
        tables={"tests": table, "shares": summed},
        figure=lambda: heat_maps(_matrices(summed[summed["sample"] == "activations"])),
        text="What the paper saw (Fig. 4, 14): a score tells two groups apart if its predecessor "
        "is active in exactly one of\n"
        "them; then nearly all tests have p < 0.001. Eight pairs that agree in it are below "
        "0.80.\n\n"
        "What this model shows, mean share of tests:\n"
        + "\n".join(lines or ["  too few activations for any test"])
        + "\n('features' counts each feature once a group; 'activations' repeats features, as the "
        "paper did.)",
        headline=headline,
    )


def _matrices(summed: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each score a symmetric matrix of shares between groups."""
    found = {}
    for score in dict.fromkeys(summed["score"]) or ["residual"]:
        matrix = pd.DataFrame(np.nan, index=list(GROUPS), columns=list(GROUPS))
        for row in summed[summed["score"] == score].itertuples():
            matrix.loc[row.group_a, row.group_b] = matrix.loc[row.group_b, row.group_a] = row.share
        found[f"score of the {score} link"] = matrix
    return found
