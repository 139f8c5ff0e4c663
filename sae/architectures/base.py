"""What every architecture is to the trainer: one protocol.

An architecture is a frozen dataclass with the few choices it owns. It sees activations that are
centred and scaled to unit mean square, and turns the weights and a batch into gradients:

    extra_parameters   tensors that it needs besides W_enc, b_enc, W_dec, b_dec (thresholds, gates)
    gradients          one pass: losses by part, gradients by weight, what was active
    activation         the inference form's activation, from the trained weights
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from sae.activations import Activation
from sae.step import Pass, Situation, Weights


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
        """The pre-activation above which each latent is active; None where `threshold` or other
        latents decide."""
        ...

    def raised(self, weights: Weights, by: float) -> Weights:
        """Weights whose latents all need a pre-activation larger by `by` to be active."""
        ...
