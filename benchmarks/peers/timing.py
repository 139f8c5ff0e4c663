"""What the peers' training runs share: the command line, the batches, the clock, and how the result
is judged.

Runs in a peer's environment with numpy and torch only. Every trainer sees the same rows in the same
order: `numpy.random.default_rng(seed)` permutes the training rows anew each epoch. Rows are centred
and divided by one number taken from the training rows, so that the mean square of a dimension is 1
(or of a row, where the peer asks for that).

    --activations FILE.npy   float32 [row, d]; the last --held-out rows are not trained on
    --save FOLDER            the dictionary in the peer's own format, and normalisation.npz (mean,
    scale of the rows)
    prints one JSON line: times of whole steps in milliseconds, and FVU, L0 and dead latents on the
    held-out rows
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


@dataclass(frozen=True)
class Task:
    """One timed run."""

    train: torch.Tensor
    held_out: torch.Tensor
    architecture: str
    n_latents: int
    k: int
    batch_size: int
    steps: int
    untimed_steps: int
    learning_rate: float
    lr_warmup_steps: int
    lr_decay_steps: int
    aux_coefficient: float
    seed: int
    device: str
    mean: torch.Tensor
    scale: float
    save: Path | None

    @property
    def d(self) -> int:
        return self.train.shape[1]

    def batches(self) -> Iterator[torch.Tensor]:
        generator = np.random.default_rng(self.seed)
        while True:
            order = torch.from_numpy(generator.permutation(len(self.train)))
            for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
                yield self.train[order[start : start + self.batch_size]].to(self.device)


def read_task(architectures: tuple[str, ...], *, row_norm_one: bool = False) -> Task:
    """The task on the command line. `row_norm_one`: the mean square norm of a row is 1, not of a
    dimension."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--activations", type=Path, required=True)
    parser.add_argument("--architecture", choices=architectures, default=architectures[0])
    parser.add_argument("--n-latents", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=200, help="steps in all, timed and untimed")
    parser.add_argument(
        "--untimed-steps", type=int, default=5, help="first steps that are not timed"
    )
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--lr-warmup-steps", type=int, default=50)
    parser.add_argument("--lr-decay-fraction", type=float, default=0.2)
    parser.add_argument("--aux-coefficient", type=float, default=1 / 32)
    parser.add_argument("--held-out", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--save", type=Path)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.manual_seed(a.seed)
    rows = torch.from_numpy(np.load(a.activations, mmap_mode="c"))
    mean, scale = normalisation(rows[: -a.held_out], row_norm_one=row_norm_one)
    train, held_out = (rows[: -a.held_out] - mean) / scale, (rows[-a.held_out :] - mean) / scale
    return Task(
        train=train,
        held_out=held_out,
        architecture=a.architecture,
        n_latents=a.n_latents,
        k=a.k,
        batch_size=a.batch_size,
        steps=a.steps,
        untimed_steps=a.untimed_steps,
        learning_rate=a.learning_rate,
        lr_warmup_steps=a.lr_warmup_steps,
        lr_decay_steps=round(a.lr_decay_fraction * a.steps),
        aux_coefficient=a.aux_coefficient,
        seed=a.seed,
        device=a.device,
        mean=mean,
        scale=scale,
        save=a.save,
    )


def normalisation(train: torch.Tensor, *, row_norm_one: bool) -> tuple[torch.Tensor, float]:
    """What is subtracted from every row, and by what it is divided then; summed in float64, block
    by block."""
    total, squares = torch.zeros(train.shape[1], dtype=torch.float64), 0.0
    for block in train.split(65536):
        total += block.double().sum(0)
    mean = total / len(train)
    for block in train.split(65536):
        squares += (block.double() - mean).square().sum().item()
    per_row = squares / len(train)
    return mean.float(), (per_row if row_norm_one else per_row / train.shape[1]) ** 0.5


def run(
    task: Task,
    step: Callable[[int, torch.Tensor], object],
    reconstruct: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    save: Callable[[Path], object],
    **about: object,
) -> None:
    """Train, timing every step; judge; save. `reconstruct` gives latents and reconstruction of some
    rows."""
    seconds = []
    batches = task.batches()
    for index in range(task.steps):
        batch = next(batches)
        _synchronise(task.device)
        started = time.perf_counter()
        step(index, batch)
        _synchronise(task.device)
        seconds.append(time.perf_counter() - started)
    timed = 1000 * np.array(seconds[task.untimed_steps :])
    record = {
        **about,
        "architecture": task.architecture,
        "d": task.d,
        "n_latents": task.n_latents,
        "k": task.k,
        "batch_size": task.batch_size,
        "steps": task.steps,
        "threads": torch.get_num_threads(),
        "device": task.device,
        "torch": torch.__version__,
        "seed": task.seed,
        "step_ms_median": round(float(np.median(timed)), 3),
        "step_ms_q25": round(float(np.percentile(timed, 25)), 3),
        "step_ms_q75": round(float(np.percentile(timed, 75)), 3),
        "step_ms_min": round(float(timed.min()), 3),
        "seconds": round(float(sum(seconds)), 2),
        **judged(task, reconstruct),
    }
    if task.save is not None:
        task.save.mkdir(parents=True, exist_ok=True)
        save(task.save)
        np.savez(
            task.save / "normalisation.npz", mean=task.mean.numpy(), scale=np.float64(task.scale)
        )
    print(json.dumps(record), flush=True)


@torch.no_grad()
def judged(
    task: Task, reconstruct: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
) -> dict[str, float]:
    """FVU against the mean of the held-out rows, L0, and the share of latents that never fired on
    them."""
    error, active, fired = 0.0, 0, torch.zeros(task.n_latents, dtype=torch.bool)
    for rows in task.held_out.split(2048):
        latents, reconstruction = reconstruct(rows.to(task.device))
        error += (rows - reconstruction.cpu()).double().square().sum().item()
        active += int((latents != 0).sum())
        fired |= (latents != 0).any(0).cpu()
    total = (task.held_out.double() - task.held_out.double().mean(0)).square().sum().item()
    return {
        "fvu": round(error / total, 6),
        "l0": round(active / len(task.held_out), 3),
        "dead_fraction": round(1 - fired.double().mean().item(), 5),
    }


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
