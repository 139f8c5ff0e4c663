"""The steering artifact's page, `report.html`: what was steered, whether it did anything, and
samples to judge by.

Samples are drawn with the stage's seed, the same (prompt, sample) pairs for every arm of a feature
and dose, the paired unsteered sample beside each; the feature's top tokens are marked. Nothing is
picked by hand, and all text is escaped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

PAGE = "report.html"
_SHOWN = 3
_COLUMNS = {
    "top_tokens": "top tokens in 100",
    "active": "share of tokens active",
    "coherent": "share coherent",
    "nll": "nats a token",
}


def write_steer_report(
    folder: Path,
    samples: pd.DataFrame,
    effects: pd.DataFrame,
    features: Sequence[Mapping[str, Any]],
    remarks: Sequence[str],
    headline: Mapping[str, Any],
    *,
    dose: float,
    seed: int,
    examples: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Write the page into the artifact's folder and return its path."""
    environment = Environment(loader=PackageLoader("pipeline.stages", "templates"), autoescape=True)
    figures = [folder / "figure.png", *sorted(folder.glob("figures/*.png"))]
    page = environment.get_template("steer_report.html").render(
        headline=[(name.replace("_", " "), value) for name, value in headline.items()],
        remarks=remarks,
        dose=dose,
        examples=examples,
        columns=list(_COLUMNS.values()),
        figures=[
            {"href": quote(str(path.relative_to(folder))), "title": path.stem.replace("_", " ")}
            for path in figures
            if path.is_file()
        ],
        features=[
            _feature(record, samples[samples["feature"] == record["feature"]], effects, seed)
            for record in features
        ],
    )
    path = folder / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def _feature(
    record: Mapping[str, Any], samples: pd.DataFrame, effects: pd.DataFrame, seed: int
) -> dict[str, Any]:
    own = effects[effects["feature"] == record["feature"]]
    drawn = _drawn(samples, seed)
    mark = _marker(record["top_tokens"])
    doses = [
        {
            "target": target,
            "rows": _rows(own[own["target"] == target]),
            "arms": [
                {
                    "arm": arm.replace("_", " "),
                    "samples": [_sample(row, mark) for row in rows.itertuples()],
                }
                for arm, rows in drawn[drawn["target"] == target].groupby("arm", sort=False)
            ],
        }
        for target in sorted(samples["target"].unique())
    ]
    return {**record, "doses": doses, "anchor": str(record["feature"]).replace("/", "-")}


def _drawn(samples: pd.DataFrame, seed: int) -> pd.DataFrame:
    """The same few (prompt, sample) pairs for every arm and dose."""
    pairs = samples[["prompt", "sample"]].drop_duplicates().reset_index(drop=True)
    chosen = np.random.default_rng(seed).choice(
        len(pairs), size=min(_SHOWN, len(pairs)), replace=False
    )
    return samples.merge(pairs.iloc[np.sort(chosen)], on=["prompt", "sample"])


def _rows(effects: pd.DataFrame) -> list[dict[str, Any]]:
    """An arm's measures: steered, and in brackets the paired difference's interval."""
    rows = []
    for arm, part in effects.groupby("arm", sort=False):
        by_measure = part.set_index("measure")
        cells = [_cell(by_measure.loc[name]) for name in _COLUMNS]
        rows.append({"arm": str(arm).replace("_", " "), "cells": cells})
    before = effects.groupby("measure")["unsteered"].first()
    return [{"arm": "unsteered", "cells": [f"{before[name]:.3g}" for name in _COLUMNS]}, *rows]


def _cell(effect: pd.Series) -> str:
    return f"{effect['steered']:.3g} ({effect['low']:+.2g} to {effect['high']:+.2g})"


def _sample(row: Any, mark: re.Pattern[str] | None) -> dict[str, Any]:
    return {
        "prompt": row.prompt,
        "unsteered": _marked(row.unsteered, mark),
        "steered": _marked(row.steered, mark),
    }


def _marker(tokens: Sequence[str]) -> re.Pattern[str] | None:
    """Matches the feature's top tokens where they stand as words."""
    words = sorted({token.strip() for token in tokens if token.strip()}, key=len, reverse=True)
    return (
        re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, words)) + r")(?!\w)") if words else None
    )


def _marked(text: str, mark: re.Pattern[str] | None) -> Markup:
    if mark is None:
        return escape(text)
    parts, end = [], 0
    for match in mark.finditer(text):
        parts += [
            escape(text[end : match.start()]),
            Markup("<mark>"),
            escape(match[0]),
            Markup("</mark>"),
        ]
        end = match.end()
    return Markup("").join([*parts, escape(text[end:])])
