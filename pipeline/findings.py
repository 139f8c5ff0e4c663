"""What a lens found, and its form on disk.

`tables/<name>.parquet` and `.csv`, `columns.parquet` and `.csv` (one row a feature, shown on its
card), `figure.png` and `.svg`, `text.md`,
`arrays.safetensors` (numbers for other lenses), and `finding.json`:

    {"name", "title", "headline": {…}, "figure": true, "columns": [{"name", "kind"}, …] or null,
     "tables": {"summary": {"rows": 12, "columns": [{"name", "kind"}, …]}, …}}

The kind of a column is `number`, `text`, `feature` or `site`. The last two follow from its name:
`feature` and `*_feature` hold ids such as `L12/402`, `site` and `*_site` short names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

from featureflow.errors import Command, UserError
from featureflow.figures import save
from featureflow.files import write_text_atomically, written_atomically
from pipeline.artifact import Artifact, canonical_json

KIND, SCHEMA, FOLDER, ARRAYS = "lens", 1, "lenses", "arrays.safetensors"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Tables, sentences, headline numbers and perhaps a figure. `columns` has one row a feature:
    its id in `feature`, then values. `arrays` are for other lenses. A headline number that could
    not be measured (NaN) is None."""

    tables: Mapping[str, pd.DataFrame]
    text: str
    headline: Mapping[str, Any] = field(default_factory=dict)
    figure: Callable[[], Figure] | None = None
    columns: pd.DataFrame | None = None
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {
            name: None if isinstance(value, float | np.floating) and np.isnan(value) else value
            for name, value in self.headline.items()
        }
        object.__setattr__(self, "headline", known)


def write_finding(finding: Finding, folder: Path, *, name: str, title: str) -> None:
    """Write all of it into a folder. Raises UserError for columns that name no features."""
    if finding.columns is not None and "feature" not in finding.columns:
        found = ", ".join(map(str, finding.columns))
        raise UserError("columns without a feature", expected="a column 'feature'", found=found)
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for stem, table in finding.tables.items():
        _write_table(table, folder / "tables" / stem)
    if finding.columns is not None:
        _write_table(finding.columns, folder / "columns")
    if finding.arrays:
        with written_atomically(folder / ARRAYS) as beside:
            save_file({name: np.ascontiguousarray(a) for name, a in finding.arrays.items()}, beside)
    if finding.figure is not None:
        save(finding.figure(), folder / "figure")
    write_text_atomically(folder / "text.md", finding.text.rstrip() + "\n")
    document = {
        "name": name,
        "title": title,
        "headline": finding.headline,
        "figure": finding.figure is not None,
        "columns": None if finding.columns is None else _columns(finding.columns),
        "tables": {
            stem: {"rows": len(table), "columns": _columns(table)}
            for stem, table in finding.tables.items()
        },
    }
    write_text_atomically(folder / "finding.json", canonical_json(document) + "\n")


def open_finding(root: Path, name: str) -> Artifact:
    """The artifact of a lens of the run in `root`. Raises UserError that names the command."""
    path = root / FOLDER / name
    if path.parent != root / FOLDER or name in (".", ".."):
        raise UserError(f"{name!r} is not the name of a lens", fix=Command("lens", "list"))
    return Artifact.open(path, kind=KIND, schema=SCHEMA, fix=Command("lens", name))


def read_finding(artifact: Artifact) -> Finding:
    """What was written; the figure stays a picture in the artifact."""
    document = json.loads(artifact.file("finding.json").read_text(encoding="utf-8"))
    return Finding(
        tables={
            name: pd.read_parquet(artifact.file(f"tables/{name}.parquet"))
            for name in document["tables"]
        },
        text=artifact.file("text.md").read_text(encoding="utf-8"),
        headline=document["headline"],
        columns=pd.read_parquet(artifact.file("columns.parquet"))
        if "columns.parquet" in artifact.files
        else None,
        arrays=load_file(artifact.file(ARRAYS)) if ARRAYS in artifact.files else {},
    )


def _columns(table: pd.DataFrame) -> list[dict[str, str]]:
    return [{"name": str(name), "kind": _kind(table[name])} for name in table]


def _kind(column: pd.Series) -> str:
    last = str(column.name).rpartition("_")[2]
    if last in ("feature", "site"):
        return last
    return "number" if pd.api.types.is_numeric_dtype(column) else "text"


def _write_table(table: pd.DataFrame, path: Path) -> None:
    table.to_parquet(path.with_name(f"{path.name}.parquet"), index=False)
    table.to_csv(path.with_name(f"{path.name}.csv"), index=False)
