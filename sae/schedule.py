"""How long a dictionary trains and how fast, and the laws that set what a recipe leaves open.

Every law follows the length of the run in optimizer steps, for what suits a run of minutes does not
suit one of days:

    learning rate          less in long runs and wide dictionaries              learning_rate_law
    Adam's second moment   remembers a thirtieth of the run                     second_moment_law
    dead latents           silent for a fiftieth of the run                     dead_window

What each was measured on is in docs/history/training.md; at the length of published runs all
three come to the values used there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long and how fast. Rates are for inputs of unit mean square and a loss that is a mean
    over channels."""

    steps: int
    learning_rate: float
    warmup_steps: int = 50
    decay_fraction: float = 0.2
    clip_norm: float = 1.0
    beta1: float = 0.8
    beta2: float = 0.999
    dead_after: int = 30 * 1024
    record_every: int = 25

    def rate(self, step: int) -> float:
        """The learning rate of a step counted from 0."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        decay_steps = self.decay_fraction * self.steps
        cool = min(1.0, (self.steps - step) / decay_steps) if decay_steps else 1.0
        return self.learning_rate * warm * cool


def schedule_of(
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    warmup_steps: int = 50,
    decay_fraction: float = 0.2,
    clip_norm: float = 1.0,
    record_every: int = 25,
) -> Schedule:
    """The schedule of a run by the laws; warm-up takes at most half of it."""
    return Schedule(
        steps=steps,
        learning_rate=learning_rate,
        warmup_steps=min(warmup_steps, steps // 2),
        decay_fraction=decay_fraction,
        clip_norm=clip_norm,
        beta2=second_moment_law(steps),
        dead_after=dead_window(steps, batch_size),
        record_every=record_every,
    )


def learning_rate_law(n_latents: int, steps: int) -> float:
    """2.4e-3 at 2,048 latents and 3,000 steps; falls with √width and the cube root of the steps.

    Narrower dictionaries get no more, shorter runs at most twice as much. Measured at 523, 600 and
    3,000 steps (docs/history/training.md). Continued to the 244,000 steps of 500 M tokens the law
    gives 5.5e-4, where dictionary_learning's 2e-4 · √(2^14 / n_latents) is 5.7e-4.
    """
    return 2.4e-3 * min(1.0, (2048 / n_latents) ** 0.5) * min(2.0, (3000 / steps) ** (1 / 3))


def dead_window(steps: int, batch_size: int) -> int:
    """Tokens of silence that make a latent dead: 2 % of the run, between 10 batches and 10 million
    tokens.

    AuxK reaches a latent only once it counts as dead. 600 steps on attention outputs ended with 22
    % of the latents unused on held-out rows where it took 30 batches, with 6 % where it took 10 or
    12 (docs/history/training.md).
    """
    return min(10_000_000, max(10, steps // 50) * batch_size)


def second_moment_law(steps: int) -> float:
    """Adam's β₂ for a run of `steps`: a memory of steps / 30, between 30 steps and the usual 1,000
    (β₂ = 0.999).

    A memory longer than the run keeps the first gradients, which are the largest, in every later
    step's denominator.
    """
    return 1.0 - 1.0 / min(1000, max(30, steps / 30))
