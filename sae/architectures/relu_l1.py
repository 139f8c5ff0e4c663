"""ReLU with an L1 penalty weighted by decoder norms (Anthropic, "Update on how we train SAEs",
April 2024).

Loss per token and channel: (‖e‖² + λ Σ_i z_i ‖W_dec[i]‖) / d with free decoder norms, folded to
unit rows at the end. λ is warmed up over the first 5 % of the run while a closed loop moves it
until L0 meets the target; what is left to the target at the end, the encoder's biases take, all by
one shift.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from sae.activations import Activation, Relu
from sae.architectures.dense import Forward, Penalised
from sae.step import Situation, Weights


class ReluL1(Penalised):
    """Every positive pre-activation counts; an L1 penalty keeps them few."""

    kind: Literal["relu_l1"] = "relu_l1"

    unit_decoder: ClassVar[bool] = False

    def extra_parameters(self, n_latents: int) -> Weights:
        return {}

    def forward(
        self, leaves: Weights, pre: Tensor, target: Tensor, base: Tensor, now: Situation
    ) -> Forward:
        z = pre.relu()
        length = z * leaves["W_dec"].norm(dim=1)
        penalty = self.coefficient(now) * length.sum(1).mean() / target.shape[1]
        return Forward(
            latents=z, error=z @ leaves["W_dec"] + base - target, penalties={"sparsity": penalty}
        )

    def activation(self, weights: Weights, threshold: float) -> Activation:
        return Relu()

    def edges(self, weights: Weights) -> Tensor:
        return torch.zeros_like(weights["b_enc"])
