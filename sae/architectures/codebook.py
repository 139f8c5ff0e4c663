"""Codebook: k codes stand for a token, all as strong as each other (Tamkin et al. 2023, Codebook
Features, arXiv 2310.17230).

The k codes whose encoder rows have the largest inner product with the input are on, and the output
is their sum times one scale of the site:

    x̂ = s Σ_{i in top k of W_enc (x − b_dec)} W_dec[i] + b_dec,    s = √(d/k) exp(log_scale)

The choice has no gradient, so training goes straight through it: ∂z_i/∂pre_i = 1 where code i is
on. Encoder rows start as the codes. Dead codes learn from what the others left, as in AuxK. The
number of codes is the number of latents. Cost: six dense products a step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, Self

import torch
from annotated_types import Gt
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Doc

from sae.activations import Activation
from sae.architectures.dense import Differentiated, Forward
from sae.architectures.topk import KLargest
from sae.step import Pass, Situation, Weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes(Activation):
    """The `k` largest pre-activations of each token are on, with the strength `size`."""

    k: int
    size: Float[Tensor, "latent"]
    kind: Literal["codebook"] = "codebook"
    is_elementwise: ClassVar[bool] = False

    def __call__(self, pre: Float[Tensor, "*token latent"]) -> Float[Tensor, "*token latent"]:
        index = pre.topk(self.k, dim=-1, sorted=False).indices
        return torch.zeros_like(pre).scatter_(-1, index, self.size.to(pre)[index])

    def scaled(self, gain: float | Float[Tensor, "latent"]) -> Self:
        return replace(self, size=self.size * gain)


class Codebook(Differentiated, KLargest):
    """k codes per token, on or off, and one scale for the site."""

    k: Annotated[int, Gt(0), Doc("codes per token")] = 8
    kind: Literal["codebook"] = "codebook"

    calibrated: ClassVar[bool] = False

    def extra_parameters(self, n_latents: int) -> Weights:
        return {"log_scale": torch.zeros(1)}

    def prepared(self, weights: Weights) -> Weights:
        return weights

    def forward(
        self, leaves: Weights, pre: Tensor, target: Tensor, base: Tensor, now: Situation
    ) -> Forward:
        scale = self._scale(leaves)
        z = _straight_through(pre, scale, self.k)
        error = z @ leaves["W_dec"] + base - target
        penalties = {}
        if self.auxk_weight and bool(now.dead.any()):
            penalties["auxiliary"] = self.auxk_weight * self._auxiliary(
                leaves, pre[:, now.dead], now.dead, -error.detach(), scale
            )
        return Forward(latents=z, error=error, penalties=penalties)

    def gradients(self, weights: Weights, x: Tensor, y: Tensor | None, now: Situation) -> Pass:
        found = Differentiated.gradients(self, weights, x, y, now)
        found.gradients["b_enc"].zero_()  # codes are chosen by the inner product alone
        return found

    def _scale(self, weights: Weights) -> Float[Tensor, "1"]:
        return (weights["W_dec"].shape[1] / self.k) ** 0.5 * weights["log_scale"].exp()

    def _auxiliary(
        self, leaves: Weights, pre: Tensor, dead: Tensor, wanted: Tensor, scale: Tensor
    ) -> Tensor:
        """How badly the dead codes reconstruct what the others left, as a share of it."""
        z = _straight_through(pre, scale, min(self.k, pre.shape[1]))
        energy = (wanted - wanted.mean(0)).square().sum().clamp_min(1e-12)
        return (z @ leaves["W_dec"][dead] - wanted).square().sum() / energy

    def activation(self, weights: Weights, threshold: float) -> Activation:
        size = self._scale(weights).detach()
        return Codes(k=self.k, size=size.expand(len(weights["W_dec"])).clone())


def _straight_through(
    pre: Float[Tensor, "token code"], scale: Float[Tensor, "1"], k: int
) -> Float[Tensor, "token code"]:
    """The k largest are `scale`, with the gradient of `pre`; the others are 0."""
    index = pre.topk(k, dim=-1, sorted=False).indices
    on = torch.zeros_like(pre).scatter_(-1, index, 1.0)
    return on * (scale + pre - pre.detach())
