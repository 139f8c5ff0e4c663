"""The records of a study, and its arms held against their controls.

The unit is the topic. Per topic and arm: the share of test samples that succeed and stay coherent
(`SuccCoh`); a vacuous arm counts as unsteered. An arm's gain over a control is the mean over topics
of paired differences, with a bootstrap over topics, prompts and samples; p by sign flips of topics,
Holm over the arms compared; equivalence by two one-sided tests at ±0.05.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy

from benchmarks.steering_study.options import SUPPRESSION_ARMS, UNSTEERED
from featureflow.errors import UserError
from featureflow.statistics import Interval, bootstrap_mean

MARGIN = 0.05


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """An arm against a control: paired difference of SuccCoh, p adjusted over the comparisons
    made."""

    arm: str
    control: str
    difference: Interval
    p: float
    p_holm: float
    is_equivalent: bool


def read_records(folder: Path, part: str = "test") -> pd.DataFrame:
    """One row a sample: topic, arm, prompt, sample, hit (succeeded and coherent), success,
    coherent, nll, text."""
    rows = []
    for path in sorted((folder / part).glob("*/*.json")):
        document = json.loads(path.read_text(encoding="utf-8"))
        for name, key in ((path.stem, "records"), ("unsteered_topical", "topical_records")):
            rows += [
                {"topic": path.parent.name, "arm": name, **record}
                for record in document.get(key, [])
            ]
        if document.get("vacuous"):
            rows += _as_unsteered(path)
    if not rows:
        raise UserError(
            "the study has no results here",
            where=str(folder / part),
            fix="run the study's test part",
        )
    table = pd.DataFrame(rows)
    return table.assign(
        hit=table["success"] & table["coherent"], removed=~table["success"] & table["coherent"]
    )


def compare(
    records: pd.DataFrame,
    arms: Sequence[str],
    controls: Sequence[str],
    *,
    seed: int = 0,
    value: str = "hit",
) -> list[Comparison]:
    """Every arm against the control that is best on these records, Holm over arms."""
    present = [control for control in controls if (records["arm"] == control).any()]
    means = {control: topic_means(records, control, value).mean() for control in present}
    best = max(means, key=lambda control: means[control])
    found = [
        (arm, paired(records, arm, best, value)) for arm in arms if (records["arm"] == arm).any()
    ]
    p_values = [
        sign_flip_p(table.groupby("topic")["difference"].mean().tolist(), seed=seed)
        for _, table in found
    ]
    adjusted = holm(p_values)
    return [
        Comparison(
            arm=arm,
            control=best,
            difference=(interval := _interval(table, seed)),
            p=p,
            p_holm=p_holm,
            is_equivalent=equivalent(_interval(table, seed, level=0.90), MARGIN) and interval.n > 0,
        )
        for (arm, table), p, p_holm in zip(found, p_values, adjusted, strict=True)
    ]


def paired(records: pd.DataFrame, arm: str, control: str, value: str = "hit") -> pd.DataFrame:
    """Differences by topic and place; prompts are matched by their place, since one arm puts a
    sentence before them."""
    sides = []
    for name in (arm, control):
        part = records[records["arm"] == name].copy()
        part["place"] = part.groupby("topic").cumcount()
        sides.append(part.set_index(["topic", "place"]))
    both = sides[0].join(sides[1][[value]], rsuffix="_control", how="inner").reset_index()
    return both.assign(
        difference=both[value].astype(float) - both[f"{value}_control"].astype(float)
    )


def topic_means(records: pd.DataFrame, arm: str, value: str = "hit") -> pd.Series:
    return records[records["arm"] == arm].groupby("topic")[value].mean()


def sign_flip_p(differences: Sequence[float], *, seed: int, n: int = 20_000) -> float:
    """P of a mean at least this far from 0 if signs were random; exact up to 14 units."""
    values = np.asarray(differences, dtype=np.float64)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return 1.0 if len(values) else float("nan")
    found = scipy.stats.permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        n_resamples=np.inf if len(values) <= 14 else n,
        rng=seed,
    )
    return float(found.pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p))))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted.tolist()


def equivalent(interval: Interval, margin: float) -> bool:
    """Whether an interval at level 1 − 2α lies within ±margin: the two one-sided tests at α."""
    return -margin < interval.low and interval.high < margin


def _interval(table: pd.DataFrame, seed: int, *, level: float = 0.95) -> Interval:
    keys = [table["topic"].tolist(), table["prompt"].tolist()]
    return bootstrap_mean(table["difference"].tolist(), keys, seed=seed, level=level, n=2000)


def _as_unsteered(path: Path) -> list[dict[str, Any]]:
    """Intent to treat: a vacuous arm has the unsteered samples of its topic."""
    key = "topical_records" if path.stem in SUPPRESSION_ARMS else "records"
    base = json.loads(path.with_name(f"{UNSTEERED}.json").read_text(encoding="utf-8"))
    return [{"topic": path.parent.name, "arm": path.stem, **record} for record in base[key]]
