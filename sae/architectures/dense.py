"""Architectures whose loss PyTorch differentiates: dense latents, about six dense products a step.

`Penalised` is what those with an L1 penalty share: a closed loop steers its coefficient λ, warmed
up over the first 5 % of the run, until L0 meets the target; one shift of all the encoder's biases
takes what is left to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Doc

from featureflow.settings import Settings
from sae.activations import Activation, Gated, Relu
from sae.step import Pass, Situation, Weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Forward:
    """What a loss is made of: latents, the reconstruction's error, and further loss parts."""

    latents: Float[Tensor, "token latent"]
    error: Float[Tensor, "token d_out"]
    penalties: dict[str, Tensor]


class Differentiated(Settings):
    """What `forward` makes of the pre-activations is differentiated by PyTorch."""

    def forward(
        self,
        leaves: Weights,
        pre: Float[Tensor, "token latent"],
        target: Float[Tensor, "token d_out"],
        base: Float[Tensor, "*token d_out"],
        now: Situation,
    ) -> Forward:
        """`base` is what a reconstruction adds to `z W_dec`: the bias, and the linear part of a
        skip transcoder."""
        raise NotImplementedError

    def gradients(
        self,
        weights: Weights,
        x: Float[Tensor, "token d_in"],
        y: Float[Tensor, "token d_out"] | None,
        now: Situation,
    ) -> Pass:
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        target = x if y is None else y
        with torch.enable_grad():
            centred = x - leaves["b_dec"] if y is None else x
            base = (
                leaves["b_dec"]
                if "W_skip" not in leaves
                else leaves["b_dec"] + F.linear(x, leaves["W_skip"])
            )
            pre = F.linear(centred, leaves["W_enc"], leaves["b_enc"])
            out = self.forward(leaves, pre, target, base, now)
            losses = {"reconstruction": out.error.square().mean()} | out.penalties
            total = torch.stack(list(losses.values())).sum()
            found = torch.autograd.grad(
                total, list(leaves.values()), allow_unused=True, materialize_grads=True
            )
        active = out.latents.detach() > 0
        return Pass(
            losses={name: loss.detach() for name, loss in losses.items()},
            gradients=dict(zip(leaves, found, strict=True)),
            fired=active.any(0),
            n_active=active.sum(),
            squared_error=out.error.detach().square().sum(),
            squared_target=target.square().sum(),
        )


def too_many(target_l0: float, n_latents: int) -> list[str]:
    """The problem that more latents are meant to be active than there are."""
    return [f"target_l0 = {target_l0} of {n_latents} latents"] if target_l0 > n_latents else []


class Penalised(Differentiated):
    """An L1 penalty that is steered to a target."""

    target_l0: Annotated[
        float, Gt(0), Doc("latents per token, on average, that the penalty is steered to")
    ] = 32.0
    penalty: Annotated[
        float, Gt(0), Doc("the L1 coefficient λ that the closed loop starts from")
    ] = 2.0

    closed_loop: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True

    def problems(self, n_latents: int) -> list[str]:
        return too_many(self.target_l0, n_latents)

    def prepared(self, weights: Weights) -> Weights:
        """A random start whose reconstruction is about as long as its input when half of the
        latents are active."""
        n_latents, d_in = weights["W_enc"].shape
        return weights | {"W_enc": weights["W_enc"] * min(1.0, 2 * d_in / n_latents)}

    def coefficient(self, now: Situation) -> float:
        return self.penalty * now.pressure * min(1.0, now.progress / 0.05)

    def raised(self, weights: Weights, by: float) -> Weights:
        return weights | {"b_enc": weights["b_enc"] - by}


class ReluL1(Penalised):
    """ReLU with an L1 penalty weighted by decoder norms (Anthropic, "Update on how we train SAEs",
    April 2024): (‖e‖² + λ Σ_i z_i ‖W_dec[i]‖) / d with free decoder norms, folded to unit rows at
    the end."""

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


class GatedL1(Penalised):
    """Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): one half decides what is active, the
    other how strongly. With one encoder product π = W_enc (x − b_dec) + b_enc (the gate's) and
    z = 1[π > 0] · max(e^r π + b, 0), the loss is

        ‖x − x̂‖² + λ Σ max(π, 0) + ‖x − x̂(max(π, 0))‖²  over d, the last with the decoder held fixed

    where `b` holds b_mag − e^r b_gate of the paper, so that magnitudes are an affine map of the
    gate's pre-activations."""

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
