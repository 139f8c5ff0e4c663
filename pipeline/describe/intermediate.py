"""What one site leaves on disk between the survey and the writing of its pages: three .npz files of
plain arrays.

    <work>/<short>/columns.npz   the cards' columns
    pipeline/describe/columns.py
    <work>/<short>/rules.npz     every rule with its scores              pipeline/describe/labels.py
    <work>/<short>/held.npz      counts on choosing and held-out documents, so that rules of other
    sites can be
                                 judged here

The folder is renamed into place when it is whole, so a killed run goes on with the sites it had
finished.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pipeline.describe.columns import Columns
from pipeline.describe.counts import COLUMNS, Counts
from pipeline.describe.labels import Scored, SiteRules
from pipeline.describe.rules import RuleScores, RuleSets

_KEPT = ("n_choose", "strong_choose", "n_held", "strong_held", "mass_held", "near_held")
_SCORES = tuple(f.name for f in dataclasses.fields(RuleScores))


def is_surveyed(work: Path, short: str) -> bool:
    return (work / short).is_dir()


def save_site(
    work: Path, short: str, columns: Columns, rules: SiteRules, tables: Mapping[str, Counts]
) -> None:
    """Write the three files; visible under their name only when all are there."""
    partial = work / f"{short}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    np.savez(partial / "columns.npz", allow_pickle=False, **columns)
    np.savez(partial / "rules.npz", allow_pickle=False, best=rules.best, **_rule_arrays(rules))
    np.savez(partial / "held.npz", allow_pickle=False, **_table_arrays(tables))
    partial.rename(work / short)


def columns_path(work: Path, short: str) -> Path:
    return work / short / "columns.npz"


def load_columns(work: Path, short: str) -> Columns:
    with np.load(columns_path(work, short), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def load_rules(work: Path, short: str) -> SiteRules:
    with np.load(work / short / "rules.npz", allow_pickle=False) as arrays:
        methods = sorted({name.split("/")[0] for name in arrays.files if "/" in name})
        by_method = {method: _scored(arrays, method) for method in methods}
        return SiteRules(by_method=by_method, best=arrays["best"])


def load_tables(work: Path, short: str, n_latents: int) -> dict[str, Counts]:
    """What scoring needs of the tables; the columns for proposing are zeros."""
    tables = {}
    with np.load(work / short / "held.npz", allow_pickle=False) as arrays:
        for name in sorted({n.split("/")[0] for n in arrays.files}):
            kept = dict(zip(_KEPT, arrays[f"{name}/columns"].astype(np.float64), strict=True))
            nothing = np.zeros(len(arrays[f"{name}/key"]))
            tables[name] = Counts(
                n_latents=n_latents,
                n_values=int(arrays[f"{name}/n_values"]),
                key=arrays[f"{name}/key"].astype(np.int64),
                columns=tuple(kept.get(column, nothing) for column in COLUMNS),
            )
    return tables


def _rule_arrays(rules: SiteRules) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for method, scored in rules.by_method.items():
        arrays[f"{method}/attribute"] = np.array([scored.rules.attribute, scored.rules.target])
        arrays |= {f"{method}/{name}": getattr(scored.rules, name) for name in ("start", "value")}
        arrays[f"{method}/proposed"] = scored.rules.f1
        arrays |= {f"{method}/{name}": getattr(scored.scores, name) for name in _SCORES}
    return arrays


def _scored(arrays: Mapping[str, np.ndarray], method: str) -> Scored:
    return Scored(
        rules=RuleSets(
            attribute=str(arrays[f"{method}/attribute"][0]),
            target="strong" if arrays[f"{method}/attribute"][1] == "strong" else "all",
            start=arrays[f"{method}/start"],
            value=arrays[f"{method}/value"],
            f1=arrays[f"{method}/proposed"],
        ),
        scores=RuleScores(**{name: arrays[f"{method}/{name}"] for name in _SCORES}),
    )


def _table_arrays(tables: Mapping[str, Counts]) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    for name, table in tables.items():
        needed = np.flatnonzero(
            table.column("n_choose") + table.column("n_held") + table.column("near_held")
        )
        small = table.n_latents * table.n_values < 1 << 32
        arrays[f"{name}/key"] = table.key[needed].astype(np.uint32 if small else np.int64)
        arrays[f"{name}/columns"] = np.stack(
            [table.column(c)[needed].astype(np.float32) for c in _KEPT]
        )
        arrays[f"{name}/n_values"] = np.array(table.n_values)
    return arrays
