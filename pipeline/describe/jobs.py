"""The two jobs per site, as functions of small picklable descriptions, so that processes or
machines may run them.

1. `survey_job`: pass over the store, cards' columns, rules; leaves `<work>/<short>/`  (heavy: the
   encoder's product)
2. `label_job`: labels (with those inherited along the flow graph) and table parts  (light)

`Job` says where everything lies. What the jobs of one process share (corpus, unembedding, graph) is
opened once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from pydantic import model_validator
from typing_extensions import Doc

from data.store import ActivationStore, RowFilters
from featureflow.errors import Command, UserError
from featureflow.settings import Settings
from featureflow.sites import Site, parse_site
from pipeline.describe import intermediate
from pipeline.describe.columns import describe_site
from pipeline.describe.corpus import Corpus, corpus_of
from pipeline.describe.encoder import Encoder, Precision
from pipeline.describe.examples import PROFILES
from pipeline.describe.labels import (
    RULE_METHODS,
    Acceptance,
    Inherited,
    SiteRules,
    labels_of,
    make_rules,
    scored,
)
from pipeline.describe.projection import Unembedding, project
from pipeline.describe.rules import attribute_tables
from pipeline.describe.survey import SurveyOptions, survey_site
from pipeline.describe.tables import write_parts
from pipeline.describe.vocabulary import Vocabulary
from pipeline.flow.graph import FlowGraph
from pipeline.saes import Saes
from sae import Sae

FEWEST_LISTED = 1000
VOCABULARY, UNEMBEDDING = "vocabulary.npz", "unembedding.npz"
_kept = lru_cache(maxsize=1)  # what the jobs of one process share is of one run at a time


class Config(Settings):
    """What is counted, which examples are kept, and how labels are judged."""

    profile: Annotated[
        Literal["mini", "standard", "full"], Doc("how many examples of a feature are kept")
    ] = "standard"
    filters: Annotated[RowFilters, Doc("tokens left out of all statistics")] = RowFilters()
    holdout: Annotated[
        float, Gt(0), Le(0.9), Doc("share of documents on which labels are scored, never proposed")
    ] = 0.33
    choice: Annotated[
        float,
        Ge(0),
        Le(0.5),
        Doc("share of documents that decide which label a feature gets; it is scored on others"),
    ] = 0.17
    min_f1: Annotated[
        float, Ge(0), Le(1), Doc("F1 on those documents from which a rule is accepted as a label")
    ] = 0.6
    min_active: Annotated[int, Ge(1), Doc("held-out activations that a score needs to count")] = 5
    cofiring_rows: Annotated[
        int, Ge(0), Doc("tokens on which features of one dictionary that are active together count")
    ] = 32_768
    precision: Annotated[
        Precision, Doc("dtype of the encoder's and the projection's matrix product")
    ] = "bfloat16"
    seed: Annotated[int, Ge(0), Doc("of the uniform samples and the held-out documents")] = 0

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.holdout + self.choice >= 1:
            raise ValueError(
                "holdout and choice must be below 1 together: labels are proposed on the rest"
            )
        return self

    @property
    def acceptance(self) -> Acceptance:
        """What a rule must reach to be accepted."""
        return Acceptance(min_f1=self.min_f1, min_active=self.min_active)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Where everything lies. `made_from` are digests of the artifacts, since what a process keeps
    must not outlive them: a store may be made again in the same place while the workers of a
    cluster stay."""

    store: Path
    dictionaries: Path
    graph: Path | None
    work: Path
    config: Config
    made_from: tuple[str, ...] = ()


def survey_job(job: Job, short: str) -> str:
    """Survey one site, unless an earlier run did."""
    if not intermediate.is_surveyed(job.work, short):
        site, corpus, config = parse_site(short), corpus_for(job), job.config
        sae, store = saes_for(job)[site], store_for(job)
        check_fit(store, site, sae, job)
        profile = PROFILES[config.profile]
        options = SurveyOptions(
            n_top=profile.n_top,
            n_near=profile.n_near,
            n_uniform=profile.n_reservoir,
            cofiring_rows=config.cofiring_rows,
            seed=config.seed,
        )
        survey = survey_site(
            lambda a, b: store.read(site, a, b), Encoder.of(sae, config.precision), corpus, options
        )
        unembedding = unembedding_for(job)
        fits = unembedding is not None and sae.d_out == unembedding.matrix.shape[1]
        projection = project(sae.W_dec, unembedding) if fits and unembedding is not None else None
        columns = describe_site(survey, sae, corpus, projection, profile)
        tables = survey.tables(corpus)
        rules = make_rules(
            attribute_tables(tables, corpus), None if projection is None else projection.promotes
        )
        intermediate.save_site(job.work, short, columns, rules, tables)
    return short


def label_job(job: Job, short: str) -> str:
    """Label one site's latents and write its part of the tables into `<work>/<short>/`."""
    site, corpus, graph = parse_site(short), corpus_for(job), graph_for(job)
    columns = intermediate.load_columns(job.work, short)
    rules = intermediate.load_rules(job.work, short)
    inherited = None if graph is None else _inherited(job, site, corpus, graph)
    labels = [
        labels_of(latent, int(count), rules, inherited, corpus, job.config.acceptance)
        for latent, count in enumerate(columns["count"])
    ]
    write_parts(job.work / short, site, columns, labels, corpus, graph)
    return short


@_kept
def store_for(job: Job) -> ActivationStore:
    return ActivationStore.open(job.store)


@_kept
def saes_for(job: Job) -> Saes:
    return Saes(job.dictionaries, n_kept=0)


@_kept
def corpus_for(job: Job) -> Corpus:
    config = job.config
    return corpus_of(
        store_for(job).tokens(),
        Vocabulary.load(job.work / VOCABULARY),
        filters=config.filters,
        holdout=config.holdout,
        choice=config.choice,
        seed=config.seed,
    )


@_kept
def graph_for(job: Job) -> FlowGraph | None:
    """Raises UserError when the graph is one of other dictionaries."""
    return None if job.graph is None else open_graph(job.graph, saes_for(job))


def open_graph(folder: Path, saes: Saes) -> FlowGraph:
    """The flow graph of these dictionaries. Raises UserError when it is one of others."""
    graph = FlowGraph.open(folder)
    found = dict(zip((site.short for site in graph.sites), graph.n_latents, strict=True))
    expected = {site.short: int(saes.description(site)["n_latents"]) for site in saes}
    if found != expected:
        raise UserError(
            "the flow graph was made from other dictionaries",
            where=str(folder),
            expected=", ".join(f"{short}: {n} latents" for short, n in expected.items()),
            found=", ".join(f"{short}: {n} latents" for short, n in found.items()),
            fix=Command("run", to="link"),
        )
    return graph


@_kept
def unembedding_for(job: Job) -> Unembedding | None:
    path = job.work / UNEMBEDDING
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        weight, gain, hidden = (arrays[name] for name in ("weight", "gain", "hidden"))
    seen = np.bincount(corpus_for(job).token, minlength=len(weight)) > 0
    # words that the text never uses are mostly ones the model hardly learned
    if seen.sum() >= FEWEST_LISTED:
        hidden = np.union1d(hidden, np.flatnonzero(~seen))
    return Unembedding.of(
        torch.from_numpy(weight),
        torch.from_numpy(gain),
        hidden=hidden.tolist(),
        precision=job.config.precision,
    )


def check_fit(store: ActivationStore, site: Site, sae: Sae, job: Job) -> None:
    """Raises UserError when the store lacks the site or its vectors have another width than the
    dictionary reads."""
    if site not in store.sites:
        raise UserError(
            f"the store has no activations at {site.short}, though there is a dictionary for it",
            where=str(job.store),
            expected=", ".join(s.short for s in store.sites),
            fix=(Command("collect"), Command("train")),
        )
    if store.width(site) != sae.d_in:
        raise UserError(
            f"store and dictionary do not belong together at {site.short}",
            where=str(job.dictionaries / site.short),
            expected=f"vectors of width {store.width(site)}",
            found=f"a dictionary for width {sae.d_in}",
            fix=Command("run", to="train"),
        )


def _inherited(job: Job, site: Site, corpus: Corpus, graph: FlowGraph) -> Inherited | None:
    """The accepted rules of the parents of one site's latents, scored on the latents themselves."""
    index = graph.sites.index(site)
    here = slice(graph.start[index], graph.start[index + 1])
    parent, cosine = (a[here] for a in graph.parent)
    origins = np.where(parent >= 0, graph.site_of(np.maximum(parent, 0)), -1)
    held = intermediate.load_tables(job.work, site.short, graph.n_latents[index])
    tables = attribute_tables(held, corpus)
    named: list[str | None] = [None] * len(parent)
    found: dict[str, Any] = {}
    for origin in np.unique(origins[origins >= 0]):
        rules = intermediate.load_rules(job.work, graph.sites[origin].short)
        local = np.where(origins == origin, parent - graph.start[origin], -1)
        for name, chosen in _by_method(rules, local, job.config.acceptance):
            if name in tables:
                taken = rules.by_method[name].rules.taken_from(chosen)
                found[f"{origin}/{name}"] = scored(taken, tables[name])
                for latent in np.flatnonzero(chosen >= 0):
                    named[latent] = str(graph.feature(int(parent[latent])))
    return Inherited(origin=named, cosine=cosine, by_attribute=found) if found else None


def _by_method(
    rules: SiteRules, parents: np.ndarray, acceptance: Acceptance
) -> list[tuple[str, np.ndarray]]:
    """Parents whose accepted rule was made by each method; -1 elsewhere."""
    accepted, some = rules.accepted(acceptance), np.maximum(parents, 0)
    out = []
    for i, name in enumerate(RULE_METHODS):
        chosen = np.where((parents >= 0) & (accepted[some] == i), parents, -1)
        if (chosen >= 0).any():
            out.append((name, chosen))
    return out
