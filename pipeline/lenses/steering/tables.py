"""What steering found, as tables, as text side by side, as the atlas' document, as figures and as
headline numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from featureflow.sites import FeatureId
from pipeline.describe.features import Features
from pipeline.describe.labels import NO_RULE, TOO_RARE
from pipeline.lenses.steering.selection import Chosen
from steering.figures import draw_dose_response, draw_forest, draw_tradeoff
from steering.trial import ArmDose, Effect, Twin

HEADLINE_ARM = "flow"
_SHOWN_PER_ARM = 3


def sample_table(chosen: Chosen, twins: Sequence[Twin]) -> pd.DataFrame:
    """One row a steered sample, its unsteered twin beside it."""
    return pd.DataFrame(
        {
            "feature": str(chosen.flow.seed),
            "arm": twin.arm_dose.arm,
            "target": twin.arm_dose.target,
            "dose": twin.arm_dose.outcome.measured.kl,
            "strength": twin.arm_dose.plan.strength,
            "nodes": ", ".join(node.at for node in twin.arm_dose.plan.nodes),
            "prompt": twin.steered.prompt,
            "sample": twin.steered.sample,
            "unsteered": twin.unsteered.text,
            "steered": twin.steered.text,
            "own_tokens_unsteered": twin.before.own_tokens[0],
            "own_tokens_steered": twin.after.own_tokens[0],
            "active_unsteered": twin.before.active[0],
            "active_steered": twin.after.active[0],
            "nll_unsteered": twin.before.nll,
            "nll_steered": twin.after.nll,
            "log_prob_steered": sum(twin.steered.log_probs),
        }
        for twin in twins
    )


def dose_table(chosen: Chosen, arm_doses: Sequence[ArmDose]) -> pd.DataFrame:
    """One row an arm and dose: what was asked, what was reached, and what it did to neutral
    text."""
    return pd.DataFrame(_dose_row(chosen, each) for each in arm_doses)


def _dose_row(chosen: Chosen, each: ArmDose) -> dict[str, Any]:
    measured = each.outcome.measured
    nodes = measured.report.nodes
    return {
        "feature": str(chosen.flow.seed),
        "arm": each.arm,
        "target": each.target,
        "kl": measured.kl,
        "kl_p95": measured.kl_p95,
        "reached": each.outcome.reached,
        "strength": each.plan.strength,
        "n_nodes": len(each.plan.nodes),
        "same_choice": measured.same_choice,
        "delta_ce": measured.delta_ce,
        "n_touched": measured.report.n_touched(),
        "relative_size": sum(node.relative_size for node in nodes) / len(nodes),
        "persistence": each.persistence,
        "n_evaluations": each.outcome.n_evaluations,
    }


def effect_table(
    chosen: Chosen, arm_doses: Sequence[ArmDose], effects: Sequence[Effect]
) -> pd.DataFrame:
    """One row an arm, dose and measure: means, and the paired difference with its interval."""
    measured = {(each.arm, each.target): each.outcome.measured.kl for each in arm_doses}
    return pd.DataFrame(
        {
            "feature": str(chosen.flow.seed),
            "arm": effect.arm,
            "target": effect.dose,
            "dose": measured[effect.arm, effect.dose],
            "measure": effect.measure,
            "unsteered": effect.unsteered,
            "steered": effect.steered,
            "difference": effect.difference.mean,
            "low": effect.difference.low,
            "high": effect.difference.high,
            "n": effect.difference.n,
        }
        for effect in effects
    )


def feature_records(
    chosen: Sequence[Chosen], labels: Mapping[str, str], decode: Any
) -> list[dict[str, Any]]:
    """Why each feature was taken: its label, what it reads and writes, its flow."""
    return [
        {
            "feature": str(each.flow.seed),
            "label": labels.get(str(each.flow.seed), ""),
            "density": each.profile.density,
            "own_tokens": [decode([token]) for token in each.profile.own_tokens],
            "purity": each.profile.purity,
            "own_token_probability": {"unsteered": each.score.before, "steered": each.score.after},
            "audition": None if each.audition is None else dataclasses.asdict(each.audition),
            "flow": [
                {"feature": str(feature), "cosine": cosine} for feature, cosine in each.flow.steps
            ],
            "placebo": [str(feature) for feature, _ in each.placebo.steps],
            "n_silent_steps": each.n_silent_steps,
        }
        for each in chosen
    ]


def side_by_side(samples: pd.DataFrame) -> list[dict[str, Any]]:
    """The same samples as readable records."""
    columns = ["feature", "arm", "target", "dose", "prompt", "sample", "unsteered", "steered"]
    return samples[columns].to_dict(orient="records")


def atlas_document(
    samples: pd.DataFrame,
    effects: pd.DataFrame,
    labels: Mapping[str, str],
    *,
    schedule: str,
    seed: int,
) -> dict[str, Any]:
    """`attached/steering` of docs/decisions/0003-atlas-shards.md; the first samples of each arm and
    dose."""
    shown = samples.groupby(["feature", "arm", "target"], sort=False).head(_SHOWN_PER_ARM)
    return {
        "version": 1,
        "samples": [
            _atlas_sample(row, labels, schedule, seed) for row in shown.to_dict(orient="records")
        ],
        "effects": [_atlas_effect(row) for row in effects.to_dict(orient="records")],
        "commands": {
            feature: f"featureflow steer --steer.features '{json.dumps([feature])}'"
            for feature in samples["feature"].unique()
        },
    }


def _atlas_sample(
    row: Mapping[Any, Any], labels: Mapping[str, str], schedule: str, seed: int
) -> dict[str, Any]:
    return {
        "feature": row["feature"],
        "label": labels.get(row["feature"], ""),
        "arm": row["arm"].replace("_", " "),
        "dose": round(row["dose"], 4),
        "schedule": schedule,
        "features": row["nodes"].split(", "),
        "seed": seed,
        "prompt": row["prompt"],
        "unsteered": row["unsteered"],
        "steered": row["steered"],
        "measure": {
            "name": "own tokens per 100",
            "unsteered": round(row["own_tokens_unsteered"], 2),
            "steered": round(row["own_tokens_steered"], 2),
        },
    }


def _atlas_effect(row: Mapping[Any, Any]) -> dict[str, Any]:
    names = {
        "own_tokens": "own tokens per 100",
        "active": "share of tokens where the feature fires",
    }
    return {
        "feature": row["feature"],
        "arm": row["arm"].replace("_", " "),
        "dose": round(row["dose"], 4),
        "name": names.get(row["measure"], row["measure"]),
        "mean": row["difference"],
        "low": row["low"],
        "high": row["high"],
        "n": row["n"],
    }


def headline(effects: pd.DataFrame, doses: pd.DataFrame, dose: float) -> dict[str, Any]:
    """How many features steering moved, and by how much, for the arm and dose settled
    beforehand."""
    arm = HEADLINE_ARM if HEADLINE_ARM in set(effects["arm"]) else str(effects["arm"].iloc[0])
    own = effects[(effects["arm"] == arm) & (effects["target"] == dose)].set_index("measure")
    n_features = effects["feature"].nunique()
    numbers: dict[str, Any] = {"n_features": n_features, "arm": arm, "dose": dose}
    for measure in ("own_tokens", "active"):
        part = own.loc[[measure]]
        numbers[f"{measure}_unsteered"] = round(float(part["unsteered"].mean()), 4)
        numbers[f"{measure}_steered"] = round(float(part["steered"].mean()), 4)
        numbers[f"n_features_raised_{measure}"] = int((part["low"] > 0).sum())
    numbers["coherent_unsteered"] = round(float(own.loc[["coherent"]]["unsteered"].mean()), 4)
    numbers["coherent_steered"] = round(float(own.loc[["coherent"]]["steered"].mean()), 4)
    numbers["n_doses_not_reached"] = int((~doses["reached"]).sum())
    numbers["chosen_on"] = "development openers, choice.json"
    return numbers


def draw_figures(effects: pd.DataFrame, folder: Path, dose: float) -> None:
    folder.mkdir(exist_ok=True)
    draw_dose_response(effects, folder / "dose_response.png")
    draw_tradeoff(effects, folder / "concept_and_fluency.png")
    draw_forest(effects, folder / "effects.png", measure="active", target=dose)


def labels_of(features: Features, chosen: Sequence[Chosen]) -> dict[str, str]:
    """The labels of the chosen features."""
    return {str(each.flow.seed): features.label_of(str(each.flow.seed)) for each in chosen}


def has_label(features: Features) -> Callable[[FeatureId], bool]:
    """Whether a feature has a label that held on documents it was not made from."""
    return lambda feature: (
        bool(label := features.label_of(feature)) and not label.startswith((NO_RULE, TOO_RARE))
    )
