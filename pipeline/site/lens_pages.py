"""Findings of lenses → `lenses/<name>`, a page each, and `sites/<short>/lenses`, what they say of
single features (docs/decisions/0003-atlas-shards.md).

A lens needs to know nothing of pages: tables, text and figure are shown as they are, and what its
`columns` say of a feature stands on the feature's card. All of it is data: text stays text, and the
figure is an image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featureflow.sites import Site, parse_feature
from pipeline.artifact import Artifact
from pipeline.findings import Finding, read_finding
from pipeline.site.shards import Shard, write_shard
from pipeline.trace.document import headline_of
from pipeline.trace.kept import read_document

MOST_ROWS = 5_000
"""Rows of a table that a page shows; the rest is in the artifact's Parquet file."""


def write_lenses(
    site: Path, lenses: Mapping[str, Artifact], n_latents: Mapping[Site, int]
) -> tuple[list[dict[str, str]], set[str]]:
    """Write the pages of these findings; returns their entries in the manifest, and the sites that
    some of them have columns for. `n_latents` says which features there are."""
    entries: list[dict[str, str]] = []
    by_site: dict[Site, list[dict[str, Any]]] = {where: [] for where in n_latents}
    for name, artifact in lenses.items():
        about = json.loads(artifact.file("finding.json").read_text(encoding="utf-8"))
        finding = read_finding(artifact)
        svg = artifact.file("figure.svg").read_text(encoding="utf-8") if about["figure"] else ""
        write_shard(site, f"lenses/{name}", lens_shard(about, finding, svg))
        entries.append({"name": name, "title": about["title"]})
        if finding.columns is not None:
            _sort_by_site(entries[-1], finding.columns, n_latents, by_site)
    for where, found in by_site.items():
        if found:
            write_shard(site, f"sites/{where.short}/lenses", _columns_shard(found))
    return entries, {where.short for where, found in by_site.items() if found}


def lens_shard(about: Mapping[str, Any], finding: Finding, svg: str) -> Shard:
    """All of a finding's page; `about` is its `finding.json`."""
    return Shard(
        json={
            "title": about["title"],
            "text": finding.text,
            "headline": {str(name): _cell(value) for name, value in finding.headline.items()},
            "figure": svg,
            "tables": [
                _table_json(name, table, about["tables"][name]["columns"])
                for name, table in finding.tables.items()
            ],
        }
    )


def _table_json(name: str, table: pd.DataFrame, columns: Any) -> dict[str, Any]:
    rows = table.head(MOST_ROWS).astype(object).itertuples(index=False, name=None)
    return {
        "name": name,
        "n_rows": len(table),
        "columns": columns,
        "rows": [[_cell(value) for value in row] for row in rows],
    }


def _cell(value: Any) -> Any:
    """A value as JSON has it; what is unknown is null, and lists become text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, list | tuple | np.ndarray | set):
        return ", ".join(str(_cell(one)) for one in value)
    if value is None or value is pd.NaT or value is pd.NA:
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str) else str(value)


def _sort_by_site(
    lens: Mapping[str, str],
    columns: pd.DataFrame,
    n_latents: Mapping[Site, int],
    by_site: dict[Site, list[dict[str, Any]]],
) -> None:
    """Add every value column to the sites it says something of; unknown features are left out."""
    features = [parse_feature(str(feature)) for feature in columns["feature"]]
    for site, n in n_latents.items():
        rows = [i for i, f in enumerate(features) if f.site == site and f.latent < n]
        latents = [features[i].latent for i in rows]
        for column in columns.columns.drop("feature") if rows else ():
            values = [None] * n
            for latent, value in zip(latents, columns[column].iloc[rows], strict=True):
                values[latent] = _cell(value)
            entry = {"lens": lens["name"], "title": lens["title"], "name": str(column)}
            numeric = pd.api.types.is_numeric_dtype(columns[column])
            by_site[site].append({"entry": entry, "values": values, "numeric": numeric})


def _columns_shard(found: list[dict[str, Any]]) -> Shard:
    """Numbers as float32, NaN where nothing is known; texts in the JSON, null where nothing is."""
    texts, numbers = [], {}
    for i, each in enumerate(found):
        if each["numeric"]:
            numbers[str(i)] = np.array([math.nan if v is None else v for v in each["values"]])
        texts.append(each["entry"] | ({} if each["numeric"] else {"texts": each["values"]}))
    columns = {name: values.astype(np.float32) for name, values in numbers.items()}
    return Shard(json={"columns": texts}, columns=columns)


def write_traces(site: Path, traces: Mapping[str, Artifact]) -> list[dict[str, str]]:
    """Kept traces → `traces/<name>`, a page each; returns their entries in the manifest."""
    entries = []
    for name, artifact in traces.items():
        document = read_document(artifact)
        write_shard(site, f"traces/{name}", Shard(json=document))
        headline = headline_of(document)
        entries.append({"name": name, "prompt": document["prompt"], "headline": headline})
    return entries
