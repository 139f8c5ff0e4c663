"""Our whole training step, timed by the same clock on the same rows as the peers'
(benchmarks/peers/timing.py).

    python -m benchmarks.train_step_ours --precision bfloat16 --activations FILE.npy [--architecture
    batchtopk] …

The step is `Trainer.train_on`: normalisation, forward, auxiliary loss, backward, clipping, Adam,
unit rows, firing counts. Further options and the output are those of the peers' scripts.

Latents are dead after 30 batches, as with the peers. `--schedule beta1=0.9 beta2=0.999
dead_after=61440` puts single fields in place of what the laws give (sae/schedule.py):
docs/history/training.md shows what each of them is worth.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

import torch

from benchmarks.peers.timing import Task, read_task, run
from sae import Sae, save_sae
from sae.architectures import BatchTopK, TopK
from sae.batches import Batch
from sae.kernels.memory import kept_memory
from sae.normalisation import Normalisation
from sae.schedule import schedule_of
from sae.step import Precision
from sae.trainer import Trainer, random_start


def main() -> None:
    own, sys.argv[1:] = _own_options()
    precision: Precision = own.precision
    task = read_task(("topk", "batchtopk"))
    trainer = trainer_of(task, precision, dict(own.schedule))
    finished: list[Sae] = []

    def sae() -> Sae:
        if not finished:
            finished.append(trainer.finish(Batch(x=task.train[:16384].to(task.device)), {}))
        return finished[0]

    def reconstruct(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents = sae().encode(rows.cpu())
        return latents, sae().decode(latents)

    def step(index: int, batch: torch.Tensor) -> object:
        return trainer.train_on(Batch(x=batch))

    with kept_memory():  # as the train stage does
        run(
            task,
            step,
            reconstruct,
            lambda folder: save_sae(sae(), folder),
            peer=f"featureflow {precision}",
        )


def trainer_of(task: Task, precision: Precision, changed: dict[str, float]) -> Trainer:
    """The trainer for rows that are centred and scaled already; `changed` fields of the schedule
    leave the laws."""
    choice = TopK if task.architecture == "topk" else BatchTopK
    architecture = choice(k=task.k, auxk_weight=task.aux_coefficient)
    weights = architecture.prepared(random_start(task.n_latents, task.d, seed=task.seed))
    schedule = schedule_of(
        steps=task.steps,
        learning_rate=task.learning_rate,
        batch_size=task.batch_size,
        warmup_steps=task.lr_warmup_steps,
        decay_fraction=task.lr_decay_steps / task.steps,
    )
    return Trainer(
        architecture=architecture,
        schedule=dataclasses.replace(schedule, **({"dead_after": 30 * task.batch_size} | changed)),  # type: ignore[arg-type]
        weights={name: weight.to(task.device) for name, weight in weights.items()},
        source=Normalisation(mean=torch.zeros(task.d, device=task.device), scale=1.0),
        precision=precision,
    )


def _own_options() -> tuple[argparse.Namespace, list[str]]:
    """Ours, and what is left for the options that all trainers share."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--schedule", type=_field, nargs="+", default=[])
    return parser.parse_known_args()


def _field(text: str) -> tuple[str, float]:
    name, value = text.split("=")
    return name, float(value)


if __name__ == "__main__":
    main()
