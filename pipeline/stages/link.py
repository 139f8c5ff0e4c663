"""Dictionaries → the flow graph: which feature of one layer is which feature of the next, with
calibrated evidence.

1. For dictionaries of one start: train, for each relation, a null dictionary that left the same
   start for rotated activations (pipeline/flow/start_null.py).
2. Link neighbouring dictionaries, read one at a time (pipeline/flow/link.py): cosine, null, firing
   on held-out activations of the same tokens at every site, false-discovery rate.
3. If asked to, test links in the model by removing predecessors (pipeline/flow/validation.py).
4. Write nodes, edges, pairs (Parquet), warnings (JSON) and the figures.

Input: a train artifact, and the collect artifact its dictionaries were trained on. Output:
`nodes.parquet`, `edges.parquet`, `pairs.parquet`, `warnings.json`, `figures/`; `causal_*.parquet`
when links were tested. Cost: a few matrix products of [latent, d_model] × [d_model, latent] per
pair, one encoding of the held-out tokens per site, and the training of one site per relation for
the null.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from annotated_types import Ge, Le
from pydantic import field_validator
from torch import Tensor
from typing_extensions import Doc

from data.store import ActivationStore
from featureflow.figures import save
from featureflow.settings import Settings
from featureflow.sites import Site
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.flow.figures import draw_class_shares, draw_link_strengths
from pipeline.flow.link import Links, link_dictionaries
from pipeline.flow.matchers import MATCHERS, SHARED, matcher_named
from pipeline.flow.null import NullSample
from pipeline.flow.options import (
    LEAST_AGREEMENT,
    Automatic,
    Calibrated,
    LinkOptions,
    NullChoice,
    Thresholds,
)
from pipeline.flow.pairing import Relation
from pipeline.flow.start_null import plan_nulls, pooled, start_sample
from pipeline.flow.tables import KIND, SCHEMA, write_tables
from pipeline.flow.validation import (
    TOP_1,
    ValidatedLinks,
    Validation,
    attach_evidence,
    validate_links,
)
from pipeline.lenses.parts.neurons import values_of_heads
from pipeline.run import Run
from pipeline.saes import CROSS_LAYER, Saes
from pipeline.training.reading import normalisation_at, read_rows
from sae.formats.native_cross_layer import Decoders

MOST_NULL_ROWS = 65_536
"""Activations that a null dictionary is trained on, at most; they are held in memory."""
NULL_SEED = 7_919
"""Keeps the rotation of a null apart from everything else that the seed draws."""


class Config(Settings):
    """How links are found, judged and checked."""

    matcher: Annotated[
        str,
        Doc(
            "what proposes the first predecessor of a feature, which is then judged like any link: "
            + ", ".join(MATCHERS)
            + ", or one that a package adds"
        ),
    ] = SHARED
    top_k: Annotated[
        int, Ge(1), Doc("predecessors kept for each feature and relation, best first")
    ] = 5
    null: Annotated[NullChoice, Doc("the chance that links are compared with")] = Automatic()
    n_null: Annotated[
        int, Ge(100), Doc("best cosines drawn from the null for each pair of dictionaries")
    ] = 8192
    thresholds: Annotated[Thresholds, Doc("which links are kept")] = Calibrated()
    functional_tokens: Annotated[
        int, Ge(0), Doc("held-out tokens on which firing is compared; 0 leaves the check out")
    ] = 8192
    least_agreement: Annotated[
        float,
        Ge(0),
        Le(1),
        Doc("smallest correlation of activations for which a feature lives on in a layer"),
    ] = LEAST_AGREEMENT
    validation: Annotated[
        Validation | None,
        Doc("test links by removing predecessors in the model; none leaves the test out"),
    ] = None
    seed: Annotated[int, Ge(0), Doc("of nulls, chance pairs and communities")] = 0

    @field_validator("matcher")
    @classmethod
    def _known(cls, name: str) -> str:
        matcher_named(name)
        return name


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What links are made from."""

    collect: Artifact
    train: Artifact


def run(config: Config, inputs: Inputs, out: Path, context: RunContext) -> Artifact:
    """Link the dictionaries of a train artifact. Raises UserError."""
    digests = {"collect": inputs.collect.digest, "train": inputs.train.digest}
    with Artifact.create(out, kind=KIND, schema=SCHEMA, config=config, inputs=digests) as draft:
        started = time.monotonic()
        opened = Run.of({"collect": inputs.collect, "train": inputs.train}, context=context)
        saes = opened.saes.keeping(0, device="cpu")
        links = _linked(config, opened, saes)
        draft.summary.update(summary_of(links))
        edges = links.edges
        if config.validation is not None:
            found = validate_links(
                edges,
                saes,
                opened.model,
                opened.store,
                options=config.validation,
                progress=context.progress,
            )
            edges = attach_evidence(edges, found.evidence)
            draft.summary.update(_write_validation(found, draft.path))
        write_tables(
            draft.path, {"nodes": links.nodes, "edges": edges, "pairs": links.pairs}, links.warnings
        )
        _draw(links, draft.path / "figures")
        for record in _records(links.pairs):
            draft.write_metrics(record)
        draft.summary["seconds"] = round(time.monotonic() - started, 1)
    return Artifact.open(out, kind=KIND, schema=SCHEMA)


def _linked(config: Config, opened: Run, saes: Saes) -> Links:
    names = ("matcher", "top_k", "null", "n_null", "thresholds", "least_agreement", "seed")
    options = LinkOptions(**{name: getattr(config, name) for name in names})
    n_tokens, context = config.functional_tokens, opened.context
    whole = saes.folder.parent / CROSS_LAYER
    return link_dictionaries(
        saes,
        options=options,
        held_out=opened.held_out(n_tokens) if n_tokens else None,
        start_nulls=_start_nulls(config, opened, saes),
        projections=_projections(opened, saes),
        decoders=Decoders(whole) if whole.is_dir() else None,
        device=context.device,
        progress=context.progress,
        machines=context,
    )


def _projections(opened: Run, saes: Saes) -> dict[Site, Tensor]:
    """W_O of every site before one: heads are compared by what they write into the stream."""
    sites = [site for site in saes if site.kind == "z"]
    found = {site: values_of_heads(opened.model, site.layer) for site in sites}
    return {site: rows for site, rows in found.items() if rows is not None}


def _start_nulls(config: Config, opened: Run, saes: Saes) -> dict[Relation, NullSample]:
    """What inertia leaves, by relation, for dictionaries of one start; empty when none are or the
    choice is another."""
    if not isinstance(config.null, Automatic) or not config.null.trained_pairs:
        return {}
    return trained_start_nulls(
        saes,
        opened.store,
        opened.context,
        n_per_relation=config.null.trained_pairs,
        seed=config.seed,
    )


def trained_start_nulls(
    dictionaries: Saes,
    store: ActivationStore,
    context: RunContext,
    *,
    n_per_relation: int,
    seed: int,
) -> dict[Relation, NullSample]:
    """Train null dictionaries on the store's rows: what inertia leaves, by relation."""
    samples = []
    for plan in plan_nulls(dictionaries, n_per_relation):
        kept = store.kept_rows("train", sites=[plan.moved])
        n_rows = min(len(kept), plan.recipe.schedule.steps * plan.recipe.batch_size, MOST_NULL_ROWS)
        rows = read_rows(store, plan.moved, kept[:n_rows])
        sites = [plan.moved, *([plan.start] if plan.start else [])]
        normalisations = {site: normalisation_at(store, site) for site in sites}
        sample = start_sample(
            plan,
            dictionaries,
            rows,
            normalisations,
            seed=seed + NULL_SEED,
            device=context.device,
            progress=context.progress,
        )
        samples.append((plan.pair.relation, sample))
    return pooled(samples)


def _draw(links: Links, figures: Path) -> None:
    figures.mkdir(exist_ok=True)
    save(draw_link_strengths(links.pairs), figures / "link_strength")
    save(draw_class_shares(links.nodes), figures / "classes_by_layer")


def _write_validation(found: ValidatedLinks, folder: Path) -> dict[str, Any]:
    """The causal tables, and the headline numbers of the top-1 strategy for residual links."""
    for name in ("trials", "summary", "by_pair"):
        getattr(found, name).to_parquet(folder / f"causal_{name}.parquet", index=False)
    rows = found.summary[
        (found.summary["relation"] == "residual") & (found.summary["strategy"] == TOP_1)
    ]
    if not len(rows):
        return {}
    return {
        f"causal_{name}": round(float(rows[name].iloc[0]), 4)
        for name in ("success", "success_no_model", "success_by_model", "success_all", "change")
        if name in rows
    }


def summary_of(links: Links) -> dict[str, Any]:
    """The headline numbers: how much is linked, by what evidence, and how the fixed threshold would
    have done. Only links between dictionaries of different starts count as carried: those of one
    start mostly join latents of the same number, as the start did."""
    residual = links.pairs[links.pairs["relation"] == "residual"]
    classes = links.nodes["class"].value_counts(normalize=True)
    numbers: dict[str, Any] = {
        "n_features_alive": int(links.nodes["alive"].sum()),
        "n_links": int(links.pairs["n_links"].sum()),  # best links: the rate is controlled for them
        "n_warnings": len(links.warnings),
    }
    discovered = residual[residual["start"] != "same_start"]
    inherited = residual[residual["start"] == "same_start"]
    if len(discovered):
        numbers["carried_share"] = _share(discovered, "n_links")
    if len(inherited):  # their links were there before training: no discovery
        numbers["same_start_same_number_share"] = _share(inherited, "n_same_number")
    if len(residual):
        numbers["residual_linked_share"] = _share(residual, "n_links")
        numbers["fixed_threshold_share"] = _share(residual, "n_above_fixed")
        for column in (
            "cosine_median",
            "null_p99",
            "pearson_median",
            "pearson_best_median",
            "agreement",
        ):
            value = residual[column].astype(float).median()
            numbers[f"residual_{column}"] = None if pd.isna(value) else round(float(value), 4)
    numbers |= {f"share_{name}": round(float(share), 4) for name, share in classes.items()}
    numbers["persistence_median"] = _median_persistence(links.nodes)
    return numbers


def _share(pairs: pd.DataFrame, count: str) -> float:
    return round(float(pairs[count].sum() / max(int(pairs["n_targets"].sum()), 1)), 4)


def _median_persistence(nodes: pd.DataFrame) -> float | None:
    living = nodes[nodes["alive"] & nodes["kind"].str.startswith("resid_")]
    return float(living["persistence"].median()) if len(living) else None


def _records(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """One flat metrics record a pair; unknown values are left out."""
    flat = pairs.drop(columns=["histogram", "null_histogram"]).to_dict(orient="records")
    return [
        {str(name): value for name, value in record.items() if not pd.isna(value)}
        for record in flat
    ]
