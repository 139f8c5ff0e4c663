"""Codes of a layer and of its predecessors → which predecessors are active with each active
feature: eight activity groups.

1. For every activation of a target feature, look whether its best residual, MLP and attention
   predecessors are active on the same token. The three answers give one of eight groups, from
   `nowhere` to `RES&MLP&ATT`.
2. A group belongs to an activation, not to a feature, so a feature has a distribution over groups
   (`distributions`); a layer has shares (`shares`), and two groups share features (`cooccurrence`).
3. `separation` asks whether a score of the feature's links, such as s(R), differs between two
   groups (Mann–Whitney).

Cost: one look-up an activation. Source: Feature Flow (arXiv 2502.03032) §5.1, Fig. 4, 5, 13 and 14.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int64
from scipy.stats import mannwhitneyu

from featureflow.errors import UserError
from pipeline.flow.functional import Codes
from pipeline.flow.pairing import RELATIONS, Relation

GROUPS = ("nowhere", "RES", "MLP", "ATT", "RES&MLP", "RES&ATT", "MLP&ATT", "RES&MLP&ATT")
"""In the order of the paper's figures."""
MEMBERS: dict[str, tuple[Relation, ...]] = {
    "nowhere": (),
    "RES": ("residual",),
    "MLP": ("mlp",),
    "ATT": ("attention",),
    "RES&MLP": ("residual", "mlp"),
    "RES&ATT": ("residual", "attention"),
    "MLP&ATT": ("mlp", "attention"),
    "RES&MLP&ATT": ("residual", "mlp", "attention"),
}
_BIT: dict[Relation, int] = {name: 1 << place for place, name in enumerate(RELATIONS)}
_GROUP_OF_BITS = np.array(
    [
        next(i for i, g in enumerate(GROUPS) if sum(_BIT[m] for m in MEMBERS[g]) == bits)
        for bits in range(8)
    ]
)


@dataclass(frozen=True, kw_only=True)
class Predecessors:
    """Codes of a site before the target, and for each target latent its best latent there (-1:
    none)."""

    codes: Codes
    best: Int64[np.ndarray, "target"]


@dataclass(frozen=True, kw_only=True)
class Activity:
    """Every activation of a layer's features: its latent, its token and its group (a place in
    `GROUPS`). `looked_at` says which predecessors there were; an activation cannot come from one
    that was not looked at."""

    latent: Int64[np.ndarray, "activation"]
    token: Int64[np.ndarray, "activation"]
    group: Int64[np.ndarray, "activation"]
    n_latents: int
    looked_at: tuple[Relation, ...]

    @property
    def possible(self) -> Bool[np.ndarray, "group"]:
        """The groups that could occur with the predecessors looked at."""
        return np.array([set(MEMBERS[group]) <= set(self.looked_at) for group in GROUPS])

    def on_tokens(self, tokens: Int64[np.ndarray, "token"]) -> Activity:
        """Only the activations on some tokens."""
        return self._only(np.isin(self.token, tokens))

    def one_per_feature(self, rng: np.random.Generator) -> Activity:
        """One activation, drawn at random, of each feature in each group: samples that do not
        repeat a feature."""
        order = rng.permutation(len(self.latent))
        key = self.latent[order] * len(GROUPS) + self.group[order]
        _, first = np.unique(key, return_index=True)
        keep = np.zeros(len(self.latent), dtype=bool)
        keep[order[first]] = True
        return self._only(keep)

    def _only(self, keep: Bool[np.ndarray, "activation"]) -> Activity:
        return Activity(
            latent=self.latent[keep],
            token=self.token[keep],
            group=self.group[keep],
            n_latents=self.n_latents,
            looked_at=self.looked_at,
        )


def activity_groups(target: Codes, predecessors: Mapping[Relation, Predecessors]) -> Activity:
    """The group of every activation of `target`. All codes must be of the same tokens. Raises
    UserError."""
    _check(target, predecessors)
    n_latents = target.codes.shape[1]
    latent = np.repeat(np.arange(n_latents, dtype=np.int64), np.diff(target.codes.indptr))
    token = target.codes.indices.astype(np.int64)
    bits = np.zeros(len(latent), dtype=np.int64)
    for relation, before in predecessors.items():
        best = before.best[latent]
        bits |= np.where(
            (best >= 0) & active_at(before.codes, np.maximum(best, 0), token), _BIT[relation], 0
        )
    return Activity(
        latent=latent,
        token=token,
        group=_GROUP_OF_BITS[bits],
        n_latents=n_latents,
        looked_at=tuple(relation for relation in RELATIONS if relation in predecessors),
    )


def active_at(
    codes: Codes, latent: Int64[np.ndarray, "place"], token: Int64[np.ndarray, "place"]
) -> Bool[np.ndarray, "place"]:
    """Whether each latent is active on its token."""
    n_tokens, n_latents = codes.codes.shape
    columns = np.repeat(np.arange(n_latents, dtype=np.int64), np.diff(codes.codes.indptr))
    active = np.sort(columns * n_tokens + codes.codes.indices)
    wanted = latent * n_tokens + token
    place = np.minimum(np.searchsorted(active, wanted), max(len(active) - 1, 0))
    return active[place] == wanted if len(active) else np.zeros(len(wanted), dtype=bool)


def counts(activity: Activity) -> Int64[np.ndarray, "latent group"]:
    """How often each feature was active in each group."""
    found = np.zeros((activity.n_latents, len(GROUPS)), dtype=np.int64)
    np.add.at(found, (activity.latent, activity.group), 1)
    return found


def shares(activity: Activity) -> Float[np.ndarray, "group"]:
    """The share of each group among all activations; nan when nothing was active."""
    n = np.bincount(activity.group, minlength=len(GROUPS))
    return n / n.sum() if n.sum() else np.full(len(GROUPS), np.nan)


def cooccurrence(found: Int64[np.ndarray, "latent group"]) -> Float[np.ndarray, "row column"]:
    """P(a feature seen in the row's group is also seen in the column's group); nan in rows of
    groups never seen. Counts of several layers may be stacked."""
    seen = (found > 0).astype(np.float64)
    both, alone = seen.T @ seen, seen.sum(axis=0)[:, None]
    return np.divide(both, alone, out=np.full(both.shape, np.nan), where=alone > 0)


def stability(
    found: Int64[np.ndarray, "latent group"], min_activations: int
) -> Float[np.ndarray, "latent"]:
    """How much of a feature's activations its most frequent group holds, for features with enough
    activations; nan else."""
    total = found.sum(axis=1)
    enough = total >= max(min_activations, 1)
    return np.divide(found.max(axis=1), total, out=np.full(len(found), np.nan), where=enough)


def separation(
    activity: Activity,
    scores: Mapping[Relation, Float[np.ndarray, "latent"]],
    *,
    min_activations: int = 8,
) -> pd.DataFrame:
    """Mann–Whitney tests of every score between every two groups, over activations.

    One row a test: `score, group_a, group_b, n_a, n_b, auc, p_value`; `auc` is P(score in a > score
    in b), ties half. Pairs of groups with fewer than `min_activations` on a side are left out."""
    rows = []
    for relation, score in scores.items():
        of_activation = score[activity.latent]
        known = np.isfinite(of_activation)
        samples = [of_activation[known & (activity.group == place)] for place in range(len(GROUPS))]
        for a, b in combinations(range(len(GROUPS)), 2):
            if min(len(samples[a]), len(samples[b])) < min_activations:
                continue
            test = mannwhitneyu(samples[a], samples[b], method="asymptotic")
            rows.append(
                {
                    "score": relation,
                    "group_a": GROUPS[a],
                    "group_b": GROUPS[b],
                    "n_a": len(samples[a]),
                    "n_b": len(samples[b]),
                    "auc": float(test.statistic) / (len(samples[a]) * len(samples[b])),
                    "p_value": float(test.pvalue),
                }
            )
    columns = ["score", "group_a", "group_b", "n_a", "n_b", "auc", "p_value"]
    return pd.DataFrame(rows, columns=columns)


def separation_shares(tests: pd.DataFrame, *, alpha: float = 1e-3) -> pd.DataFrame:
    """Over layers: per score and pair of groups the share of tests with p < alpha, how many there
    were, and whether the score's predecessor is active in exactly one of the two groups (the
    paper's pattern)."""
    grouped = tests.assign(different=tests["p_value"] < alpha).groupby(
        ["score", "group_a", "group_b"], as_index=False
    )
    found = grouped.agg(
        share=("different", "mean"), n_tests=("different", "size"), auc_median=("auc", "median")
    )
    members = [
        (row.score in MEMBERS[row.group_a]) != (row.score in MEMBERS[row.group_b])
        for row in found.itertuples()
    ]
    return found.assign(expected=np.array(members, dtype=bool))


def _check(target: Codes, predecessors: Mapping[Relation, Predecessors]) -> None:
    for relation, before in predecessors.items():
        if before.codes.n_tokens != target.n_tokens:
            raise UserError(
                "codes of different tokens cannot be compared",
                where=relation,
                expected=f"{target.n_tokens} tokens",
                found=str(before.codes.n_tokens),
            )
        if len(before.best) != target.codes.shape[1]:
            raise UserError(
                "each target feature needs one predecessor",
                where=relation,
                expected=str(target.codes.shape[1]),
                found=str(len(before.best)),
            )
