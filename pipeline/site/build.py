"""Features, flow graph and what lenses and steering found → the folder `site/`.

1. shards of every site, spread over processes (pipeline/site/pages.py)
2. what all sites share: corpus, search, flow, samples (pipeline/site/site_folder.py)
3. the app and the manifest

Nothing is computed here that another stage could have left; cost: gzip.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.describe.features import Features
from pipeline.describe.workers import site_workers
from pipeline.flow.graph import FlowGraph
from pipeline.site import site_folder
from pipeline.site.lens_pages import write_lenses, write_traces
from pipeline.site.pages import Job, write_site

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
