"""A flow graph's links, tested on the model: which predecessor, removed, silences its target?

1. Choose pairs of dictionaries spread over the depth (all MLP and attention pairs, if wanted, cost
   little more).
2. For each pair, the strategies come from its edges: the top-1 predecessor, the kept one, one of
   the top five at random, all five; other matchers (permutation, Pearson) can be handed in.
3. Test them on the same targets with the controls (causal.py), summarise over pairs by document,
   and attach to every tested edge how often and how much its removal mattered.

Cost: targets × strategies × one context through the blocks between the two sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import pandas as pd
from annotated_types import Ge
from jaxtyping import Int64
from typing_extensions import Doc

from data.model.language_model import LanguageModel
from data.store import ActivationStore
from featureflow.errors import UserError
from featureflow.progress import Progress, silent
from featureflow.settings import Settings
from featureflow.sites import Site, parse_site
from pipeline.flow.causal import (
    Contexts,
    DeactivationOptions,
    evidence_of_edges,
    measure_deactivation,
    record_clean,
    sites_to_record,
    summarise_deactivation,
)
from sae import Sae

TOP_1, KEPT, RANDOM_OF_TOP_5, TOP_5 = "top-1", "kept link", "random of top-5", "top-5"


class Validation(Settings):
    """How much of a flow graph is tested by removing predecessors in the model."""

    n_residual_pairs: Annotated[
        int, Ge(0), Doc("pairs of neighbouring residual layers, spread over the depth")
    ] = 8
    n_module_pairs: Annotated[
        int, Ge(0), Doc("MLP → residual and attention → residual pairs, spread likewise")
    ] = 4
    n_targets: Annotated[int, Ge(1), Doc("active features tested per pair")] = 150
    n_targets_per_context: Annotated[
        int, Ge(1), Doc("of these, at most so many from one context")
    ] = 5
    n_exhaustive: Annotated[
        int, Ge(0), Doc("targets per pair for which every active predecessor is tried")
    ] = 0
    scale: Annotated[
        float, Doc("what the predecessor's activation is multiplied with; 0 removes it")
    ] = 0.0
    seed: Annotated[int, Ge(0), Doc("of the choice of targets and controls")] = 0


@dataclass(frozen=True, kw_only=True)
class ValidatedLinks:
    """`trials` one row a tested target and strategy; `summary` by relation and strategy, all pairs
    pooled; `by_pair` the same for each pair; `evidence` one row a tested edge."""

    trials: pd.DataFrame
    summary: pd.DataFrame
    by_pair: pd.DataFrame
    evidence: pd.DataFrame


def validate_links(
    edges: pd.DataFrame,
    dictionaries: Mapping[Site, Sae],
    model: LanguageModel,
    store: ActivationStore,
    *,
    options: Validation,
    progress: Progress = silent,
) -> ValidatedLinks:
    """Test links on held-out documents of the store the dictionaries were trained on. Raises
    UserError when the model is another one or no document is held out."""
    contexts = held_out_contexts(
        model, store, n_contexts=-(-options.n_targets // options.n_targets_per_context) + 2
    )
    pairs = chosen_pairs(edges, options)
    needed = {site: None for source, target, _ in pairs for site in sites_to_record(source, target)}
    recorded = record_clean(model, contexts, tuple(needed), progress=progress) if needed else {}
    tables = []
    for source, target, relation in pairs:
        between = edges[
            (edges["source_site"] == source.short) & (edges["target_site"] == target.short)
        ]
        n_targets = dictionaries[target].n_latents
        trials = measure_deactivation(
            model,
            {site: dictionaries[site] for site in (source, target)},
            source=source,
            target=target,
            predecessors=strategies_of(between, n_targets, seed=options.seed),
            contexts=contexts,
            options=DeactivationOptions(
                n_targets=options.n_targets,
                n_targets_per_context=options.n_targets_per_context,
                n_exhaustive=options.n_exhaustive,
                scale=options.scale,
                seed=options.seed + target.layer,
            ),
            recorded=recorded,
            progress=progress,
        )
        tables.append(trials.assign(relation=relation))
    if not tables:
        raise UserError(
            "there is no pair of sites to test", expected="at least two linked residual layers"
        )
    trials = pd.concat(tables, ignore_index=True)
    return ValidatedLinks(
        trials=trials,
        summary=summarise_deactivation(trials, by=("relation", "strategy")),
        by_pair=summarise_deactivation(trials, by=("relation", "source", "target", "strategy")),
        evidence=evidence_of_edges(trials, TOP_1),
    )


def attach_evidence(edges: pd.DataFrame, evidence: pd.DataFrame) -> pd.DataFrame:
    """The edges with `causal_n, causal_success, causal_change` filled in where they were tested."""
    columns = ["causal_n", "causal_success", "causal_change"]
    named = evidence.rename(columns={"source": "source_site", "target": "target_site"})
    keys = ["source_site", "source_latent", "target_site", "target_latent"]
    known = named.set_index(keys)[columns]
    places = pd.MultiIndex.from_frame(edges[keys].astype({"source_site": str, "target_site": str}))
    found = known.reindex(places)
    return edges.assign(
        causal_n=found["causal_n"].fillna(0).to_numpy(np.int32),
        causal_success=found["causal_success"].to_numpy(np.float32),
        causal_change=found["causal_change"].to_numpy(np.float32),
    )


def chosen_pairs(edges: pd.DataFrame, options: Validation) -> list[tuple[Site, Site, str]]:
    """Pairs of sites to test, spread evenly over the depth within each relation."""
    chosen = []
    for relation, n in (
        ("residual", options.n_residual_pairs),
        ("mlp", options.n_module_pairs),
        ("attention", options.n_module_pairs),
    ):
        names = edges.loc[
            edges["relation"] == relation, ["source_site", "target_site"]
        ].drop_duplicates()
        pairs = sorted((parse_site(t), parse_site(s)) for s, t in names.itertuples(index=False))
        chosen += [(pairs[i][1], pairs[i][0], relation) for i in _spread(len(pairs), n)]
    return chosen


def _spread(n_available: int, n_wanted: int) -> list[int]:
    if n_wanted >= n_available:
        return list(range(n_available))
    return sorted({int(i) for i in (np.arange(n_wanted) + 0.5) * n_available / n_wanted})


def strategies_of(
    edges: pd.DataFrame, n_targets: int, *, seed: int
) -> dict[str, Int64[np.ndarray, "target_latent candidate"]]:
    """The paper's strategies as candidate predecessors per target latent, -1 where there is
    none."""
    ranked = edges[edges["rank"] >= 0]
    top = np.full((n_targets, 5), -1, dtype=np.int64)
    near = ranked[ranked["rank"] < 5]
    top[near["target_latent"], near["rank"]] = near["source_latent"]
    kept = np.full((n_targets, 1), -1, dtype=np.int64)
    first = ranked[(ranked["rank"] == 0) & ranked["kept"]]
    kept[first["target_latent"], 0] = first["source_latent"]
    random = np.random.default_rng(seed).integers(5, size=(n_targets, 1))
    return {
        TOP_1: top[:, :1],
        KEPT: kept,
        RANDOM_OF_TOP_5: np.take_along_axis(top, random, axis=1),
        TOP_5: top,
    }


def held_out_contexts(model: LanguageModel, store: ActivationStore, *, n_contexts: int) -> Contexts:
    """The first whole contexts of the store's validation part. Raises UserError."""
    fingerprint = store.provenance.get("model_fingerprint")
    if fingerprint != model.fingerprint:
        raise UserError(
            "the model is not the one the activations came from",
            where=model.name,
            expected=f"fingerprint {str(fingerprint)[:12]}",
            found=f"fingerprint {model.fingerprint[:12]}",
        )
    table, length = store.tokens(), store.n_context
    first = -(-store.validation_start // length)
    last = min(store.n_rows // length, first + n_contexts)
    if last <= first:
        raise UserError(
            "the store has no held-out contexts",
            where=store.url,
            fix="set collect.validation_fraction above 0",
        )
    rows = slice(first * length, last * length)
    return Contexts(
        ids=table.id[rows].reshape(-1, length).astype(np.int64),
        document=table.document[rows].reshape(-1, length).astype(np.int64),
        usable=(table.flags[rows] == 0).reshape(-1, length),
    )
