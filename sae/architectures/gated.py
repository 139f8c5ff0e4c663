"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): one half decides what is active, the
other how strongly.

With one encoder product π = W_enc (x − b_dec) + b_enc (the gate's) and z = 1[π > 0] · max(e^r π +
b, 0), the loss is

    ‖x − x̂‖² + λ Σ max(π, 0) + ‖x − x̂(max(π, 0))‖²  over d, the last with the decoder held fixed

where `b` holds b_mag − e^r b_gate of the paper, so that magnitudes are an affine map of the gate's
pre-activations. λ is steered by a closed loop to the target L0; one shift of all biases takes what
is left to it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from sae.activations import Activation, Gated
from sae.architectures.dense import Forward, Penalised
from sae.step import Situation, Weights


class GatedL1(Penalised):
    """A gate with its own L1 penalty, magnitudes without shrinkage."""

    kind: Literal["gated"] = "gated"

    unit_decoder: ClassVar[bool] = True

    def extra_parameters(self, n_latents: int) -> Weights:
        return {"log_gain": torch.zeros(n_latents), "magnitude_bias": torch.zeros(n_latents)}

    def forward(
        self, leaves: Weights, pre: Tensor, target: Tensor, base: Tensor, now: Situation
    ) -> Forward:
        gate = pre.relu()
        magnitude = (leaves["log_gain"].exp() * pre + leaves["magnitude_bias"]).relu()
        z = torch.where(pre > 0, magnitude, 0.0)
        by_gate = gate @ leaves["W_dec"].detach() + base.detach() - target
        penalties = {
            "sparsity": self.coefficient(now) * gate.sum(1).mean() / target.shape[1],
            "gate": by_gate.square().mean(),
        }
        return Forward(latents=z, error=z @ leaves["W_dec"] + base - target, penalties=penalties)

    def activation(self, weights: Weights, threshold: float) -> Activation:
        return Gated(gain=weights["log_gain"].exp(), offset=weights["magnitude_bias"])

    def edges(self, weights: Weights) -> Tensor:
        """Where both the gate and the magnitude are above 0."""
        return (-weights["magnitude_bias"] / weights["log_gain"].exp()).relu()
