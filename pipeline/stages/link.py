"""Dictionaries → the flow graph: which feature of one layer is which feature of the next, with calibrated evidence.

1. Read dictionaries one at a time and, for the functional check, held-out activations of the same tokens at every site.
2. Link neighbouring dictionaries (pipeline/flow/link.py): cosine, null, firing, false-discovery rate.
3. Write nodes, edges, pairs (Parquet), warnings (JSON) and the figures.

Input: a train artifact, and the collect artifact its dictionaries were trained on. Output: `nodes.parquet`,
`edges.parquet`, `pairs.parquet`, `warnings.json`, `figures/`. Cost: about 1.3 matrix products of
[latent, d_model] × [d_model, latent] per pair, and one encoding of the held-out tokens per site.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
from annotated_types import Ge
from typing_extensions import Doc

from data.store import ActivationStore
from pipeline.artifact import Artifact
from pipeline.flow.figures import draw_class_shares, draw_link_strengths
from pipeline.flow.link import Links, link_dictionaries
from pipeline.flow.options import Automatic, Calibrated, LinkOptions, NullChoice, Thresholds
from pipeline.flow.sources import DictionaryFolder, held_out_from
from pipeline.flow.tables import write_tables
from pipeline.run import RunContext

KIND, SCHEMA = "link", 1


@dataclass(frozen=True, kw_only=True)
class Config:
    """How links are found, judged and checked."""

    top_k: Annotated[int, Ge(1), Doc("predecessors kept for each feature and relation, best first")] = 5
    null: Annotated[NullChoice, Doc("the idea of chance that links are compared with")] = field(
        default_factory=Automatic
    )
    n_null: Annotated[int, Ge(100), Doc("best cosines drawn from the null for each pair of dictionaries")] = 8192
    thresholds: Annotated[Thresholds, Doc("which links are kept")] = field(default_factory=Calibrated)
    functional_tokens: Annotated[
        int, Ge(0), Doc("held-out tokens on which firing is compared; 0 leaves the check out")
    ] = 8192
    seed: Annotated[int, Ge(0), Doc("of nulls, chance pairs and communities")] = 0


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What links are made from."""

    collect: Artifact
    train: Artifact


def run(config: Config, inputs: Inputs, out: Path, context: RunContext) -> Artifact:
    """Link the dictionaries of a train artifact. Raises UserError."""
    digests = {"collect": inputs.collect.digest, "train": inputs.train.digest}
    with Artifact.create(out, kind=KIND, schema=SCHEMA, config=config, inputs=digests) as draft:
        links = _linked(config, inputs, context)
        write_tables(draft.path, {"nodes": links.nodes, "edges": links.edges, "pairs": links.pairs}, links.warnings)
        figures = draft.path / "figures"
        figures.mkdir(exist_ok=True)
        draw_link_strengths(links.pairs, figures / "link_strength.png")
        draw_class_shares(links.nodes, figures / "classes_by_layer.png")
        for record in _records(links.pairs):
            draft.write_metrics(record)
        draft.summary.update(summary_of(links))
    return Artifact.open(out, kind=KIND, schema=SCHEMA)


def _linked(config: Config, inputs: Inputs, context: RunContext) -> Links:
    dictionaries = DictionaryFolder(inputs.train.path / "dictionaries")
    options = LinkOptions(
        top_k=config.top_k, null=config.null, n_null=config.n_null, thresholds=config.thresholds, seed=config.seed
    )
    held_out = None
    if config.functional_tokens:
        held_out = held_out_from(ActivationStore.open(inputs.collect.path / "store.zarr"), config.functional_tokens)
    return link_dictionaries(
        dictionaries, options=options, held_out=held_out, device=context.device, progress=context.progress
    )


def summary_of(links: Links) -> dict[str, Any]:
    """The headline numbers: how much is carried, by what evidence, and how the fixed threshold would have done."""
    residual = links.pairs[links.pairs["relation"] == "residual"]
    classes = links.nodes["class"].value_counts(normalize=True)
    numbers: dict[str, Any] = {
        "n_features_alive": int(links.nodes["alive"].sum()),
        "n_links": int(links.edges["kept"].sum()),
        "n_warnings": len(links.warnings),
    }
    if len(residual):
        total = int(residual["n_targets"].sum())
        numbers["carried_share"] = round(float(residual["n_links"].sum() / max(total, 1)), 4)
        numbers["carried_share_fixed_threshold"] = round(float(residual["n_above_fixed"].sum() / max(total, 1)), 4)
        for column in ("cosine_median", "null_p99", "pearson_median", "pearson_best_median", "agreement"):
            value = residual[column].astype(float).median()
            numbers[f"residual_{column}"] = None if pd.isna(value) else round(float(value), 4)
    numbers |= {f"share_{name}": round(float(share), 4) for name, share in classes.items()}
    numbers["persistence_median"] = _median_persistence(links.nodes)
    return numbers


def _median_persistence(nodes: pd.DataFrame) -> float | None:
    living = nodes[nodes["alive"] & ~nodes["kind"].isin(["mlp_out", "attn_out"])]
    return float(living["persistence"].median()) if len(living) else None


def _records(pairs: pd.DataFrame) -> list[dict[str, Any]]:
    """One flat metrics record a pair; unknown values are left out."""
    flat = pairs.drop(columns=["histogram", "null_histogram"]).to_dict(orient="records")
    return [{str(name): value for name, value in record.items() if not pd.isna(value)} for record in flat]
