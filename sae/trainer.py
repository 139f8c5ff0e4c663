"""Training one dictionary: batches in, a dictionary over raw activations out, stoppable after any
step.

    1. normalise the batch; refuse NaN and infinity, naming the rows
    2. gradients from the architecture (sparse step or autograd), dead latents and schedule given
    3. one Adam update: linear warm-up, constant rate, linear decay to 0 over the last part of the
       run
    4. bookkeeping: how long each latent has been silent; the closed loop's coefficient; sums for
       the next record
    5. at the end: thresholds calibrated on held-out rows where the architecture asks for it, then
       fold

A latent is dead when it has been silent for the schedule's `dead_after` tokens (sae/schedule.py).
`state` holds everything: a run killed after any checkpoint ends with the same bits as one that was
not (CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import UserError
from sae.architectures.base import Architecture
from sae.batches import Batch, Batches
from sae.calibration import calibrated_threshold
from sae.dictionary import Sae
from sae.normalisation import Normalisation, fold
from sae.optimizer import Adam
from sae.schedule import Schedule
from sae.step import Pass, Precision, Situation, Weights

_LOOP_SPEED = 0.01
_LOOP_START = 0.05
_L0_MEMORY = 0.95


@dataclass(kw_only=True)
class _Sums:
    """What the next record is made of."""

    steps: int = 0
    loss: float = 0.0
    error: float = 0.0
    target: float = 0.0
    active: float = 0.0
    tokens: int = 0


@dataclass(kw_only=True, eq=False)
class Trainer:
    """One dictionary being trained. `weights` are in the normalised space; `records` are the curve
    so far."""

    architecture: Architecture
    schedule: Schedule
    weights: Weights
    source: Normalisation
    target: Normalisation | None = None
    precision: Precision = "float32"
    step: int = 0
    pressure: float = 1.0
    threshold: float = 0.0
    l0_average: float = 0.0
    records: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        names = {"W_enc", "b_enc", "W_dec", "b_dec", "W_skip"}
        n_latents = len(self.weights["W_enc"])
        extra = self.architecture.extra_parameters(n_latents)
        kept = {
            name: tensor.clone()
            for name, tensor in self.weights.items()
            if name in names or name in extra
        }
        device = self.weights["W_enc"].device
        self.weights = {name: tensor.to(device) for name, tensor in extra.items()} | kept
        self.silent_for = torch.zeros(n_latents, dtype=torch.int64, device=device)
        self.adam = Adam(self.weights, beta1=self.schedule.beta1, beta2=self.schedule.beta2)
        self._sums = _Sums()

    @property
    def finished(self) -> bool:
        return self.step >= self.schedule.steps

    def train_on(self, batch: Batch, batches: Batches | None = None) -> dict[str, float] | None:
        """One step. Returns a record every `record_every` steps and at the end. Raises UserError
        for NaN or infinity, before any weight has changed."""
        x = self.source.apply(batch.x)
        y = None if batch.y is None else (self.target or self.source).apply(batch.y)
        now = Situation(
            progress=self.step / self.schedule.steps,
            dead=self.silent_for >= self.schedule.dead_after,
            pressure=self.pressure * self._excess(),
            precision=self.precision,
        )
        seen = self.architecture.gradients(self.weights, x, y, now)
        loss = float(seen.loss)
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise _bad_batch(batch, batches, self.step)
        self.adam.update(
            self.weights,
            seen.gradients,
            learning_rate=self.schedule.rate(self.step),
            clip_norm=self.schedule.clip_norm,
            unit_decoder=self.architecture.unit_decoder,
        )
        if "theta" in self.weights:
            self.weights["theta"].clamp_(min=0)
        return self._book(seen, loss, len(x))

    def finish(self, held_out: Batch | None, metadata: Mapping[str, Any]) -> Sae:
        """The dictionary. `held_out` rows set the thresholds of architectures that are
        calibrated."""
        weights, threshold = self.weights, self.threshold
        if self.architecture.calibrated and held_out is not None:
            x = self.source.apply(held_out.x)
            weights, threshold = calibrated_threshold(
                self.architecture, weights, x, tied=held_out.y is None
            )
        activation = self.architecture.activation(weights, threshold)
        return fold(
            weights, activation, self.source, self.target, {**metadata, "scale": self.source.scale}
        ).to("cpu")

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All there is to continue from: tensors and plain JSON."""
        moments, n_updates = self.adam.state()
        tensors = {f"weight.{name}": tensor for name, tensor in self.weights.items()}
        tensors |= {f"adam.{name}": tensor for name, tensor in moments.items()} | {
            "silent_for": self.silent_for
        }
        numbers = {
            name: getattr(self, name)
            for name in ("step", "pressure", "threshold", "l0_average", "records")
        }
        return tensors, numbers | {"n_updates": n_updates, "sums": vars(self._sums)}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from a `state`."""
        for name, weight in self.weights.items():
            weight.copy_(tensors[f"weight.{name}"])
        moments = {
            name.removeprefix("adam."): tensor
            for name, tensor in tensors.items()
            if name.startswith("adam.")
        }
        self.adam.restore(moments, numbers["n_updates"])
        self.silent_for.copy_(tensors["silent_for"])
        for name in ("step", "pressure", "threshold", "l0_average", "records"):
            setattr(self, name, numbers[name])
        self._sums = _Sums(**numbers["sums"])

    def _book(self, seen: Pass, loss: float, n_tokens: int) -> dict[str, float] | None:
        self.silent_for += n_tokens
        self.silent_for[seen.fired] = 0
        l0 = float(seen.n_active) / n_tokens
        self.l0_average = (
            l0 if self.step == 0 else _L0_MEMORY * self.l0_average + (1 - _L0_MEMORY) * l0
        )
        if seen.threshold is not None:
            edge = float(seen.threshold)
            self.threshold = edge if self.step == 0 else 0.95 * self.threshold + 0.05 * edge
        if self.architecture.closed_loop and self.step >= _LOOP_START * self.schedule.steps:
            self.pressure *= self._excess() ** _LOOP_SPEED
        sums = self._sums
        sums.steps, sums.loss, sums.tokens = (
            sums.steps + 1,
            sums.loss + loss,
            sums.tokens + n_tokens,
        )
        sums.error, sums.target = (
            sums.error + float(seen.squared_error),
            sums.target + float(seen.squared_target),
        )
        sums.active += float(seen.n_active)
        self.step += 1
        return (
            self._record() if self.step % self.schedule.record_every == 0 or self.finished else None
        )

    def _excess(self) -> float:
        """How many times too high L0 is, within a factor of 4. The coefficient follows it at once
        (the factor itself) and for good (its slow accumulation in `pressure`); the first part
        without the second settles off the target."""
        if not self.architecture.closed_loop or self.step == 0:
            return 1.0
        return min(max(self.l0_average / self.architecture.target_l0, 0.25), 4.0)

    def _record(self) -> dict[str, float]:
        sums, self._sums = self._sums, _Sums()
        record = {
            "step": self.step,
            "loss": sums.loss / sums.steps,
            "fvu": sums.error / max(sums.target, 1e-30),
            "l0": sums.active / sums.tokens,
            "dead": int((self.silent_for >= self.schedule.dead_after).sum()),
        }
        self.records.append(record)
        return record


def train(
    trainer: Trainer,
    batches: Batches,
    *,
    each_step: Callable[[int], None] = lambda step: None,
    each_record: Callable[[dict[str, float]], None] = lambda record: None,
    checkpoint: Callable[[], None] | None = None,
    checkpoint_every: int = 500,
) -> None:
    """Run `trainer` to its end. `each_step` may raise to stop; `checkpoint` is called between
    steps."""
    while not trainer.finished:
        record = trainer.train_on(batches.next_batch(), batches)
        if record is not None:
            each_record(record)
        each_step(trainer.step)
        if checkpoint is not None and trainer.step % checkpoint_every == 0 and not trainer.finished:
            checkpoint()


def random_start(
    n_latents: int, d_in: int, *, seed: int, d_out: int | None = None, skip: bool = False
) -> dict[str, Float[Tensor, "..."]]:
    """Unit decoder rows in uniformly random directions and a tied encoder. A transcoder starts from
    a decoder of its own and, with `skip`, from a linear part that is zero."""
    generator = torch.Generator().manual_seed(seed)
    encoder = torch.nn.functional.normalize(torch.randn(n_latents, d_in, generator=generator))
    decoder = encoder.clone()
    if d_out is not None:
        decoder = torch.nn.functional.normalize(torch.randn(n_latents, d_out, generator=generator))
    width = d_in if d_out is None else d_out
    weights = {
        "W_enc": encoder,
        "b_enc": torch.zeros(n_latents),
        "W_dec": decoder,
        "b_dec": torch.zeros(width),
    }
    return weights | ({"W_skip": torch.zeros(width, d_in)} if skip else {})


def _bad_batch(batch: Batch, batches: Batches | None, step: int) -> UserError:
    """The error for a loss that is not finite: the rows that hold NaN or infinity, or else
    divergence."""
    parts = [part for part in (batch.x, batch.y) if part is not None]
    bad = (
        torch.stack([~torch.isfinite(part).all(dim=1) for part in parts])
        .any(0)
        .nonzero()
        .flatten()
        .tolist()
    )
    if not bad:
        fix = "lower the learning rate"
        return UserError("training diverged: the loss is not finite", where=f"step {step}", fix=fix)
    where = batches.locate(bad[:8]) if batches is not None else f"rows {bad[:8]} of the batch"
    fix = "collect these activations again, or leave out the documents"
    return UserError(
        "NaN or infinity among the activations", where=where, found=f"{len(bad)} rows", fix=fix
    )
