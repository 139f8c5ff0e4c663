"""The study's results: one table, tests against the strongest control, and a page that says what
was found.

The unit is the topic. Per topic and arm: the share of test samples that succeed and stay coherent
(`SuccCoh`); a vacuous arm counts as unsteered. An arm's gain over a control is the mean over topics
of paired differences, with a bootstrap over topics, prompts and samples; p by sign flips of topics,
Holm over the arms compared; equivalence by two one-sided tests at ±0.05. "Flow helps" means: the
best flow arm beats the *best* of single, single_budget and copied. Suppression is apart: on topical
prompts a sample should be coherent and no longer about the topic. Figures and the table of
development doses: pipeline/lenses/steering/study_figures.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featureflow.errors import UserError
from featureflow.statistics import Interval, bootstrap_mean, equivalent, holm, sign_flip_p
from pipeline.lenses.steering.study_options import SUPPRESSION_ARMS, UNSTEERED

CONTROLS = ("single", "single_budget", "copied")
FLOWS = ("flow", "flow_exponential", "flow_cosines", "flow_closed_loop")
SUPPRESSION_CONTROLS = ("suppress_single", "suppress_random_flow")
MARGIN = 0.05
N_FOR_A_CLAIM = 12
_N_SHOWN = 5


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


def arm_table(folder: Path, records: pd.DataFrame, *, seed: int = 0) -> pd.DataFrame:
    """One row an arm: SuccCoh with its interval, success, coherence, lexicon, dose, selectivity,
    vacuous topics."""
    rows = []
    for arm, part in records.groupby("arm", sort=True):
        documents = [
            json.loads(path.read_text(encoding="utf-8"))
            for path in sorted((folder / "test").glob(f"*/{arm}.json"))
        ]
        keys = [part["topic"].tolist(), part["prompt"].tolist()]
        interval = bootstrap_mean(part["hit"].astype(float).tolist(), keys, seed=seed, n=1000)
        rows.append(
            {
                "arm": arm,
                "succ_coh": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "success": part["success"].mean(),
                "coherent": part["coherent"].mean(),
                "lexicon_rate": part["lexicon_rate"].mean(),
                "nll": part["nll"].mean(),
                "kl": _mean_of(documents, "kl"),
                "selectivity": _mean_of(documents, "selectivity"),
                "n_vacuous": sum(bool(document.get("vacuous")) for document in documents),
                "n_topics": part["topic"].nunique(),
            }
        )
    return pd.DataFrame(rows)


def write_report(folder: Path, out: Path, *, seed: int = 0, about: str = "") -> Path:
    """The page in Markdown, figures in `images/<name of the page>` beside it. Returns its path."""
    from pipeline.lenses.steering.study_figures import (
        developed,
        developed_doses,
        draw_study,
        selectivity_at_equal_dose,
    )

    records = read_records(folder)
    arms = arm_table(folder, records, seed=seed)
    against_controls = compare(records, FLOWS, CONTROLS, seed=seed)
    against_unsteered = compare(
        records, sorted(set(arms["arm"]) - _not_activation()), (UNSTEERED,), seed=seed
    )
    suppressed = _compared_suppression(records, seed)
    by_topic = developed(folder)
    doses = developed_doses(by_topic)
    equal = selectivity_at_equal_dose(by_topic, FLOWS, ("single", "copied"), seed=seed)
    pictures = draw_study(
        records, doses, out.parent / "images" / out.stem, against_controls, seed=seed
    )
    lines = [
        "# Steering study",
        "",
        about,
        "",
        f"{records['topic'].nunique()} topics ({N_FOR_A_CLAIM} are needed for a claim; with n "
        "topics no sign-flip p "
        f"is below 2/2^n). SuccCoh: share of samples "
        "that the topic's classifier accepts (5 % of unsteered development text passes) and that "
        "stay coherent. "
        "Vacuous arms (no dose left development text coherent) count as unsteered.",
        "",
        f"- Activation: {verdict(against_controls)}",
        f"- Suppression: {verdict(suppressed)}",
        f"- Teacher-forced, equal dose: {equal_dose_verdict(equal)}",
        "",
        *(f"![{name}](images/{out.stem}/{name}.png)" for name in pictures),
        "",
        "## Arms, on test prompts at the doses that development chose",
        "",
        *_markdown(arms),
        "",
        "## Does flow beat the best budget-matched control?",
        "",
        *_markdown(_comparison_table(against_controls)),
        "",
        *_markdown(_topic_table(records, against_controls)),
        "",
        *_dose_section(doses, equal),
        "## Each arm against unsteered text",
        "",
        *_markdown(_comparison_table(against_unsteered)),
        "",
        "## Suppression, on topical prompts",
        "",
        *_markdown(_suppression_table(records, seed)),
        "",
        *_markdown(_comparison_table(suppressed)),
        "",
        "## Samples, drawn at random",
        "",
        *_samples(records, seed),
    ]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out


def _dose_section(doses: pd.DataFrame, equal: pd.DataFrame) -> list[str]:
    """What development saw at every dose: selectivity by arm, flow against controls at equal dose,
    samples."""
    return [
        "## At which dose? Development texts and prompts, all doses",
        "",
        *_markdown(_by_dose(doses, "selectivity")),
        "",
        "Selectivity by arm and dose: rise of the log-likelihood of definitions of the topic minus "
        "that of others, "
        "nats a token, teacher-forced. Nothing is sampled and nothing was chosen by it.",
        "",
        *_markdown(equal),
        "",
        "Flow arms against the better of `single` and `copied` at the same dose (`single_budget` "
        "has none of its own), "
        "bootstrap over topics.",
        "",
        *_markdown(_by_dose(doses, "succ_coh")),
        "",
        "SuccCoh by arm and dose (nats; of suppression: share of samples coherent and off topic). "
        "Exploratory: the "
        "lock was chosen on these samples.",
        "",
    ]


def _by_dose(doses: pd.DataFrame, value: str) -> pd.DataFrame:
    return doses.pivot_table(index="arm", columns="target", values=value, sort=False).reset_index()


def _compared_suppression(records: pd.DataFrame, seed: int) -> list[Comparison]:
    if not (records["arm"] == SUPPRESSION_CONTROLS[0]).any():
        return []
    return compare(records, ("suppress_flow",), SUPPRESSION_CONTROLS, seed=seed, value="removed")


def _topic_table(records: pd.DataFrame, comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """SuccCoh of every flow arm and control, a row a topic."""
    shown = [arm for arm in (UNSTEERED, *CONTROLS, *FLOWS) if (records["arm"] == arm).any()]
    table = pd.DataFrame({arm: topic_means(records, arm) for arm in shown})
    return table.reset_index(names="topic")


def verdict(comparisons: Sequence[Comparison]) -> str:
    """One sentence, whatever was found."""
    if not comparisons:
        return "There is no flow arm to compare."
    best = max(comparisons, key=lambda c: c.difference.mean)
    change = (
        f"{best.difference.mean:+.3f} [{best.difference.low:+.3f}, {best.difference.high:+.3f}]"
    )
    if best.difference.low > 0 and best.p_holm < 0.05:
        return f"The arm {best.arm} beats {best.control}: {change}."
    if best.is_equivalent:
        return (
            f"The best flow arm, {best.arm}, and {best.control} are equivalent within "
            f"±{MARGIN}: {change}."
        )
    if best.difference.high < 0:
        return f"Every flow arm is worse than {best.control}; the best is {best.arm}: {change}."
    return (
        f"No flow arm beats {best.control}; the best is {best.arm}: {change}. Neither is "
        "equivalence shown."
    )


def equal_dose_verdict(table: pd.DataFrame) -> str:
    """What the arm `flow`, and the best flow arm, gain in selectivity over the better control, by
    dose."""
    if table.empty:
        return "no doses were developed."
    parts = []
    for dose, part in table.groupby("dose"):
        best = part.loc[part["difference"].idxmax()]
        change = f"{best['difference']:+.3f} [{best['low']:+.3f}, {best['high']:+.3f}]"
        parts.append(f"{dose:g} nats: {best['arm']} − {best['control']} {change}")
    return (
        "best flow arm minus the better of single and copied, selectivity in nats a token. "
        + "; ".join(parts)
        + "."
    )


def _as_unsteered(path: Path) -> list[dict[str, Any]]:
    """Intent to treat: a vacuous arm has the unsteered samples of its topic."""
    key = "topical_records" if path.stem in SUPPRESSION_ARMS else "records"
    base = json.loads(path.with_name(f"{UNSTEERED}.json").read_text(encoding="utf-8"))
    return [{"topic": path.parent.name, "arm": path.stem, **record} for record in base[key]]


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


def _interval(table: pd.DataFrame, seed: int, *, level: float = 0.95) -> Interval:
    keys = [table["topic"].tolist(), table["prompt"].tolist()]
    return bootstrap_mean(table["difference"].tolist(), keys, seed=seed, level=level, n=2000)


def topic_means(records: pd.DataFrame, arm: str, value: str = "hit") -> pd.Series:
    return records[records["arm"] == arm].groupby("topic")[value].mean()


def _suppression_table(records: pd.DataFrame, seed: int) -> pd.DataFrame:
    base = records[records["arm"] == "unsteered_topical"].groupby("topic")["success"].mean()
    rows = []
    for arm in SUPPRESSION_ARMS:
        part = records[records["arm"] == arm]
        if part.empty:
            continue
        after = part.groupby("topic")["success"].mean()
        share = ((base - after) / base.where(base > 0)).dropna()
        interval = bootstrap_mean(share.tolist(), seed=seed)
        rows.append(
            {
                "arm": arm,
                "success_before": base.mean(),
                "success_after": after.mean(),
                "removed_share": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "coherent": part["coherent"].mean(),
            }
        )
    return pd.DataFrame(rows)


def _samples(records: pd.DataFrame, seed: int) -> list[str]:
    lines = []
    for arm, part in records.groupby("arm", sort=True):
        lines += [f"### {arm}", ""]
        for row in part.sample(min(_N_SHOWN, len(part)), random_state=seed).itertuples():
            text = " ".join(str(row.text).split()).replace("|", "\\|")
            lines.append(f"- {row.topic}: *{row.prompt}* {text}")
        lines.append("")
    return lines


def _comparison_table(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "arm": c.arm,
            "control": c.control,
            "difference": c.difference.mean,
            "low": c.difference.low,
            "high": c.difference.high,
            "p": c.p,
            "p_holm": c.p_holm,
            f"equivalent_within_{MARGIN}": c.is_equivalent,
        }
        for c in comparisons
    )


def _markdown(table: pd.DataFrame) -> list[str]:
    if table.empty:
        return []

    def shown(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, (float, np.floating)) else str(value)

    head = "| " + " | ".join(str(name).replace("_", " ") for name in table.columns) + " |"
    body = [
        "| " + " | ".join(shown(value) for value in row) + " |"
        for row in table.itertuples(index=False)
    ]
    return [head, "|" + "---|" * len(table.columns), *body]


def _mean_of(documents: Sequence[Mapping[str, Any]], key: str) -> float:
    values = [document[key] for document in documents if document.get(key) is not None]
    return float(np.mean(values)) if values else float("nan")


def _not_activation() -> set[str]:
    return {UNSTEERED, "unsteered_topical", *SUPPRESSION_ARMS}
