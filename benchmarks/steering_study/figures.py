"""Figures of a study, and the table of development doses behind them.

`arms`: SuccCoh on test with intervals. `topics`: the best flow arm against the best control, a row
a topic. `doses`: development SuccCoh and coherence against dose. `fluency`: success against
coherence with the Pareto front. `asymmetry`: activation against suppression along the flow, a point
a topic.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.steering_study.options import ACTIVATION_ARMS, SUPPRESSION_ARMS, UNSTEERED
from benchmarks.steering_study.results import Comparison, paired
from featureflow.figures import COLOURS, panels, save
from featureflow.statistics import bootstrap_mean
from pipeline.lenses.steering.figures import curves, front, intervals

_PANELS = {
    "selectivity": "selectivity, nats a token",
    "succ_coh": "SuccCoh",
    "coherent": "share coherent",
}
_COLUMNS = ["topic", "arm", "target", "kl", "selectivity", "succ_coh", "success", "coherent"]
_SHOWN = ("difference_single", "random_flow", "single", "copied", "flow", "flow_closed_loop")


def developed(folder: Path) -> pd.DataFrame:
    """One row a tested topic, arm and dose: selectivity, SuccCoh (suppression: coherent and off
    topic), coherence."""
    rows: list[dict[str, Any]] = []
    for path in sorted((folder / "dev").glob("*/*.json")):
        is_tested = (folder / "test" / path.parent.name).is_dir()
        if path.stem not in (*ACTIVATION_ARMS, *SUPPRESSION_ARMS) or not is_tested:
            continue
        for entry in json.loads(path.read_text(encoding="utf-8"))["doses"]:
            rows += [_dose_row(path.parent.name, path.stem, entry)] if entry.get("records") else []
    return pd.DataFrame(rows, columns=_COLUMNS)


def developed_doses(table: pd.DataFrame) -> pd.DataFrame:
    """The means over topics of what `developed` gives, arms in their order."""
    order = {arm: place for place, arm in enumerate((*ACTIVATION_ARMS, *SUPPRESSION_ARMS))}
    grouped = (
        table.drop(columns="topic").groupby(["arm", "target"], sort=False).mean().reset_index()
    )
    return grouped.sort_values("arm", key=lambda arms: arms.map(order), kind="stable").reset_index(
        drop=True
    )


def selectivity_at_equal_dose(
    table: pd.DataFrame, arms: Sequence[str], controls: Sequence[str], *, seed: int
) -> pd.DataFrame:
    """One row an arm and dose: selectivity minus that of the control that is best at the dose,
    paired over topics."""
    rows = []
    for target, part in table.groupby("target"):
        by_arm = part.pivot_table(index="topic", columns="arm", values="selectivity")
        best = max(
            (control for control in controls if control in by_arm),
            key=lambda name: by_arm[name].mean(),
        )
        for arm in (arm for arm in arms if arm in by_arm):
            differences = (by_arm[arm] - by_arm[best]).dropna().tolist()
            found = bootstrap_mean(differences, seed=seed)
            rows.append(
                {
                    "dose": target,
                    "arm": arm,
                    "control": best,
                    "difference": found.mean,
                    "low": found.low,
                    "high": found.high,
                    "topics above": sum(d > 0 for d in differences),
                }
            )
    return pd.DataFrame(rows)


def draw_study(
    records: pd.DataFrame,
    doses: pd.DataFrame,
    folder: Path,
    comparisons: Sequence[Comparison],
    *,
    seed: int,
) -> list[str]:
    """Draw what there is data for; the names of the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {
        "arms": intervals(
            _arm_intervals(records, seed),
            xlabel="SuccCoh",
            title="Samples about the topic and coherent, test prompts; bars: 95 % over topics",
            zero=None,
        )
    }
    if comparisons:
        drawn["topics"] = intervals(
            _by_topic(records, comparisons, seed),
            xlabel="difference of SuccCoh",
            title=_versus(comparisons),
        )
    active = doses[doses["arm"].isin(_SHOWN)]
    if len(active):
        drawn["doses"] = curves(
            [(active.assign(value=active[column]), name) for column, name in _PANELS.items()],
            x="kl",
            xlabel="dose (nats on neutral text)",
            title="Development prompts, mean over topics",
        )
        drawn["fluency"] = front(
            active,
            x="coherent",
            y="success",
            xlabel="share of samples coherent",
            ylabel="share of samples about the topic",
        )
    asymmetry = _asymmetry(records)
    if len(asymmetry):
        drawn["asymmetry"] = _draw_asymmetry(asymmetry)
    for name, figure in drawn.items():
        save(figure, folder / f"{name}.png")
    return list(drawn)


def _dose_row(topic: str, arm: str, entry: dict[str, Any]) -> dict[str, Any]:
    success = np.array([record["success"] for record in entry["records"]])
    coherent = np.array([record["coherent"] for record in entry["records"]])
    hit = (~success if arm in SUPPRESSION_ARMS else success) & coherent
    return {
        "topic": topic,
        "arm": arm,
        "target": entry["dose"],
        "kl": entry["kl"],
        "selectivity": entry["selectivity"],
        "succ_coh": hit.mean(),
        "success": success.mean(),
        "coherent": coherent.mean(),
    }


def _arm_intervals(records: pd.DataFrame, seed: int) -> pd.DataFrame:
    rows = []
    for arm, part in records[
        ~records["arm"].isin([*SUPPRESSION_ARMS, "unsteered_topical"])
    ].groupby("arm"):
        keys = [part["topic"].tolist(), part["prompt"].tolist()]
        found = bootstrap_mean(part["hit"].astype(float).tolist(), keys, seed=seed, n=1000)
        rows.append({"name": arm, "mean": found.mean, "low": found.low, "high": found.high})
    return pd.DataFrame(rows).sort_values("mean", ascending=False)


def _by_topic(records: pd.DataFrame, comparisons: Sequence[Comparison], seed: int) -> pd.DataFrame:
    best = max(comparisons, key=lambda c: c.difference.mean)
    table = paired(records, best.arm, best.control)
    rows = []
    for topic, part in table.groupby("topic"):
        found = bootstrap_mean(
            part["difference"].tolist(), [part["prompt"].tolist()], seed=seed, n=1000
        )
        rows.append({"name": topic, "mean": found.mean, "low": found.low, "high": found.high})
    whole = best.difference
    rows.append({"name": "all topics", "mean": whole.mean, "low": whole.low, "high": whole.high})
    return pd.DataFrame(rows)


def _versus(comparisons: Sequence[Comparison]) -> str:
    best = max(comparisons, key=lambda c: c.difference.mean)
    return f"{best.arm} minus {best.control}, test prompts"


def _asymmetry(records: pd.DataFrame) -> pd.DataFrame:
    """A = (p_s − p_0)/(1 − p_0) of `flow` on neutral prompts, R = (p_0 − p_s)/p_0 of
    `suppress_flow` on topical ones; p is the share of samples about the topic."""
    shares = records.groupby(["arm", "topic"])["success"].mean()
    arms = set(records["arm"])
    if not {"flow", "suppress_flow", UNSTEERED, "unsteered_topical"} <= arms:
        return pd.DataFrame(columns=["name", "activation", "suppression"])
    activation = (shares["flow"] - shares[UNSTEERED]) / (1 - shares[UNSTEERED])
    topical = shares["unsteered_topical"].where(lambda share: share > 0)
    suppression = (topical - shares["suppress_flow"]) / topical
    table = pd.DataFrame({"activation": activation, "suppression": suppression}).dropna()
    return table.reset_index(names="name")


def _draw_asymmetry(table: pd.DataFrame) -> Figure:
    """Activation against suppression, a point a topic: on the diagonal both are as easy."""
    figure, (axis,) = panels()
    axis.scatter(table["activation"], table["suppression"], s=16)
    for entry in table.itertuples():
        place = (entry.activation, entry.suppression)
        axis.annotate(entry.name, place, fontsize=6, xytext=(3, 3), textcoords="offset points")
    low, high = min(0.0, float(table[["activation", "suppression"]].min().min())), 1.0
    axis.plot([low, high], [low, high], color=COLOURS[-1], linestyle=":", linewidth=0.8)
    axis.set(
        xlabel="activation: share of the possible rise reached",
        ylabel="suppression: share of the successes removed",
        title="Along the flow, a point a topic",
    )
    return figure
