"""JumpReLU: a learnt threshold per latent (Rajamanoharan et al. 2024, arXiv 2407.14435).

z = pre where pre > θ, else 0. The step has no gradient, so θ gets one through a rectangle of width
`bandwidth` around it: ∂H(pre − θ)/∂θ = −1[|pre − θ| < bandwidth/2] / bandwidth. θ is a float32
parameter of its own, clamped at 0; stored as a logarithm it hardly moves under Adam. Two penalties:

    quadratic    λ (L0 / target − 1)²                       (Gemma Scope 2); finds the target by
    itself
    tanh         0.1 λ Σ tanh(4 z ‖W_dec‖) / d              (Anthropic, January 2025); λ steered by
    a closed loop

Training starts where about `target_l0` latents are active. At the end all thresholds move by one
shift that gives the target on held-out rows.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Gt
from torch import Tensor
from typing_extensions import Doc

from sae.activations import Activation, Threshold
from sae.architectures.dense import Differentiated, Forward, too_many
from sae.step import Situation, Weights

_TANH_SLOPE = 4.0


class JumpRelu(Differentiated):
    """A threshold per latent, trained with the rest."""

    target_l0: Annotated[float, Gt(0), Doc("latents per token, on average")] = 32.0
    sparsity: Annotated[
        Literal["quadratic", "tanh"], Doc("form of the penalty that holds L0 down")
    ] = "quadratic"
    penalty: Annotated[
        float, Gt(0), Doc("the penalty's coefficient λ; for tanh, where the closed loop starts")
    ] = 1.0
    bandwidth: Annotated[
        float, Gt(0), Doc("width of θ's surrogate gradient, in units of the input's scale")
    ] = 0.2
    dead_penalty: Annotated[
        float, Gt(0), Doc("how strongly dead latents are pulled towards their threshold")
    ] = 1e-3
    kind: Literal["jump_relu"] = "jump_relu"

    unit_decoder: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True

    @property
    def closed_loop(self) -> bool:
        return self.sparsity == "tanh"

    def problems(self, n_latents: int) -> list[str]:
        return too_many(self.target_l0, n_latents)

    def extra_parameters(self, n_latents: int) -> Weights:
        """Unit rows see inputs of unit mean square as about N(0, 1): the quantile that leaves
        `target_l0` latents."""
        share = min(max(self.target_l0 / n_latents, 1e-6), 0.5)
        return {"theta": torch.full((n_latents,), NormalDist().inv_cdf(1 - share))}

    def prepared(self, weights: Weights) -> Weights:
        return weights

    def forward(
        self, leaves: Weights, pre: Tensor, target: Tensor, base: Tensor, now: Situation
    ) -> Forward:
        on = _Step.apply(pre, leaves["theta"], self.bandwidth)
        z = pre * on
        penalties = {"sparsity": self._sparsity(z, on, leaves["W_dec"], now)}
        if bool(now.dead.any()):
            short = (leaves["theta"] - pre)[:, now.dead].relu()
            penalties["dead"] = self.dead_penalty * short.mean()
        return Forward(
            latents=z.detach(), error=z @ leaves["W_dec"] + base - target, penalties=penalties
        )

    def activation(self, weights: Weights, threshold: float) -> Activation:
        return Threshold(theta=weights["theta"])

    def edges(self, weights: Weights) -> Tensor:
        return weights["theta"]

    def raised(self, weights: Weights, by: float) -> Weights:
        return weights | {"theta": (weights["theta"] + by).clamp_min(0)}

    def _sparsity(self, z: Tensor, on: Tensor, W_dec: Tensor, now: Situation) -> Tensor:
        if self.sparsity == "quadratic":
            return self.penalty * (on.sum(1).mean() / self.target_l0 - 1).square()
        soft = torch.tanh(_TANH_SLOPE * z * W_dec.norm(dim=1))
        return 0.1 * self.penalty * now.pressure * soft.sum(1).mean() / W_dec.shape[1]


class _Step(torch.autograd.Function):
    """1 where pre > θ; backward reaches θ only."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, theta)
        ctx.bandwidth = bandwidth
        return (pre > theta).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[None, Tensor, None]:
        pre, theta = ctx.saved_tensors
        near = (pre - theta).abs() < ctx.bandwidth / 2
        return None, -(torch.where(near, slopes[0], 0.0).sum(0)) / ctx.bandwidth, None
