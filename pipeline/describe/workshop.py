"""The two jobs per site, as functions of small picklable descriptions, so that processes or
machines may run them.

1. `survey_job`: pass over the store, cards' columns, rules; leaves `<work>/<short>/`  (heavy: the
   encoder's product)
2. `write_job`: labels (with those inherited along the flow graph), shards and table parts
   (light)

`Workshop` says where everything lies. What the jobs of one process share (corpus, unembedding,
graph) is opened once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.store import ActivationStore, RowFilters
from featureflow.errors import Command, UserError
from featureflow.sites import Site, parse_site
from pipeline.describe import intermediate
from pipeline.describe.columns import describe_site
from pipeline.describe.corpus import Corpus, corpus_of
from pipeline.describe.examples import PROFILES
from pipeline.describe.firings import Encoder, Precision
from pipeline.describe.labels import (
    RULE_METHODS,
    Bar,
    Inherited,
    SiteRules,
    labels_of,
    make_rules,
    scored,
)
from pipeline.describe.projection import Unembedding, project
from pipeline.describe.rules import attribute_tables
from pipeline.describe.survey import SurveyOptions, survey_site
from pipeline.describe.table_parts import write_parts
from pipeline.describe.vocabulary import Vocabulary
from pipeline.site.graph import AtlasGraph, read_graph
from pipeline.site.pages import SitePages, write_site
from pipeline.site.trunks import FEWEST_LAYERS, trunks_of
from sae import Sae, load_sae

FEWEST_LISTED = 1000
VOCABULARY, UNEMBEDDING = "vocabulary.npz", "unembedding.npz"
_kept = lru_cache(maxsize=1)  # what the jobs of one process share is of one atlas at a time


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """Paths and choices of one atlas in the making. `sites` are short names in the atlas' order;
    `made_from` are names and digests of the artifacts, since what a process keeps must not outlive
    them: a store may be made anew in the same place while the workers of a cluster stay."""

    store: Path
    dictionaries: Path
    graph: Path | None
    work: Path
    site_folder: Path
    sites: tuple[str, ...]
    n_latents: tuple[int, ...]
    filters: RowFilters
    holdout: float
    choice: float
    seed: int
    precision: Precision
    profile: str
    bar: Bar
    cofiring_rows: int
    made_from: tuple[tuple[str, str], ...]


def survey_job(shop: Workshop, short: str) -> str:
    """Survey one site, unless an earlier run did."""
    if not intermediate.is_surveyed(shop.work, short):
        sae, corpus, site = load_sae(shop.dictionaries / short), corpus_for(shop), parse_site(short)
        store = open_store(shop)
        check_fit(store, site, sae, shop)
        profile = PROFILES[shop.profile]
        options = SurveyOptions(
            n_top=profile.n_top,
            n_near=profile.n_near,
            n_uniform=profile.n_reservoir,
            cofiring_rows=shop.cofiring_rows,
            seed=shop.seed,
        )
        survey = survey_site(
            lambda a, b: store.read(site, a, b), Encoder.of(sae, shop.precision), corpus, options
        )
        unembedding = unembedding_for(shop)
        fits = unembedding is not None and sae.d_out == unembedding.matrix.shape[1]
        projection = project(sae.W_dec, unembedding) if fits and unembedding is not None else None
        columns = describe_site(survey, sae, corpus, projection, profile)
        tables = survey.tables(corpus)
        rules = make_rules(
            attribute_tables(tables, corpus), None if projection is None else projection.promotes
        )
        intermediate.save_site(shop.work, short, columns, rules, tables)
    return short


def write_job(shop: Workshop, short: str) -> str:
    """Label one site's latents and write its shards and table parts; a summary is left in
    `<work>/<short>/summary.json`."""
    index = shop.sites.index(short)
    corpus, graph = corpus_for(shop), graph_for(shop)
    columns, rules = (
        intermediate.load_columns(shop.work, short),
        intermediate.load_rules(shop.work, short),
    )
    inherited = None if graph is None else _inherited(shop, index, corpus, graph)
    labels = [
        labels_of(latent, int(count), rules, inherited, corpus, shop.bar)
        for latent, count in enumerate(columns["count"])
    ]
    pages = SitePages(
        index=index,
        short=short,
        columns=columns,
        labels=labels,
        graph=graph,
        trunk_starts=trunk_starts(shop),
        corpus=corpus,
    )
    summary = write_site(shop.site_folder, pages)
    write_parts(shop.work / short, pages)
    (shop.work / short / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return short


@_kept
def open_store(shop: Workshop) -> ActivationStore:
    return ActivationStore.open(shop.store)


@_kept
def corpus_for(shop: Workshop) -> Corpus:
    vocabulary = Vocabulary.load(shop.work / VOCABULARY)
    return corpus_of(
        open_store(shop).tokens(),
        vocabulary,
        filters=shop.filters,
        holdout=shop.holdout,
        choice=shop.choice,
        seed=shop.seed,
    )


@_kept
def graph_for(shop: Workshop) -> AtlasGraph | None:
    if shop.graph is None:
        return None
    return read_graph(shop.graph, [parse_site(short) for short in shop.sites], shop.n_latents)


@_kept
def unembedding_for(shop: Workshop) -> Unembedding | None:
    path = shop.work / UNEMBEDDING
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        weight, gain, hidden = (arrays[name] for name in ("weight", "gain", "hidden"))
    seen = np.bincount(corpus_for(shop).token, minlength=len(weight)) > 0
    if (
        seen.sum() >= FEWEST_LISTED
    ):  # words that the text never uses are mostly ones the model hardly learned
        hidden = np.union1d(hidden, np.flatnonzero(~seen))
    return Unembedding.of(
        torch.from_numpy(weight),
        torch.from_numpy(gain),
        hidden=hidden.tolist(),
        precision=shop.precision,
    )


@_kept
def trunk_starts(shop: Workshop) -> frozenset[int]:
    """Numbers of the features that a trunk of three or more features starts from."""
    graph = graph_for(shop)
    if graph is None:
        return frozenset()
    trunks = trunks_of(graph, np.zeros(int(graph.start[-1]), dtype=bool))
    return frozenset(trunks.first[trunks.length >= FEWEST_LAYERS].tolist())


def check_fit(store: ActivationStore, site: Site, sae: Sae, shop: Workshop) -> None:
    """Raises UserError when the store lacks the site or its vectors have another width than the
    dictionary reads."""
    if site not in store.sites:
        raise UserError(
            f"the store has no activations at {site.short}, though there is a dictionary for it",
            where=str(shop.store),
            expected=", ".join(s.short for s in store.sites),
            fix=(Command("collect"), Command("train")),
        )
    if store.width(site) != sae.d_in:
        raise UserError(
            f"store and dictionary do not belong together at {site.short}",
            where=str(shop.dictionaries / site.short),
            expected=f"vectors of width {store.width(site)}",
            found=f"a dictionary for width {sae.d_in}",
            fix=Command("run", to="train"),
        )


def _inherited(shop: Workshop, index: int, corpus: Corpus, graph: AtlasGraph) -> Inherited | None:
    """The accepted rules of the parents of one site's latents, scored on the latents themselves."""
    here = slice(graph.start[index], graph.start[index + 1])
    parent, cosine = (a[here] for a in graph.parent)
    origins = np.where(parent >= 0, graph.site_of(np.maximum(parent, 0)), -1)
    held = intermediate.load_tables(shop.work, shop.sites[index], shop.n_latents[index])
    tables = attribute_tables(held, corpus)
    named: list[str | None] = [None] * len(parent)
    found: dict[str, Any] = {}
    for site in np.unique(origins[origins >= 0]):
        rules = intermediate.load_rules(shop.work, shop.sites[site])
        local = np.where(origins == site, parent - graph.start[site], -1)
        for name, chosen in _by_method(rules, local, shop.bar):
            if name in tables:
                found[f"{site}/{name}"] = scored(
                    rules.by_method[name].rules.taken_from(chosen), tables[name]
                )
                for latent in np.flatnonzero(chosen >= 0):
                    named[latent] = graph.feature(int(parent[latent]))
    return Inherited(origin=named, cosine=cosine, by_attribute=found) if found else None


def _by_method(rules: SiteRules, parents: np.ndarray, bar: Bar) -> list[tuple[str, np.ndarray]]:
    """Parents whose accepted rule was made by each method; −1 elsewhere."""
    accepted, some = rules.accepted(bar), np.maximum(parents, 0)
    out = []
    for i, name in enumerate(RULE_METHODS):
        chosen = np.where((parents >= 0) & (accepted[some] == i), parents, -1)
        if (chosen >= 0).any():
            out.append((name, chosen))
    return out
