"""One site's dictionary: a job, the store and a folder in; `sae.safetensors`, `sae.json` and `training.jsonl` out.

1. A finished folder is left as it is; a checkpoint is continued exactly where it was written.
2. Read the site's training rows, into memory if there are at most `max_rows_in_memory`, else in shuffled windows.
3. Start from random directions or from the parent's dictionary, in this site's own normalisation.
4. Train; checkpoint now and then; calibrate thresholds and measure FVU and L0 on held-out rows.
5. Write the curve, then the dictionary (its description last, which is what "finished" means), and drop the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from data.sites import Site
from data.store import ActivationStore
from data.store.tokens import RowFilters
from pipeline.artifact import write_text_atomically
from pipeline.training.plan import SiteJob
from sae import Sae, load_sae, save_sae
from sae.batches import Batch, Batches, InMemoryBatches
from sae.checkpoint import read_checkpoint, write_checkpoint
from sae.kernels.select import Precision
from sae.normalisation import Normalisation, normalisation_of, unfold
from sae.report import Metrics, Progress, discard, silent
from sae.trainer import Schedule, Trainer, dead_window, random_start, train

CURVE, CHECKPOINT = "training.jsonl", "checkpoint.safetensors"
_READ_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What all sites of a run share."""

    batch_size: int
    warmup_steps: int
    decay_fraction: float
    clip_norm: float
    precision: Precision
    filters: RowFilters
    max_rows_in_memory: int
    held_out_rows: int
    record_every: int
    checkpoint_every: int
    device: str = "cpu"


class Stopped(Exception):
    """Training was asked to stop; the last checkpoint stays."""


def train_site(
    job: SiteJob,
    store: ActivationStore,
    options: TrainingOptions,
    folder: Path,
    *,
    progress: Progress = silent,
    metrics: Metrics = discard,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train, or find trained, the dictionary of `job.site` under `folder`; returns its description's metadata."""
    place = folder / job.site.short
    if (place / "sae.json").is_file():
        return load_sae(place).metadata
    if stopping():
        raise Stopped
    normalisation = normalisation_at(store, job.site).to(options.device)
    trainer = _trainer(job, store, options, folder, normalisation)
    batches = _batches(job, store, options)
    _resume(place / CHECKPOINT, trainer, batches)
    seconds = _run(job, trainer, batches, options, place, progress, metrics, stopping)
    held_out = read_rows(store, job.site, held_out_rows(job.site, store, options))
    on_device = Batch(x=held_out.to(options.device)) if len(held_out) else None
    sae = trainer.finish(on_device, {**_description(job, store, options), "held_out_rows": len(held_out)})
    sae.metadata.update(_measured(sae, held_out) | {"dead": trainer.records[-1]["dead"] / job.n_latents})
    _write(place, sae, trainer.records)
    metrics({"site": job.site.short, "seconds": seconds, **_headline(sae)})
    return sae.metadata


def normalisation_at(store: ActivationStore, site: Site) -> Normalisation:
    """The training space of a site, from the statistics kept in the store."""
    statistics = store.statistics(site)
    mean, variance = torch.from_numpy(np.array(statistics.mean)), torch.from_numpy(np.array(statistics.variance))
    return normalisation_of(mean, variance)


def read_rows(store: ActivationStore, site: Site, rows: Int64[np.ndarray, "row"]) -> Float[Tensor, "row d_model"]:
    """The given rows (ascending) of a site."""
    out = torch.empty(len(rows), store.width(site))
    for first in range(0, store.n_rows, _READ_ROWS):
        begin, end = np.searchsorted(rows, (first, first + _READ_ROWS))
        if end > begin:
            values = store.read(site, int(rows[begin]), int(rows[end - 1]) + 1)
            out[begin:end] = torch.from_numpy(values[rows[begin:end] - rows[begin]])
    return out


def held_out_rows(site: Site, store: ActivationStore, options: TrainingOptions) -> Int64[np.ndarray, "row"]:
    """The rows that set thresholds and measure FVU: the first of the held-out ones that training's filters keep."""
    return store.kept_rows("validation", options.filters, sites=[site])[: options.held_out_rows]


class _WindowBatches:
    """Batches read from the store in shuffled windows, for sites that do not fit in memory."""

    def __init__(self, store: ActivationStore, site: Site, options: TrainingOptions, seed: int) -> None:
        self._site = site
        self._reader = store.batches(
            [site], batch_size=options.batch_size, seed=seed, filters=options.filters, device=options.device
        )

    def next_batch(self) -> Batch:
        return Batch(x=next(self._reader)[self._site])

    def state(self) -> dict[str, Any]:
        return self._reader.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._reader.restore(state)

    def locate(self, rows: Sequence[int]) -> str:
        state = self._reader.state()
        shard_rows = self._reader.store.shard_rows
        if state["batch"] == 0:
            return f"{self._site.short}, the last batch of epoch {state['epoch'] - 1}"
        found = self._reader.rows_of(state["epoch"], state["batch"] - 1)[list(rows)]
        return f"{self._site.short}, " + ", ".join(f"row {row} (shard {row // shard_rows})" for row in found)

    def close(self) -> None:
        self._reader.close()


def _batches(job: SiteJob, store: ActivationStore, options: TrainingOptions) -> Batches:
    rows = store.kept_rows("train", options.filters, sites=[job.site])
    if len(rows) > options.max_rows_in_memory:
        return _WindowBatches(store, job.site, options, job.seed)
    x = read_rows(store, job.site, rows).to(options.device)
    name, shard_rows = job.site.short, store.shard_rows
    return InMemoryBatches(
        x,
        batch_size=options.batch_size,
        seed=job.seed,
        name_of_row=lambda row: f"{name} row {rows[row]} (shard {rows[row] // shard_rows})",
    )


def _trainer(
    job: SiteJob, store: ActivationStore, options: TrainingOptions, folder: Path, normalisation: Normalisation
) -> Trainer:
    if job.parent is None:
        weights = job.architecture.prepared(random_start(job.n_latents, store.width(job.site), seed=job.seed))
    else:
        weights = unfold(load_sae(folder / job.parent.short), normalisation_at(store, job.parent))
    schedule = Schedule(
        steps=job.steps,
        learning_rate=job.learning_rate,
        warmup_steps=min(options.warmup_steps, job.steps // 2),
        decay_fraction=options.decay_fraction,
        clip_norm=options.clip_norm,
        dead_after=dead_window(job.steps, options.batch_size),
        record_every=options.record_every,
    )
    return Trainer(
        architecture=job.architecture,
        schedule=schedule,
        weights={name: weight.to(options.device) for name, weight in weights.items()},
        source=normalisation,
        precision=options.precision,
    )


def _resume(path: Path, trainer: Trainer, batches: Batches) -> None:
    if path.is_file():
        tensors, state = read_checkpoint(path)
        trainer.restore(tensors, state["trainer"])
        batches.restore(state["batches"])


def _run(
    job: SiteJob,
    trainer: Trainer,
    batches: Batches,
    options: TrainingOptions,
    place: Path,
    progress: Progress,
    metrics: Metrics,
    stopping: Callable[[], bool],
) -> float:
    """Train to the end; returns the seconds it took."""
    label, first, started = f"train {job.site.short}", trainer.step, time.monotonic()

    def each_step(step: int) -> None:
        progress(label, step, job.steps)
        if stopping():
            raise Stopped

    def each_record(record: dict[str, float]) -> None:
        speed = (trainer.step - first) * options.batch_size / (time.monotonic() - started)
        metrics({"site": job.site.short, **record, "tokens_per_second": round(speed)})

    def checkpoint() -> None:
        tensors, numbers = trainer.state()
        write_checkpoint(place / CHECKPOINT, tensors, {"trainer": numbers, "batches": batches.state()})

    try:
        train(
            trainer,
            batches,
            each_step=each_step,
            each_record=each_record,
            checkpoint=checkpoint,
            checkpoint_every=options.checkpoint_every,
        )
    finally:
        if isinstance(batches, _WindowBatches):
            batches.close()
    return round(time.monotonic() - started, 3)


def _description(job: SiteJob, store: ActivationStore, options: TrainingOptions) -> dict[str, Any]:
    return {
        "site": job.site.name,
        "model": store.provenance.get("model"),
        "model_fingerprint": store.provenance.get("model_fingerprint"),
        "architecture": dataclasses.asdict(job.architecture),
        "initialisation": {
            "kind": job.kind,
            "group": job.group,
            "parent": None if job.parent is None else job.parent.short,
            "seed": job.seed,
        },
        "steps": job.steps,
        "batch_size": options.batch_size,
        "n_tokens": job.steps * options.batch_size,
        "learning_rate": job.learning_rate,
        "precision": options.precision,
    }


def _measured(sae: Sae, held_out: Float[Tensor, "row d_model"]) -> dict[str, Any]:
    """FVU against the held-out mean, and L0, in float64 sums."""
    if not len(held_out):
        return {"held_out_fvu": None, "held_out_l0": None}
    error = total = active = 0.0
    mean = held_out.double().mean(0)
    for block in held_out.split(_READ_ROWS):
        codes = sae.encode_sparse(block)
        error += float((sae.decode(codes).double() - block.double()).square().sum())
        total += float((block.double() - mean).square().sum())
        active += float((codes.value > 0).sum())
    return {"held_out_fvu": error / max(total, 1e-300), "held_out_l0": active / len(held_out)}


def _headline(sae: Sae) -> dict[str, float]:
    names = ("held_out_fvu", "held_out_l0", "dead")
    return {name: sae.metadata[name] for name in names if sae.metadata[name] is not None}


def _write(place: Path, sae: Sae, records: Sequence[Mapping[str, float]]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    write_text_atomically(place / CURVE, "".join(json.dumps(record) + "\n" for record in records))
    save_sae(sae, place)
    (place / CHECKPOINT).unlink(missing_ok=True)
