"""Dictionaries → numbers: how well each one reconstructs held-out activations, and what the model
loses by it.

1. Draw held-out rows by seed; for every dictionary encode, decode and measure (sae/metrics.py,
   formulas in docs/metrics.md), with intervals over documents, beside a PCA of as many components
   as latents are active.
2. At some sites run the model with the reconstruction in place of the activation and compare with
   zero and mean ablation (pipeline/lenses/evaluation.py).
3. Write one row a dictionary, the PCA curves, the frontier of L0 and FVU where several share a
   site, and the figures.

Output: `metrics.parquet`, `metrics.json` (the same rows), `pca.parquet`, `frontier.parquet`,
`figures/`. A killed run keeps its rows. Cost: one encoding of `n_tokens` per dictionary, one d×d
eigendecomposition per site; with the model, `ce_tokens` tokens through the blocks above the site,
three times a site.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from jaxtyping import Int
from typing_extensions import Doc

from data.store import ActivationStore
from data.store.provenance import digest_of_file
from data.store.store import Split
from data.store.tokens import RowFilters
from featureflow.errors import UserError
from featureflow.files import write_text_atomically
from featureflow.settings import Settings
from featureflow.sites import Site, parse_site
from featureflow.statistics import Interval
from pipeline.artifact import SCHEMAS, Artifact, Draft
from pipeline.context import RunContext
from pipeline.lenses.evaluation.candidates import TRAINED, Candidate, find_candidates
from pipeline.lenses.evaluation.figures import draw_by_layer, draw_frontier
from pipeline.lenses.evaluation.frontier import write_frontier
from pipeline.lenses.evaluation.held_out import choose_contexts, choose_rows
from pipeline.lenses.evaluation.reconstruction import Bootstrap, Rows, measure_site
from pipeline.lenses.evaluation.recovery import Recovery, Subject, measure_recovery
from pipeline.run import Run

KIND, SCHEMA = "evaluate", SCHEMAS["evaluate"]
_KEPT = ".rows"


class Config(Settings):
    """On how much, and where, dictionaries are measured."""

    n_tokens: Annotated[int, Ge(2), Doc("held-out tokens on which reconstruction is measured")] = (
        8192
    )
    n_pca_tokens: Annotated[
        int, Ge(0), Doc("train tokens the PCA baseline is fitted on; 0 leaves it out")
    ] = 8192
    ce_tokens: Annotated[
        int, Ge(0), Doc("held-out tokens run through the model; 0 leaves the model out")
    ] = 2048
    ce_sites: Annotated[
        tuple[str, ...], Doc("sites where the model is run; empty: n_ce_sites of them")
    ] = ()
    n_ce_sites: Annotated[
        int,
        Ge(1),
        Doc("residual sites where the model is run, spread over the depth, when none are named"),
    ] = 6
    n_resamples: Annotated[int, Ge(10), Doc("bootstrap resamples of documents")] = 1000
    filters: Annotated[RowFilters, Doc("which rows count")] = RowFilters()
    others: Annotated[
        tuple[str, ...],
        Doc("folders with further dictionaries, of any format, measured on the same rows"),
    ] = ()
    seed: Annotated[int, Ge(0), Doc("of the rows drawn and of the bootstrap")] = 0


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is measured, and on what."""

    collect: Artifact
    train: Artifact


def outside_digests(config: Config) -> dict[str, str]:
    """The files of `others`: the result depends on them too."""
    return {
        f"other:{folder}": "-".join(
            digest_of_file(file)[:16] for file in sorted(Path(folder).rglob("*")) if file.is_file()
        )
        for folder in config.others
    }


def run(config: Config, inputs: Inputs, out: Path, context: RunContext) -> Artifact:
    """Measure every dictionary. Raises UserError."""
    digests = {
        "collect": inputs.collect.digest,
        "train": inputs.train.digest,
        **outside_digests(config),
    }
    with Artifact.create(out, kind=KIND, schema=SCHEMA, config=config, inputs=digests) as draft:
        opened = Run.of({"collect": inputs.collect, "train": inputs.train}, context=context)
        store = opened.store
        candidates = find_candidates(inputs.train, config.others, store)
        rows, curves = _measure_all(config, store, candidates, draft, context)
        if config.ce_tokens:
            recoveries = _with_the_model(config, opened, candidates)
            rows = [row | _recovery_columns(recoveries.get(row["name"])) for row in rows]
        _write(draft, pd.DataFrame(rows), pd.DataFrame(curves))
        shutil.rmtree(draft.path / _KEPT)
    return Artifact.open(out, kind=KIND, schema=SCHEMA)


def _measure_all(
    config: Config,
    store: ActivationStore,
    candidates: Sequence[Candidate],
    draft: Draft,
    context: RunContext,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of metrics and of PCA curves; a site's numbers are kept in the draft, so that a killed
    run has them."""
    kept = draft.path / _KEPT
    kept.mkdir(exist_ok=True)
    draft.metrics_path.unlink(
        missing_ok=True
    )  # a killed run's; every record is written again below
    bootstrap = Bootstrap(n_resamples=config.n_resamples, seed=config.seed)
    rows, curves = [], []
    sites = list(dict.fromkeys(candidate.site for candidate in candidates))
    chosen = _choose(config, store, sites)
    for done, site in enumerate(sites):
        context.progress(f"evaluate {site.short}", done, len(sites))
        file = kept / f"{site.short}.json"
        if not file.exists():
            here = [candidate for candidate in candidates if candidate.site == site]
            found = measure_site(store, site, here, chosen, bootstrap, device=context.device)
            write_text_atomically(file, json.dumps(found))
        found = json.loads(file.read_text())
        rows += found["rows"]
        curves += [
            {"site": site.short, "n_components": k, "fvu": fvu}
            for k, fvu in enumerate(found["pca"])
        ]
        for row in found["rows"]:
            record = {
                name: row[name]
                for name in ("site", "source", "fvu", "l0", "dead_fraction", "cosine")
            }
            draft.write_metrics(record)
            context.metrics(record)
    context.progress("evaluate", len(sites), len(sites))
    return rows, curves


def _choose(config: Config, store: ActivationStore, sites: Sequence[Site]) -> Rows:
    def choose(split: Split, n_tokens: int) -> list[Int[np.ndarray, "row"]]:
        if not n_tokens:
            return []
        return choose_rows(
            store, split, n_tokens, filters=config.filters, seed=config.seed, sites=sites
        )

    return Rows(
        held_out=choose("validation", config.n_tokens), train=choose("train", config.n_pca_tokens)
    )


def _with_the_model(
    config: Config, opened: Run, candidates: Sequence[Candidate]
) -> dict[str, Recovery]:
    sites = _ce_sites(config, candidates)
    store, context = opened.store, opened.context
    subjects = [
        Subject(
            name=candidate.name,
            site=candidate.site,
            sae=candidate.load(context.device),
            mean=torch.from_numpy(store.statistics(candidate.site).mean),
            reads=candidate.reads,
        )
        for candidate in candidates
        if candidate.site in sites
    ]
    contexts = choose_contexts(store, config.ce_tokens, filters=config.filters, seed=config.seed)
    return measure_recovery(
        opened.model,
        subjects,
        contexts,
        n_resamples=config.n_resamples,
        seed=config.seed,
        progress=context.progress,
    )


def _ce_sites(config: Config, candidates: Sequence[Candidate]) -> set[Site]:
    available = list(dict.fromkeys(candidate.site for candidate in candidates))
    if config.ce_sites:
        wanted = {parse_site(name) for name in config.ce_sites}
        if missing := sorted(wanted - set(available)):
            raise UserError(
                "no dictionary to run the model with",
                where="evaluate.ce_sites",
                found=", ".join(site.short for site in missing),
                expected=", ".join(site.short for site in available),
            )
        return wanted
    stream = [site for site in available if site.kind == "resid_post"] or available
    spread = np.linspace(0, len(stream) - 1, min(config.n_ce_sites, len(stream)))
    return {stream[round(index)] for index in spread}


def _recovery_columns(recovery: Recovery | None) -> dict[str, Any]:
    if recovery is None:
        return {}
    columns: dict[str, Any] = {}
    for name, value in vars(recovery).items():
        if isinstance(value, Interval):
            stem = name.removesuffix("_interval")
            columns |= {f"{stem}_low": value.low, f"{stem}_high": value.high}
        else:
            columns[f"ce_{name}" if name in ("n_tokens", "n_documents") else name] = value
    return columns


def _write(draft: Draft, rows: pd.DataFrame, pca: pd.DataFrame) -> None:
    optional = [name for name in _RECOVERY_COLUMNS if name not in rows]
    rows = rows.assign(**dict.fromkeys(optional, np.nan))
    if not len(pca):
        pca = pd.DataFrame(
            {
                "site": pd.Series(dtype=str),
                "n_components": pd.Series(dtype=int),
                "fvu": pd.Series(dtype=float),
            }
        )
    rows.to_parquet(draft.path / "metrics.parquet", index=False)
    pca.to_parquet(draft.path / "pca.parquet", index=False)
    (draft.path / "metrics.json").write_text(
        rows.to_json(orient="records", indent=1, double_precision=10) + "\n"
    )
    figures = draft.path / "figures"
    figures.mkdir(exist_ok=True)
    draw_by_layer(_used(rows), figures / "by_layer.png")
    if rows["site"].duplicated().any():
        write_frontier(rows, draft.path / "frontier.parquet")
        draw_frontier(rows, pca, figures / "frontier.png")
    draft.summary.update(summary_of(rows))


def _used(rows: pd.DataFrame) -> pd.DataFrame:
    used = rows["source"] == TRAINED
    return rows[used] if used.any() else rows


_RECOVERY_COLUMNS = tuple(
    column
    for stem in ("ce_recovered_zero", "ce_recovered_mean")
    for column in (stem, f"{stem}_low", f"{stem}_high")
)


def summary_of(rows: pd.DataFrame) -> dict[str, Any]:
    """Headline numbers: medians over the dictionaries that later stages use (over all, where there
    are none of those), and how many explain more than a PCA of the same budget."""
    numbers: dict[str, Any] = {
        "n_dictionaries": len(rows),
        "n_tokens": int(rows["n_tokens"].iloc[0]),
    }
    rows = _used(rows)
    medians = {
        "fvu_median": "fvu",
        "pca_fvu_median": "pca_fvu",
        "l0_median": "l0",
        "dead_fraction_median": "dead_fraction",
        "ce_recovered_zero_median": "ce_recovered_zero",
        "ce_recovered_mean_median": "ce_recovered_mean",
    }
    for name, column in medians.items():
        values = rows[column].astype(float).dropna()
        if len(values):
            numbers[name] = round(float(values.median()), 4)
    if rows["pca_fvu"].notna().any():
        numbers["n_better_than_pca"] = int((rows["fvu"] < rows["pca_fvu"]).sum())
    return numbers
