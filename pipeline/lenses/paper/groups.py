"""Activity groups rerun: their shares by layer, which groups share features, which scores tell
groups apart.

Everything comes from `iter_activities`: each firing of each feature on the held-out tokens. Feature
Flow drew 5 tokens from each of 250 samples; here every held-out token counts for shares and
co-occurrence, and 1,250 for the tests, whose p-values depend on the number of firings. Source:
Feature Flow §5.1, Fig. 4, 5, 12, 13, 14.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from pipeline.flow.activity import (
    GROUPS,
    cooccurrence,
    counts,
    separation,
    separation_shares,
    shares,
    stability,
)
from pipeline.lenses.paper.figures import draw_cooccurrence, draw_group_shares, draw_separation
from pipeline.lenses.paper.published import COOCCURRENCE, WEAK_SEPARATION
from pipeline.lenses.paper.subject import (
    Effort,
    Finding,
    Subject,
    fullest,
    iter_activities,
    layers_of,
)

N_TEST_TOKENS = 1250
ENOUGH_FIRINGS = 10


def group_shares(subject: Subject, effort: Effort) -> Finding:
    """The share of each group by layer, and each feature's counts by group."""
    rows, features = [], []
    for layer, activity in iter_activities(subject):
        found, share = counts(activity), shares(activity)
        name = layer.target.short
        rows += [
            {
                "site": name,
                "layer": layer.target.layer,
                "group": group,
                "possible": bool(activity.possible[place]),
                "share": float(share[place]),
                "n": int(found[:, place].sum()),
            }
            for place, group in enumerate(GROUPS)
        ]
        fired = np.flatnonzero(found.sum(axis=1))
        features.append(
            pd.DataFrame(found[fired], columns=list(GROUPS)).assign(
                site=name, latent=fired, largest_share=stability(found, ENOUGH_FIRINGS)[fired]
            )
        )
    table, by_feature = pd.DataFrame(rows), pd.concat(features, ignore_index=True)
    whole = _complete(table)
    pooled = whole.groupby("group")["n"].sum() / max(whole["n"].sum(), 1)
    return Finding(
        tables={"shares": table, "features": by_feature},
        draw=lambda path: draw_group_shares(table, path),
        text=_shares_text(pooled, whole, by_feature),
        summary={f"share {group}": round(float(pooled.get(group, 0.0)), 4) for group in GROUPS},
    )


def group_cooccurrence(subject: Subject, effort: Effort) -> Finding:
    """How many features of one group are also seen in another, pooled over the layers with all
    predecessors."""
    wanted = {layer.target for layer in fullest(layers_of(subject))}
    found = [
        counts(activity) for layer, activity in iter_activities(subject) if layer.target in wanted
    ]
    matrix = pd.DataFrame(
        cooccurrence(np.concatenate(found)), index=list(GROUPS), columns=list(GROUPS)
    )
    both = matrix.notna().to_numpy() & ~np.eye(len(GROUPS), dtype=bool)
    gap = np.abs(matrix.to_numpy() - COOCCURRENCE.to_numpy())[both]
    nowhere = matrix["nowhere"].drop("nowhere").dropna()
    seen = (
        f"{nowhere.min():.2f} to {nowhere.max():.2f}" if len(nowhere) else "no other group was seen"
    )
    text = (
        "What the paper saw (Fig. 13): 72 to 82 % of the features of any group are also seen 'From "
        "nowhere', so a\n"
        "group says something about a firing and little about a feature.\n\n"
        f"What this model shows, over {len(wanted)} layers: {seen}."
    )
    return Finding(
        tables={"cooccurrence": _named(matrix), "paper": _named(COOCCURRENCE)},
        draw=lambda path: draw_cooccurrence({"this model": matrix, "paper": COOCCURRENCE}, path),
        text=text,
        summary={
            "mean difference from the paper": round(float(gap.mean()), 4) if len(gap) else None
        },
    )


def score_separation(subject: Subject, effort: Effort) -> Finding:
    """Mann–Whitney tests between groups on s(R), s(M), s(A), layer by layer; also with each feature
    once a group."""
    tests = []
    for layer, activity in iter_activities(subject):
        rng = np.random.default_rng([effort.seed, layer.target.layer])
        scores = {relation: link.score for relation, link in layer.links.items()}
        tokens = rng.permutation(np.unique(activity.token))[:N_TEST_TOKENS]
        for sample, part in (
            ("firings", activity.on_tokens(tokens)),
            ("features", activity.one_per_feature(rng)),
        ):
            tests.append(separation(part, scores).assign(site=layer.target.short, sample=sample))
    table = pd.concat(tests, ignore_index=True)
    found = {name: separation_shares(part) for name, part in table.groupby("sample")}
    summed = (
        pd.concat([part.assign(sample=name) for name, part in found.items()], ignore_index=True)
        if found
        else pd.DataFrame(
            columns=["sample", "score", "group_a", "group_b", "share", "n_tests", "expected"]
        )
    )
    summed["paper"] = [
        WEAK_SEPARATION.get((row.score, row.group_a, row.group_b), np.nan)
        for row in summed.itertuples()
    ]
    return Finding(
        tables={"tests": table, "shares": summed},
        draw=lambda path: draw_separation(summed[summed["sample"] == "firings"], path),
        text=_separation_text(summed),
        summary=_separation_summary(summed),
    )


def _complete(table: pd.DataFrame) -> pd.DataFrame:
    """Rows of the layers where the most groups are possible."""
    n_possible = table.groupby("site")["possible"].transform("sum")
    return table[n_possible == n_possible.max()]


def _named(matrix: pd.DataFrame) -> pd.DataFrame:
    return matrix.rename_axis("group").reset_index()


def _shares_text(pooled: pd.Series, whole: pd.DataFrame, features: pd.DataFrame) -> str:
    order = pooled.sort_values(ascending=False)
    listed = ", ".join(f"{group} {share:.1%}" for group, share in order.items() if share > 0)
    stable = features["largest_share"].dropna()
    typical = (
        f"{stable.median():.2f} (median of {len(stable)} features)"
        if len(stable)
        else "not known: few firings"
    )
    return (
        "What the paper saw (Fig. 5, 12): 'From nowhere' is the largest group on Gemma 2 2B, up to "
        "about half of all\n"
        "firings; groups with attention are rare; 'From RES' grows in the last third of the "
        "layers.\n\n"
        f"What this model shows, over {whole['site'].nunique()} layers and {int(whole['n'].sum())} "
        f"firings: {listed}.\n"
        f"A feature's most frequent group holds {typical} of its firings."
    )


def _separation_summary(summed: pd.DataFrame) -> dict[str, float]:
    grouped = summed.groupby(["sample", "expected"])["share"].mean()
    return {
        f"{sample}, {'differs in' if expected else 'same in'} the score's predecessor": round(
            float(share), 4
        )
        for (sample, expected), share in grouped.items()
    }


def _separation_text(summed: pd.DataFrame) -> str:
    lines = [
        f"  {name}: {share:.2f} of tests with p < 0.001"
        for name, share in _separation_summary(summed).items()
    ]
    return (
        "What the paper saw (Fig. 4, 14): a score tells two groups apart if its predecessor fires "
        "in exactly one of\n"
        "them; then nearly all tests have p < 0.001. Eight pairs that agree in it are below "
        "0.80.\n\n"
        "What this model shows, mean share of tests:\n"
        + "\n".join(lines or ["  too few firings for any test"])
        + "\n"
        "('features' counts each feature once a group; 'firings' repeats features, as the paper "
        "did.)"
    )
