"""What every architecture is to the trainer: the one protocol, and what one pass over a batch
reports.

An architecture is a frozen dataclass with the few choices it owns. It sees activations that are
centred and scaled to unit mean square, and turns the weights and a batch into gradients:

    extra_parameters   tensors that it needs besides W_enc, b_enc, W_dec, b_dec (thresholds, gates)
    gradients          one pass: losses by part, gradients by weight, what fired
    activation         the inference form's activation, from the trained weights
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.activations import Activation
from sae.kernels.select import Precision

Weights = dict[str, Tensor]
"""W_enc [latent d_in], b_enc [latent], W_dec [latent d_out], b_dec [d_out], and what the
architecture adds."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """Where in the run a step happens. `progress` runs from 0 to 1; `pressure` is the closed loop's
    coefficient."""

    progress: float
    dead: Bool[Tensor, "latent"]
    pressure: float = 1.0
    precision: Precision = "float32"


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """One batch seen. The loss is the sum of its parts; `squared_…` are sums over the batch."""

    losses: Mapping[str, Tensor]
    gradients: Weights
    fired: Bool[Tensor, "latent"]
    n_active: Tensor
    squared_error: Tensor
    squared_target: Tensor
    threshold: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        return torch.stack(list(self.losses.values())).sum()


class Architecture(Protocol):
    """A way to train a dictionary."""

    @property
    def kind(self) -> str: ...

    @property
    def target_l0(self) -> float:
        """How many latents are meant to be active on a token."""
        ...

    @property
    def unit_decoder(self) -> bool:
        """Whether decoder rows are kept at length 1 while training."""
        ...

    @property
    def closed_loop(self) -> bool:
        """Whether the trainer steers `pressure` so that L0 meets `target_l0`."""
        ...

    @property
    def calibrated(self) -> bool:
        """Whether thresholds are set from held-out activations at the end."""
        ...

    def problems(self, n_latents: int) -> list[str]:
        """What makes this choice impossible at this width."""
        ...

    def extra_parameters(self, n_latents: int) -> Weights:
        """Its own tensors as training starts."""
        ...

    def prepared(self, weights: Weights) -> Weights:
        """A random start made suitable; a start from another dictionary is taken as it is."""
        ...

    def gradients(
        self,
        weights: Weights,
        x: Float[Tensor, "token d_in"],
        y: Float[Tensor, "token d_out"] | None,
        now: Situation,
    ) -> Pass:
        """One batch in the normalised space. Without `y` the target is `x` and b_dec is subtracted
        before encoding."""
        ...

    def activation(self, weights: Weights, threshold: float) -> Activation:
        """In the normalised space; `threshold` is the calibrated one, where there is one for all
        latents."""
        ...

    def edges(self, weights: Weights) -> Float[Tensor, "latent"] | None:
        """The pre-activation above which each latent fires; None where `threshold` or other latents
        decide."""
        ...

    def raised(self, weights: Weights, by: float) -> Weights:
        """Weights whose latents all need a pre-activation larger by `by` to fire."""
        ...
