"""The study's results: one table, tests against the strongest control, and a page that says what
was found.

"Flow helps" means: the best flow arm beats the *best* of single, single_budget and copied
(results.py). Suppression is apart: on topical prompts a sample should be coherent and no longer
about the topic. Figures and the table of development doses: figures.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.steering_study.figures import (
    developed,
    developed_doses,
    draw_study,
    selectivity_at_equal_dose,
)
from benchmarks.steering_study.options import SUPPRESSION_ARMS, UNSTEERED
from benchmarks.steering_study.results import MARGIN, Comparison, compare, read_records, topic_means
from featureflow.statistics import bootstrap_mean

CONTROLS = ("single", "single_budget", "copied")
FLOWS = ("flow", "flow_exponential", "flow_cosines", "flow_closed_loop")
SUPPRESSION_CONTROLS = ("suppress_single", "suppress_random_flow")
N_FOR_A_CLAIM = 12
_N_SHOWN = 5


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
