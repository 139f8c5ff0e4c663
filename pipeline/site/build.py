"""Features, flow graph and what lenses and steering found → the folder `site/`.

1. shards of every site, spread over processes (pipeline/site/pages.py)
2. what all sites share: corpus, search, flow, samples (pipeline/site/site_folder.py)
3. every finding of a lens → `lenses/<name>`, a page each, and what its `columns` say of single
   features → `sites/<short>/lenses`, shown on their cards; every kept trace → `traces/<name>`
4. the app and the manifest

A lens needs to know nothing of pages: text stays text, the figure is an image (docs/decisions/
0003-atlas-shards.md). Nothing is computed here that another stage could have left; cost: gzip.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featureflow.sites import Site, parse_feature
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.describe.features import Features
from pipeline.describe.workers import site_workers
from pipeline.findings import Finding, read_finding
from pipeline.flow.graph import FlowGraph
from pipeline.site import site_folder
from pipeline.site.pages import Job, write_site
from pipeline.site.shards import Shard, write_shard
from pipeline.trace.document import headline_of
from pipeline.trace.kept import read_document

MOST_ROWS = 5_000
"""Rows of a table that a page shows; the rest is in the artifact's Parquet file."""
_SHARED = ("count", "token", "token_share", "promotes")


@dataclass(frozen=True, kw_only=True)
class Shown:
    """What is shown beside the features. `described` is the config of the describe stage; `metrics`
    are by site, `opinions` by feature id, `lenses` and `traces` the artifacts by name."""

    title: str
    described: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    steering: Mapping[str, Any] | None = None
    opinions: Mapping[str, Any] = field(default_factory=dict)
    lenses: Mapping[str, Artifact] = field(default_factory=dict)
    traces: Mapping[str, Artifact] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def build_site(
    features: Features, graph: FlowGraph | None, shown: Shown, job: Job, context: RunContext
) -> dict[str, Any]:
    """Make `job.site_folder`; returns the headline numbers."""
    sites = [site.short for site in features.sites]
    with site_workers(context, len(sites)) as each_site:
        summaries = dict(each_site("write", partial(write_site, job), sites))
    site, corpus = job.site_folder, features.corpus
    columns = [{name: features.columns(short)[name] for name in _SHARED} for short in sites]
    site_folder.write_vocabulary(site, corpus)
    n_shards = site_folder.write_corpus(site, corpus)
    search = site_folder.write_search(site, corpus, columns)
    headline = _headline(summaries)
    if graph is not None:
        n_trunks = site_folder.write_flow(site, graph, features.table, columns, corpus)
        headline |= {"n_links": len(graph.links), "n_trunks": n_trunks}
    site_folder.write_attached(site, shown.steering, shown.opinions)
    n_latents = {s: int(summaries[s.short]["n_latents"]) for s in features.sites}
    lenses, with_columns = write_lenses(site, shown.lenses, n_latents)
    site_folder.copy_app(site)
    chosen = shown.described
    corpus_part = site_folder.manifest_of_corpus(
        corpus, n_shards=n_shards, holdout=chosen["holdout"], filters=chosen["filters"]
    )
    document = {
        **site_folder.fixed_manifest(),
        **corpus_part,
        "title": shown.title,
        "profile": chosen["profile"],
        "precision": chosen["precision"],
        "model": features.about["model"],
        "sites": [
            {
                **{"site": s.name, "short": s.short, "layer": s.layer, "kind": s.kind},
                **summaries[s.short],
                "lenses": s.short in with_columns,
                "metrics": dict(shown.metrics.get(s.short, {})),
            }
            for s in features.sites
        ],
        "search": {"tokens_per_shard": site_folder.TOKENS_PER_SHARD, "shards": search},
        "has": dict.fromkeys(("flow", "communities", "trunks"), graph is not None),
        "lenses": lenses,
        "traces": write_traces(site, shown.traces),
        "headline": headline,
        "provenance": dict(shown.provenance),
        "licences": [],
    }
    site_folder.write_manifest(site, document)
    return headline


def _headline(summaries: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    n, n_alive, n_labelled = (
        sum(s[f"n_{name}"] for s in summaries.values()) for name in ("latents", "alive", "labelled")
    )
    return {
        "n_sites": len(summaries),
        "n_features": n,
        "n_alive": n_alive,
        "n_labelled": n_labelled,
        "labelled_share": round(n_labelled / max(1, n_alive), 4),
    }


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
