"""Activations → dictionaries: train one sparse autoencoder per site of the store, all sites in one
run.

1. Plan the jobs: which site starts from which (pipeline/training/plan.py), which variants of a
   sweep learn beside it and which transcoders are wanted (pipeline/training/batch_jobs.py), and
   whether memory suffices.
2. Train the sites over the cores, or over a Dask cluster, each batch read once for all dictionaries
   of a site; every site resumes where it was killed (pipeline/training/site.py).
3. Write the curves of all dictionaries to `metrics.jsonl`, and the figures.

Output: `dictionaries/<site>/sae.safetensors, sae.json, training.jsonl`, the same under
`variants/<name>/<site>` and `transcoders/<site>`; `metrics.jsonl`; `figures/`. Cost of a step of a
TopK-like dictionary: one product of batch × d_model × n_latents, plus about k / n_latents of five
more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field
from typing_extensions import Doc

from data.store import ActivationStore
from data.store.cluster import connected, threads_of_worker
from data.store.patterns import parse_sites
from data.tokens import RowFilters
from featureflow.errors import UserError
from featureflow.figures import save
from featureflow.files import write_text_atomically
from featureflow.progress import Metrics
from featureflow.settings import Settings
from featureflow.sites import Site
from pipeline.artifact import SCHEMAS, Artifact, Draft
from pipeline.context import RunContext
from pipeline.run import Run
from pipeline.stages.stage_figures import draw_curves, draw_layers
from pipeline.training.batch_jobs import (
    BASE,
    DICTIONARIES,
    TRANSCODERS,
    BatchJob,
    Transcoders,
    Variant,
    batch_jobs_of,
    transcoder_jobs,
)
from pipeline.training.cluster import Described, run_on_cluster
from pipeline.training.imported import (
    Imported,
    identity_of_imported,
    import_dictionaries,
    warnings_of,
)
from pipeline.training.memory import check_memory
from pipeline.training.plan import Independent, Initialisation, Override, SiteJob, plan_jobs
from pipeline.training.reading import TrainingOptions
from pipeline.training.schedule import run_jobs, widest
from pipeline.training.site import CURVE, train_batch_job
from pipeline.training.trackers import Tracker, check_trackers, tracked
from sae.architectures import AnyArchitecture, TopK
from sae.kernels.memory import kept_memory
from sae.kernels.select import has_fast_bfloat16
from sae.step import Precision

KIND, SCHEMA = "train", SCHEMAS["train"]


class Config(Settings):
    """What is trained, how long, and from what start."""

    architecture: Annotated[AnyArchitecture, Doc("how latents are chosen and kept few")] = TopK()
    n_latents: Annotated[int, Gt(0), Doc("latents of each dictionary")] = 2048
    sites: Annotated[
        tuple[str, ...], Doc("sites or patterns to train at; empty for all in the store")
    ] = ()
    initialisation: Annotated[Initialisation, Doc("what each dictionary starts from")] = (
        Independent()
    )
    steps: Annotated[
        int, Gt(0), Doc("optimizer steps of a dictionary that starts from random directions")
    ] = 1000
    batch_size: Annotated[int, Gt(0), Doc("tokens of a step")] = 1024
    learning_rate: Annotated[
        float | None,
        Gt(0),
        Doc("peak learning rate; none for one that follows the width and the steps"),
    ] = None
    warmup_steps: Annotated[int, Ge(0), Doc("steps of linear warm-up; at most half of a run")] = 50
    decay_fraction: Annotated[
        float, Ge(0), Le(1), Doc("last part of a run over which the rate falls to 0")
    ] = 0.2
    clip_norm: Annotated[float, Gt(0), Doc("largest norm of all gradients together")] = 1.0
    precision: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Doc(
            "dtype of the encoder's product while training; auto: bfloat16 where the machine is "
            "fast at it"
        ),
    ] = "auto"
    filters: Annotated[RowFilters, Doc("which rows are left out")] = RowFilters()
    overrides: Annotated[
        tuple[Override, ...], Doc("choices that differ at some sites; later ones win")
    ] = ()
    sweep: Annotated[
        tuple[Variant, ...], Doc("more dictionaries at the same sites, trained on the same batches")
    ] = ()
    used: Annotated[
        str, Doc("the variant that the later stages see: base, or one of the sweep")
    ] = BASE
    transcoders: Annotated[
        Transcoders | None, Doc("dictionaries from an MLP's input to its output; none for none")
    ] = None
    max_rows_in_memory: Annotated[
        int, Ge(0), Doc("sites with more rows are read in shuffled windows")
    ] = 1_000_000
    held_out_rows: Annotated[
        int, Ge(0), Doc("held-out rows that set thresholds and measure FVU at the end")
    ] = 16_384
    record_every: Annotated[int, Gt(0), Doc("steps between two points of a curve")] = 25
    checkpoint_every: Annotated[int, Gt(0), Doc("steps between two checkpoints of a site")] = 500
    seed: Annotated[int, Ge(0), Lt(2**31), Doc("of random starts and of the order of rows")] = 0
    log_to: Annotated[
        tuple[Tracker, ...],
        Doc("experiment trackers that get the curves: tensorboard, wandb; no part of the digest"),
    ] = Field(default=(), exclude=True)
    imported: Annotated[
        Imported | None,
        Doc(
            "dictionaries that others trained, read at `sites` instead of training; all else is "
            "ignored then"
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What dictionaries are trained on."""

    collect: Artifact


def outside_digests(config: Config) -> dict[str, str]:
    """What the result depends on besides config and activations: the files of imported
    dictionaries."""
    return {} if config.imported is None else {"imported": identity_of_imported(config.imported)}


def run(config: Config, inputs: Inputs, out: Path, context: RunContext) -> Artifact:
    """Train every site. Raises UserError before anything is written if a choice is impossible."""
    store = Run.of({"collect": inputs.collect}, context=context).store
    if config.imported is not None:
        return _run_import(config, config.imported, inputs, store, out, context)
    parts = batch_jobs_by_part(config, store)
    check_trackers(config.log_to)
    options = options_of(config, context.device)
    n_workers = (
        1
        if context.device != "cpu"
        else max(1, min(context.n_threads, max(map(widest, map(_jobs, parts)))))
    )
    check_memory(
        [batch_job for part in parts for batch_job in part.values()], store, options, n_workers
    )
    with Artifact.create(
        out, kind=KIND, schema=SCHEMA, config=config, inputs={"collect": inputs.collect.digest}
    ) as draft:
        started = time.monotonic()
        with kept_memory(), tracked(config.log_to, out.parent, draft.config) as trackers:
            context = replace(context, metrics=_all([context.metrics, *trackers]))
            described = _train_all(parts, store, options, draft, context, n_workers)
        _describe(draft, described)
        draft.summary["seconds"] = round(time.monotonic() - started, 1)
    return Artifact.open(out, kind=KIND, schema=SCHEMA)


def _run_import(
    config: Config,
    choice: Imported,
    inputs: Inputs,
    store: ActivationStore,
    out: Path,
    context: RunContext,
) -> Artifact:
    """Read the dictionaries instead of training; the figure shows what they are."""
    digests = {"collect": inputs.collect.digest, **outside_digests(config)}
    with Artifact.create(out, kind=KIND, schema=SCHEMA, config=config, inputs=digests) as draft:
        sites = _sites(config, store)
        described = import_dictionaries(
            choice, store, draft.path, sites=sites, progress=context.progress
        )
        if warnings := warnings_of(described):
            write_text_atomically(draft.path / "warnings.json", json.dumps(warnings))
        draft.summary["n_dictionaries"] = len(described.get(DICTIONARIES, ()))
        if TRANSCODERS in described:
            draft.summary["n_transcoders"] = len(described[TRANSCODERS])
        draft.summary["imported"] = True
    return Artifact.open(out, kind=KIND, schema=SCHEMA)


def _sites(config: Config, store: ActivationStore) -> tuple[Site, ...]:
    return tuple(parse_sites(config.sites, store.sites)) if config.sites else store.sites


def jobs_of(config: Config, store: ActivationStore) -> tuple[SiteJob, ...]:
    """The plan of a run. Raises UserError with every impossible choice."""
    sites = _sites(config, store)
    widths = {site.short: store.width(site) for site in sites}
    starts_alike = not isinstance(config.initialisation, Independent)
    if store.is_of_any_module and starts_alike and len(set(widths.values())) > 1:
        raise UserError(
            "sites of different width cannot start alike",
            where="train.initialisation",
            found=", ".join(f"{site}: {width}" for site, width in widths.items()),
            fix='train.initialisation = {kind = "independent"}',
        )
    return plan_jobs(
        sites,
        architecture=config.architecture,
        n_latents=config.n_latents,
        steps=config.steps,
        learning_rate=config.learning_rate,
        initialisation=config.initialisation,
        overrides=[
            (parse_sites(override.sites, store.sites), override) for override in config.overrides
        ],
        seed=config.seed,
    )


def batch_jobs_by_part(config: Config, store: ActivationStore) -> list[dict[Site, BatchJob]]:
    """The batch jobs of a run, parents first: those of the plan with their variants, then those of
    transcoders. Raises UserError."""
    parts = [
        batch_jobs_of(
            jobs_of(config, store),
            config.sweep,
            store,
            used=config.used,
            steps=config.steps,
            learning_rate=config.learning_rate,
        )
    ]
    if config.transcoders is not None:
        choice = config.transcoders
        parts.append(
            transcoder_jobs(choice, store, seed=config.seed, learning_rate=config.learning_rate)
        )
    return parts


def _jobs(batch_jobs: Mapping[Site, BatchJob]) -> list[SiteJob]:
    """One job for each batch job: that of the plan, whose parent all its SAEs wait for."""
    return [batch_job[0].job for batch_job in batch_jobs.values()]


def options_of(config: Config, device: str) -> TrainingOptions:
    """What all sites share, with `auto` decided for this machine."""
    precision: Precision = "bfloat16" if has_fast_bfloat16(device) else "float32"
    names: tuple[str, ...] = (
        "batch_size",
        "warmup_steps",
        "decay_fraction",
        "clip_norm",
        "filters",
    )
    names += ("max_rows_in_memory", "held_out_rows", "record_every", "checkpoint_every")
    return TrainingOptions(
        **{name: getattr(config, name) for name in names},
        precision=precision if config.precision == "auto" else config.precision,
        device=device,
    )


def _train_all(
    parts: Sequence[Mapping[Site, BatchJob]],
    store: ActivationStore,
    options: TrainingOptions,
    draft: Draft,
    context: RunContext,
    n_workers: int,
) -> dict[str, dict[Site, dict[str, Any]]]:
    """What is known about every dictionary, by folder and site in the order of the model."""
    found: dict[str, dict[Site, dict[str, Any]]] = {DICTIONARIES: {}}
    with connected(context) as client:
        for batch_jobs in parts:
            if client is None:
                done = _train_here(batch_jobs, store, options, draft, context, n_workers)
            else:
                threads = threads_of_worker(context)
                done = run_on_cluster(
                    client,
                    batch_jobs,
                    store,
                    options,
                    draft.path,
                    n_threads=threads,
                    progress=context.progress,
                )
                _tell_curves(done, draft.path, context.metrics)
            for site in sorted(done):
                for folder, metadata in done[site].items():
                    found.setdefault(folder, {})[site] = metadata
    return found


def _train_here(
    batch_jobs: Mapping[Site, BatchJob],
    store: ActivationStore,
    options: TrainingOptions,
    draft: Draft,
    context: RunContext,
    n_workers: int,
) -> dict[Site, Described]:
    metrics = _all([draft.write_metrics, context.metrics])

    def work(job: SiteJob, stopping: Callable[[], bool]) -> Described:
        batch_job = batch_jobs[job.site]
        return train_batch_job(
            batch_job,
            store,
            options,
            draft.path,
            progress=context.progress,
            metrics=metrics,
            stopping=stopping,
        )

    return run_jobs(_jobs(batch_jobs), work, n_workers=n_workers, n_threads=context.n_threads)


def _all(callbacks: Sequence[Metrics]) -> Metrics:
    def report(record: Mapping[str, float | int | str]) -> None:
        for callback in callbacks:
            callback(record)

    return report


def _tell_curves(done: Mapping[Site, Described], folder: Path, metrics: Metrics) -> None:
    """The records of dictionaries that a cluster trained, which wrote them to files only."""
    for site, described in done.items():
        for name in described:
            for record in _read_curve(folder / name / site.short / CURVE):
                metrics({**_whose(name, site), **record})


def _describe(draft: Draft, described: Mapping[str, Mapping[Site, Mapping[str, Any]]]) -> None:
    """The curves in the order of the sites, whatever the order they were trained in; figures;
    headline numbers."""
    curves = {
        (folder, site): _read_curve(draft.path / folder / site.short / CURVE)
        for folder, sites in described.items()
        for site in sites
    }
    lines = [
        json.dumps({**_whose(folder, site), **record})
        for (folder, site), records in curves.items()
        for record in records
    ]
    write_text_atomically(draft.metrics_path, "\n".join(lines) + "\n")
    figures = draft.path / "figures"
    figures.mkdir(exist_ok=True)
    used = described[DICTIONARIES]
    trained = {site: curves[DICTIONARIES, site] for site in used}
    save(draw_curves(trained), figures / "training")
    save(draw_layers(used), figures / "layers")
    draft.summary.update(_summary(used))
    if others := {
        folder: len(sites) for folder, sites in described.items() if folder != DICTIONARIES
    }:
        draft.summary["n_others"] = others


def _whose(folder: str, site: Site) -> dict[str, str]:
    return {"site": site.short} | ({} if folder == DICTIONARIES else {"of": folder})


def _read_curve(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _summary(described: Mapping[Site, Mapping[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {"n_dictionaries": len(described)}
    for name, short in (("held_out_fvu", "fvu"), ("held_out_l0", "l0"), ("dead", "dead")):
        values = sorted(each[name] for each in described.values() if each[name] is not None)
        if values:
            summary[f"{short}_median"] = round(values[len(values) // 2], 4)
    return summary
