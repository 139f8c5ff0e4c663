"""The last step of an encoder: pre-activations to latents, as small frozen choices.

Every activation is a function of the pre-activations alone, `z = activation(pre)`. All but TopK
look at one entry at a time (`is_elementwise`), so a few latents can be computed without the others:

    Relu            z = max(pre, 0)
    Threshold(θ)    z = pre where pre > θ, else 0            JumpReLU, calibrated BatchTopK;
    compared before any ReLU
    Gated(g, o)     z = max(g·pre + o, 0) where pre > 0      Rajamanoharan et al. 2024, arXiv
    2404.16014; in its
                                                             names g = exp(r_mag), o = b_mag −
                                                             g·b_gate
    TopKActivation  z = max(pre, 0) at the k largest of a row, else 0      Gao et al. 2024, arXiv
    2406.04093
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Relu:
    """Every positive pre-activation is a latent."""

    kind: Literal["relu"] = "relu"


@dataclass(frozen=True, kw_only=True)
class TopKActivation:
    """The `k` largest pre-activations of each token, those of them that are positive."""

    k: int
    kind: Literal["topk"] = "topk"


@dataclass(frozen=True, kw_only=True, eq=False)
class Threshold:
    """Pre-activations above a threshold of their own. `theta` is never negative, so latents are
    positive."""

    theta: Float[Tensor, "latent"]
    kind: Literal["threshold"] = "threshold"


@dataclass(frozen=True, kw_only=True, eq=False)
class Gated:
    """A gate decides whether a latent fires, an affine map of the same pre-activation how
    strongly."""

    gain: Float[Tensor, "latent"]
    offset: Float[Tensor, "latent"]
    kind: Literal["gated"] = "gated"


Activation = Relu | TopKActivation | Threshold | Gated


def is_elementwise(activation: Activation) -> bool:
    """Whether each latent depends on its own pre-activation only."""
    return not isinstance(activation, TopKActivation)


def activate(
    activation: Activation, pre: Float[Tensor, "*token latent"]
) -> Float[Tensor, "*token latent"]:
    """Latents from all pre-activations, dense. Of equal pre-activations at TopK's edge, which stay
    is unspecified."""
    match activation:
        case Relu():
            return pre.relu()
        case Threshold(theta=theta):
            return torch.where(pre > theta, pre, 0.0)
        case Gated(gain=gain, offset=offset):
            return torch.where(pre > 0, (gain * pre + offset).relu(), 0.0)
        case TopKActivation(k=k):
            value, index = pre.topk(k, dim=-1, sorted=False)
            return torch.zeros_like(pre).scatter_(-1, index, value.relu())
        case _:
            assert_never(activation)


def tensors_of(activation: Activation) -> dict[str, Tensor]:
    """The activation's per-latent tensors by name; empty where it has none."""
    match activation:
        case Threshold(theta=theta):
            return {"theta": theta}
        case Gated(gain=gain, offset=offset):
            return {"gain": gain, "offset": offset}
        case _:
            return {}


def with_tensors(activation: Activation, tensors: Mapping[str, Tensor]) -> Activation:
    """The same activation with other tensors: moved, cut to some latents, scaled."""
    match activation:
        case Threshold():
            return Threshold(theta=tensors["theta"])
        case Gated():
            return Gated(gain=tensors["gain"], offset=tensors["offset"])
        case _:
            return activation


def describe(activation: Activation) -> dict[str, Any]:
    """The activation without its tensors, as JSON values: `{"kind": "topk", "k": 32}`."""
    return {"kind": activation.kind} | (
        {"k": activation.k} if isinstance(activation, TopKActivation) else {}
    )
