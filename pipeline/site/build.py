"""Store, dictionaries and flow graph → the atlas' folders `site/` and `tables/`.

1. prepare: vocabulary, unembedding, and where everything lies
   Workshop
2. survey every site, spread over processes (or Dask workers); finished sites are kept on disk
   survey_job
3. label and write every site; labels are inherited along the graph, so this waits for all
   write_job
4. what all sites share: corpus, search, communities, trunks, manifest, tables
   site_folder, tables

Memory: one site per process. A killed run goes on with the sites it had finished.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.sites import parse_site
from pipeline.context import RunContext
from pipeline.describe.intermediate import load_columns
from pipeline.describe.tables import write_tables
from pipeline.describe.vocabulary import Vocabulary
from pipeline.describe.workshop import (
    UNEMBEDDING,
    VOCABULARY,
    Workshop,
    corpus_for,
    graph_for,
    survey_job,
    write_job,
)
from pipeline.site import site_folder
from pipeline.site.shards import read_shard

Run = Callable[[Callable[[Workshop, str], str], Workshop], Iterator[str]]
"""Runs a job for every site of a workshop and yields as they finish."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelFacts:
    """What the atlas needs of the language model: its card, its tokens, and how it reads out the
    residual stream."""

    card: Mapping[str, Any]
    vocabulary: Vocabulary
    W_U: Float[Tensor, "vocab d_model"] | None
    gain: Float[Tensor, "d_model"] | None


@dataclass(frozen=True, kw_only=True)
class AtlasFacts:
    """What goes into the manifest as it stands."""

    title: str
    metrics: Mapping[str, Mapping[str, Any]]
    provenance: Mapping[str, Any]
    licences: tuple[str, ...] = ()


def build_atlas(
    shop: Workshop, model: ModelFacts, facts: AtlasFacts, tables: Path, context: RunContext
) -> dict[str, Any]:
    """Make `shop.site_folder` and `tables`; returns the headline numbers."""
    prepare(shop, model)
    with _runner(context, len(shop.sites)) as run:
        each_site(run, survey_job, shop, context, "survey")
        each_site(run, write_job, shop, context, "write")
    headline = finish(shop, model, facts, tables)
    shutil.rmtree(shop.work)
    return headline


def prepare(shop: Workshop, model: ModelFacts) -> None:
    """Leave in the work folder what every process needs of the model."""
    shop.work.mkdir(parents=True, exist_ok=True)
    model.vocabulary.save(shop.work / VOCABULARY)
    if model.W_U is not None and model.gain is not None:
        hidden = sorted(
            model.vocabulary.special | set(range(len(model.vocabulary), len(model.W_U)))
        )
        np.savez(
            shop.work / UNEMBEDDING,
            weight=model.W_U.float().numpy(),
            gain=model.gain.float().numpy(),
            hidden=np.array(hidden, dtype=np.int64),
        )


def each_site(
    run: Run, job: Callable[[Workshop, str], str], shop: Workshop, context: RunContext, verb: str
) -> None:
    """Run a job for every site, as many at a time as the runner does. The first failure is
    raised."""
    context.progress(verb, 0, len(shop.sites))
    for i, _ in enumerate(run(job, shop)):
        context.progress(verb, i + 1, len(shop.sites))


def finish(shop: Workshop, model: ModelFacts, facts: AtlasFacts, tables: Path) -> dict[str, Any]:
    """Write what all sites share, then the manifest."""
    corpus, graph, site = corpus_for(shop), graph_for(shop), shop.site_folder
    columns = [load_columns(shop.work, short) for short in shop.sites]
    site_folder.write_vocabulary(site, corpus)
    n_shards = site_folder.write_corpus(site, corpus)
    search = site_folder.write_search(site, corpus, columns)
    n_trunks = 0
    if graph is not None:
        shards = [read_shard(site, f"sites/{short}/labels") for short in shop.sites]
        shown = [shard.json["labels"] for shard in shards]
        scores = [
            np.where(s.columns["score"] == 255, np.nan, s.columns["score"] / 254.0) for s in shards
        ]
        n_trunks = site_folder.write_flow(site, graph, shown, scores, columns, corpus)
    site_folder.write_attached(site)
    site_folder.copy_app(site)
    summaries = [
        json.loads((shop.work / short / "summary.json").read_text(encoding="utf-8"))
        for short in shop.sites
    ]
    headline = _headline(summaries, None if graph is None else len(graph.links), n_trunks)
    corpus_part = site_folder.manifest_of_corpus(
        corpus, n_shards=n_shards, holdout=shop.holdout, filters=_filters_of(shop)
    )
    document = {
        **site_folder.fixed_manifest(),
        **corpus_part,
        "title": facts.title,
        "profile": shop.profile,
        "precision": shop.precision,
        "model": dict(model.card),
        "sites": [
            _site_json(short, s, facts.metrics)
            for short, s in zip(shop.sites, summaries, strict=True)
        ],
        "search": {"tokens_per_shard": site_folder.TOKENS_PER_SHARD, "shards": search},
        "has": dict.fromkeys(("flow", "communities", "trunks"), graph is not None),
        "headline": headline,
        "provenance": dict(facts.provenance),
        "licences": list(facts.licences),
    }
    site_folder.write_manifest(site, document)
    write_tables(tables, [shop.work / short for short in shop.sites], corpus, graph)
    return headline


def _site_json(
    short: str, summary: Mapping[str, Any], metrics: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    site = parse_site(short)
    place = {"site": site.name, "short": short, "layer": site.layer, "kind": site.kind}
    return {**place, **summary, "metrics": dict(metrics.get(short, {}))}


def _headline(
    summaries: list[dict[str, Any]], n_links: int | None, n_trunks: int
) -> dict[str, Any]:
    totals = {
        name: sum(s[f"n_{name}"] for s in summaries) for name in ("latents", "alive", "labelled")
    }
    graph = {} if n_links is None else {"n_links": n_links, "n_trunks": n_trunks}
    return {
        "n_sites": len(summaries),
        "n_features": totals["latents"],
        "n_alive": totals["alive"],
        "n_labelled": totals["labelled"],
        "labelled_share": round(totals["labelled"] / max(1, totals["alive"]), 4),
        **graph,
    }


def _filters_of(shop: Workshop) -> dict[str, Any]:
    f = shop.filters
    return {
        "drop_bos": f.drop_bos,
        "drop_special": f.drop_special,
        "drop_sinks": f.drop_sinks,
        "min_position": f.min_position,
        "max_position": f.max_position,
    }


@contextmanager
def _runner(context: RunContext, n_sites: int) -> Iterator[Run]:
    """How jobs are run, by what the context offers: here, in processes, or on the workers of a Dask
    scheduler."""
    if context.scheduler not in (None, "local"):
        from distributed import Client
        from distributed import as_completed as completed

        with Client(context.scheduler) as client:
            yield lambda job, shop: (
                f.result()
                for f in completed([client.submit(job, shop, s, pure=False) for s in shop.sites])
            )
        return
    n_processes = min(max(context.n_workers, context.n_threads), n_sites)
    if n_processes <= 1:
        yield lambda job, shop: (job(shop, short) for short in shop.sites)
        return
    pool = ProcessPoolExecutor(
        n_processes, mp_context=get_context("spawn"), initializer=_one_thread
    )
    try:
        yield lambda job, shop: (
            f.result() for f in as_completed([pool.submit(job, shop, s) for s in shop.sites])
        )
    except (
        BaseException
    ):  # an interrupt must not wait for sites that have not begun; finished ones are kept
        for worker in list((pool._processes or {}).values()):
            worker.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _one_thread() -> None:
    torch.set_num_threads(1)
