"""One batch job: SAEs with the same batches, the store and a folder in; their dictionaries and
curves out.

1. A finished dictionary is left as it is; a checkpoint is continued exactly where it was written.
2. Read its training rows, into memory if there are at most `max_rows_in_memory`, else in shuffled
   windows.
3. Each SAE starts from random directions or from its parent's dictionary, in the site's own
   normalisation.
4. Every batch is read once and given to all SAEs that need it; one that is further on, because
   its checkpoint was, waits for the others. Checkpoint now and then.
5. An SAE that is through gets its thresholds, FVU and L0 from held-out rows. Write the curve,
   then the dictionary (its description last, which is what "finished" means), and drop the
   checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.store import ActivationStore
from featureflow.files import write_text_atomically
from featureflow.progress import DETAIL, Metrics, Progress, discard, silent
from pipeline.training.batch_jobs import DICTIONARIES, VARIANTS, BatchJob, SaeJob
from pipeline.training.plan import SiteJob
from pipeline.training.reading import (
    READ_ROWS,
    TrainingOptions,
    held_out_rows,
    normalisation_at,
    read_batch,
    reading,
)
from sae import Sae, load_sae, save_sae
from sae.batches import Batch, Batches
from sae.checkpoint import read_checkpoint, write_checkpoint
from sae.normalisation import unfold
from sae.schedule import Schedule, schedule_of
from sae.trainer import Trainer, random_start

CURVE, CHECKPOINT = "training.jsonl", "checkpoint.safetensors"


class Stopped(Exception):
    """Training was asked to stop; the last checkpoint stays."""


def train_batch_job(
    batch_job: BatchJob,
    store: ActivationStore,
    options: TrainingOptions,
    root: Path,
    *,
    progress: Progress = silent,
    metrics: Metrics = discard,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, dict[str, Any]]:
    """Train, or find trained, every dictionary of a batch job under `root`; returns their metadata
    by folder."""
    if stopping():
        raise Stopped
    trainings = [
        _training_of(sae_job, store, options, root)
        for sae_job in batch_job
        if not _is_finished(sae_job, root)
    ]
    if trainings:
        held_out = read_batch(
            store, batch_job[0], held_out_rows(batch_job[0].sites, store, options)
        )
        with reading(batch_job[0], store, options) as batches:
            _resume(trainings, batches)
            for training in _trained(trainings, batches, options, progress, metrics, stopping):
                _finish(training, store, options, held_out, metrics)
    return {sae_job.folder: load_sae(_place(sae_job, root)).metadata for sae_job in batch_job}


@dataclass(kw_only=True, eq=False)
class _Training:
    """An SAE with its trainer; `place` is where its dictionary, curve and checkpoint go."""

    sae_job: SaeJob
    trainer: Trainer
    place: Path
    first_step: int = 0
    seconds: float = 0.0


def _place(sae_job: SaeJob, root: Path) -> Path:
    return root / sae_job.folder / sae_job.job.site.short


def _is_finished(sae_job: SaeJob, root: Path) -> bool:
    return (_place(sae_job, root) / "sae.json").is_file()


def _training_of(
    sae_job: SaeJob, store: ActivationStore, options: TrainingOptions, root: Path
) -> _Training:
    job = sae_job.job
    source, target = sae_job.sites[0], job.site if sae_job.reads else None
    if job.parent is not None:
        weights = unfold(
            load_sae(root / sae_job.folder / job.parent.short), normalisation_at(store, job.parent)
        )
    elif target is not None:
        width = store.width(target)
        weights = random_start(
            job.n_latents, store.width(source), seed=job.seed, d_out=width, skip=sae_job.skip
        )
    else:
        weights = job.architecture.prepared(
            random_start(job.n_latents, store.width(source), seed=job.seed)
        )
    trainer = Trainer(
        architecture=job.architecture,
        schedule=_schedule(job, options),
        weights={name: weight.to(options.device) for name, weight in weights.items()},
        source=normalisation_at(store, source).to(options.device),
        target=None if target is None else normalisation_at(store, target).to(options.device),
        precision=options.precision,
    )
    return _Training(sae_job=sae_job, trainer=trainer, place=_place(sae_job, root))


def _schedule(job: SiteJob, options: TrainingOptions) -> Schedule:
    return schedule_of(
        steps=job.steps,
        learning_rate=job.learning_rate,
        batch_size=options.batch_size,
        warmup_steps=options.warmup_steps,
        decay_fraction=options.decay_fraction,
        clip_norm=options.clip_norm,
        record_every=options.record_every,
    )


def _resume(trainings: Sequence[_Training], batches: Batches) -> None:
    """Every trainer at its own checkpoint, the reader at that of the one furthest behind."""
    positions: dict[int, Mapping[str, Any]] = {}
    for training in trainings:
        if (training.place / CHECKPOINT).is_file():
            tensors, state = read_checkpoint(training.place / CHECKPOINT)
            training.trainer.restore(tensors, state["trainer"])
            positions[training.trainer.step] = state["batches"]
        training.first_step = training.trainer.step
    behind = min(training.trainer.step for training in trainings)
    if behind:
        batches.restore(positions[behind])


def _trained(
    trainings: Sequence[_Training],
    batches: Batches,
    options: TrainingOptions,
    progress: Progress,
    metrics: Metrics,
    stopping: Callable[[], bool],
) -> Iterator[_Training]:
    """Yield each training as it ends. Batch n is for the trainers that have seen n batches."""
    left = list(trainings)
    while left:
        n_seen = min(training.trainer.step for training in left)
        started = time.monotonic()
        batch = batches.next_batch()
        waited = time.monotonic() - started
        for training in [training for training in left if training.trainer.step == n_seen]:
            training.seconds += waited
            _train_step(training, batch, batches, options, progress, metrics)
            if training.trainer.finished:
                left.remove(training)
                yield training
            elif training.trainer.step % options.checkpoint_every == 0:
                tensors, numbers = training.trainer.state()
                state = {"trainer": numbers, "batches": batches.state()}
                write_checkpoint(training.place / CHECKPOINT, tensors, state)
            if stopping():
                raise Stopped


def _train_step(
    training: _Training,
    batch: Batch,
    batches: Batches,
    options: TrainingOptions,
    progress: Progress,
    metrics: Metrics,
) -> None:
    """One step of one SAE, timed and reported."""
    started = time.monotonic()
    record = training.trainer.train_on(batch, batches)
    training.seconds += time.monotonic() - started
    job, step = training.sae_job.job, training.trainer.step
    speed = (step - training.first_step) * options.batch_size / max(training.seconds, 1e-9)
    if record is not None:
        metrics({**_who(training.sae_job), **record, "tokens_per_second": round(speed)})
    progress(f"train {training.sae_job.label}{_numbers(training.trainer, speed)}", step, job.steps)


def _who(sae_job: SaeJob) -> dict[str, str]:
    return {"site": sae_job.job.site.short} | (
        {} if sae_job.folder == DICTIONARIES else {"of": sae_job.folder}
    )


def _numbers(trainer: Trainer, speed: float) -> str:
    """What the progress line adds to the label, from the last record of the curve."""
    if not trainer.records:
        return ""
    last = trainer.records[-1]
    numbers = (
        f"loss {last['loss']:.3g}  FVU {last['fvu']:.3f}  L0 {last['l0']:.1f}  dead "
        f"{last['dead']:.0f}"
    )
    return f"{DETAIL}{numbers}  {speed:,.0f} tokens/s"


def _finish(
    training: _Training,
    store: ActivationStore,
    options: TrainingOptions,
    held_out: Batch,
    metrics: Metrics,
) -> None:
    sae_job, trainer = training.sae_job, training.trainer
    n_rows = len(held_out.x)
    y = None if held_out.y is None else held_out.y.to(options.device)
    on_device = Batch(x=held_out.x.to(options.device), y=y) if n_rows else None
    schedule = dataclasses.asdict(trainer.schedule)
    reported = {
        **_description(sae_job, store, options),
        "schedule": schedule,
        "held_out_rows": n_rows,
    }
    sae = trainer.finish(on_device, reported)
    sae.metadata.update(
        _measured(sae, held_out) | {"dead": trainer.records[-1]["dead"] / sae_job.job.n_latents}
    )
    _write(training.place, sae, trainer.records)
    seconds = round(training.seconds, 3)
    metrics({**_who(sae_job), "step": trainer.step, "seconds": seconds, **_headline(sae)})


def _description(
    sae_job: SaeJob, store: ActivationStore, options: TrainingOptions
) -> dict[str, Any]:
    job = sae_job.job
    reads = {} if sae_job.reads is None else {"reads": sae_job.reads.name, "skip": sae_job.skip}
    variant = (
        {"variant": sae_job.folder.removeprefix(f"{VARIANTS}/")}
        if sae_job.folder.startswith(VARIANTS)
        else {}
    )
    return {
        "site": job.site.name,
        **reads,
        **variant,
        "model": store.provenance.get("model"),
        "model_fingerprint": store.provenance.get("model_fingerprint"),
        "architecture": job.architecture.model_dump(mode="json"),
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


def _measured(sae: Sae, held_out: Batch) -> dict[str, Any]:
    """FVU against the held-out mean of what is predicted, and L0, in float64 sums."""
    wanted = held_out.x if held_out.y is None else held_out.y
    if not len(wanted):
        return {"held_out_fvu": None, "held_out_l0": None}
    error = total = active = 0.0
    mean = wanted.double().mean(0)
    for x, y in zip(held_out.x.split(READ_ROWS), wanted.split(READ_ROWS), strict=True):
        codes = sae.encode_sparse(x)
        out = sae.decode(codes) if sae.W_skip is None else sae.decode(codes) + x @ sae.W_skip.T
        error += float((out.double() - y.double()).square().sum())
        total += float((y.double() - mean).square().sum())
        active += float((codes.value > 0).sum())
    return {"held_out_fvu": error / max(total, 1e-300), "held_out_l0": active / len(wanted)}


def _headline(sae: Sae) -> dict[str, float]:
    names = ("held_out_fvu", "held_out_l0", "dead")
    return {name: sae.metadata[name] for name in names if sae.metadata[name] is not None}


def _write(place: Path, sae: Sae, records: Sequence[Mapping[str, float]]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    write_text_atomically(place / CURVE, "".join(json.dumps(record) + "\n" for record in records))
    save_sae(sae, place)
    (place / CHECKPOINT).unlink(missing_ok=True)
