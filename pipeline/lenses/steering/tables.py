"""What steering found, as tables, as text side by side, as the atlas' document, as figures and as
headline numbers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pandas as pd

from featureflow.sites import FeatureId
from pipeline.describe.labels import NO_RULE, TOO_RARE
from pipeline.findings import Finding
from pipeline.lenses.steering.figures import dose_response
from pipeline.lenses.steering.selection import Chosen
from pipeline.lenses.steering.trial import ArmDose, Trial
from pipeline.run import Run

HEADLINE_ARM = "flow"
_SHOWN_PER_ARM = 3


def sample_table(trial: Trial) -> pd.DataFrame:
    """One row a steered sample, its paired unsteered samples beside it."""
    return pd.DataFrame(
        {
            "feature": str(trial.target.feature),
            "arm": pair.arm_dose.arm,
            "target": pair.arm_dose.target,
            "dose": pair.arm_dose.outcome.measured.kl,
            "strength": pair.arm_dose.plan.strength,
            "nodes": ", ".join(node.at for node in pair.arm_dose.plan.nodes),
            "prompt": pair.steered.prompt,
            "sample": pair.steered.sample,
            "unsteered": pair.unsteered.text,
            "steered": pair.steered.text,
            "top_tokens_unsteered": pair.before.top_tokens[0],
            "top_tokens_steered": pair.after.top_tokens[0],
            "active_unsteered": pair.before.active[0],
            "active_steered": pair.after.active[0],
            "nll_unsteered": pair.before.nll,
            "nll_steered": pair.after.nll,
            "log_prob_steered": sum(pair.steered.log_probs),
        }
        for pair in trial.pairs
    )


def dose_table(trial: Trial) -> pd.DataFrame:
    """One row an arm and dose: what was asked, what was reached, and what it did to neutral
    text."""
    return pd.DataFrame(_dose_row(trial, each) for each in trial.arm_doses)


def _dose_row(trial: Trial, each: ArmDose) -> dict[str, Any]:
    measured = each.outcome.measured
    nodes = measured.report.nodes
    return {
        "feature": str(trial.target.feature),
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


def effect_table(trial: Trial) -> pd.DataFrame:
    """One row an arm, dose and measure: means, and the paired difference with its interval."""
    measured = {(each.arm, each.target): each.outcome.measured.kl for each in trial.arm_doses}
    return pd.DataFrame(
        {
            "feature": str(trial.target.feature),
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
        for effect in trial.effects
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
            "top_tokens": [decode([token]) for token in each.profile.top_tokens],
            "purity": each.profile.purity,
            "top_token_probability": {"unsteered": each.score.before, "steered": each.score.after},
            "screening": None if each.screening is None else dataclasses.asdict(each.screening),
            "flow": [
                {"feature": str(feature), "cosine": cosine} for feature, cosine in each.flow.steps
            ],
            "control": [str(feature) for feature, _ in each.control.steps],
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
            "name": "top tokens per 100",
            "unsteered": round(row["top_tokens_unsteered"], 2),
            "steered": round(row["top_tokens_steered"], 2),
        },
    }


def _atlas_effect(row: Mapping[Any, Any]) -> dict[str, Any]:
    names = {
        "top_tokens": "top tokens per 100",
        "active": "share of tokens where the feature is active",
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
    for measure in ("top_tokens", "active"):
        part = own.loc[[measure]]
        numbers[f"{measure}_unsteered"] = round(float(part["unsteered"].mean()), 4)
        numbers[f"{measure}_steered"] = round(float(part["steered"].mean()), 4)
        numbers[f"n_features_raised_{measure}"] = int((part["low"] > 0).sum())
    numbers["coherent_unsteered"] = round(float(own.loc[["coherent"]]["unsteered"].mean()), 4)
    numbers["coherent_steered"] = round(float(own.loc[["coherent"]]["steered"].mean()), 4)
    numbers["n_doses_not_reached"] = int((~doses["reached"]).sum())
    numbers["chosen_on"] = "development prompts, choice.json"
    return numbers


def finding_of(
    effects: pd.DataFrame, doses: pd.DataFrame, dose: float, remarks: Sequence[str]
) -> Finding:
    """The measured part of the stage. `columns`: what steering a feature along its flow did."""
    numbers = headline(effects, doses, dose)
    at = effects[(effects["arm"] == numbers["arm"]) & (effects["target"] == dose)]
    by_feature = {measure: part.set_index("feature") for measure, part in at.groupby("measure")}
    columns = pd.DataFrame(
        {
            "top tokens in 100, steered": by_feature["top_tokens"]["steered"],
            "top tokens in 100, unsteered": by_feature["top_tokens"]["unsteered"],
            "share coherent, steered": by_feature["coherent"]["steered"],
        }
    )
    return Finding(
        tables={"effects": effects, "doses": doses},
        text=_text(numbers, remarks),
        headline=numbers,
        figure=lambda: dose_response(effects),
        columns=columns.rename_axis("feature").reset_index(),
    )


def _text(numbers: Mapping[str, Any], remarks: Sequence[str]) -> str:
    n = numbers["n_features"]
    return "\n\n".join(
        [
            f"At {numbers['dose']:g} nats, the arm {numbers['arm']} raises the top tokens of "
            f"{numbers['n_features_raised_top_tokens']} of {n} features (interval above 0): "
            f"{numbers['top_tokens_unsteered']:.2f} in 100 tokens unsteered, "
            f"{numbers['top_tokens_steered']:.2f} steered. Coherent are "
            f"{numbers['coherent_steered']:.0%} of the steered and "
            f"{numbers['coherent_unsteered']:.0%} of the unsteered texts.",
            "The dose was chosen on other prompts than these (choice.json). Features that were "
            "not named were chosen because they can be steered: this says nothing about all "
            "features.",
            *remarks,
        ]
    )


def labels_of(run: Run, chosen: Sequence[Chosen]) -> dict[str, str]:
    """The labels of the chosen features."""
    return {str(each.flow.seed): run.features.label_of(str(each.flow.seed)) for each in chosen}


def has_label(run: Run) -> Callable[[FeatureId], bool]:
    """Whether a feature has a label that held on documents it was not made from."""
    return lambda feature: (
        bool(label := run.features.label_of(feature)) and not label.startswith((NO_RULE, TOO_RARE))
    )
