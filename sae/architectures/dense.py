"""One pass for architectures whose loss PyTorch differentiates: dense latents, about six dense
products a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from sae.step import Pass, Weights


@dataclass(frozen=True, kw_only=True, eq=False)
class Forward:
    """What a loss is made of: latents, the reconstruction's error, and further loss parts."""

    latents: Float[Tensor, "token latent"]
    error: Float[Tensor, "token d_out"]
    penalties: dict[str, Tensor]


def differentiated(
    weights: Weights,
    x: Float[Tensor, "token d_in"],
    y: Float[Tensor, "token d_out"] | None,
    forward: Callable[[Weights, Float[Tensor, "token latent"], Tensor, Tensor], Forward],
) -> Pass:
    """Run `forward(weights, pre_activations, target, base)` and differentiate the sum of its
    losses. `base` is what a reconstruction adds to `z W_dec`: the bias, and the linear part of a
    skip transcoder."""
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    target = x if y is None else y
    with torch.enable_grad():
        centred = x - leaves["b_dec"] if y is None else x
        base = (
            leaves["b_dec"]
            if "W_skip" not in leaves
            else leaves["b_dec"] + F.linear(x, leaves["W_skip"])
        )
        out = forward(leaves, F.linear(centred, leaves["W_enc"], leaves["b_enc"]), target, base)
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


def gently_started(weights: Weights) -> Weights:
    """A random start whose reconstruction is about as long as its input when half of the latents
    are active."""
    n_latents, d_in = weights["W_enc"].shape
    return weights | {"W_enc": weights["W_enc"] * min(1.0, 2 * d_in / n_latents)}
