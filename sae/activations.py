"""The last step of an encoder: pre-activations to latents, as small frozen choices.

Every activation is a function of the pre-activations alone, `z = activation(pre)`, and z ≥ 0. All
but TopK look at one entry at a time (`is_elementwise`), so a few latents can be computed alone:

    Relu            z = max(pre, 0)
    Threshold(θ)    z = pre where pre > θ, else 0            JumpReLU, calibrated BatchTopK
    Gated(g, o)     z = max(g·pre + o, 0) where pre > 0      Rajamanoharan et al. 2024, arXiv
                    2404.16014; in its names g = exp(r_mag), o = b_mag − g·b_gate
    TopKActivation  z = max(pre, 0) at the k largest of a row, else 0      Gao et al. 2024, arXiv
                    2406.04093

A new one is a frozen dataclass below `Activation`, beside the architecture that trains it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.plugins import plugins

_BY_KIND: dict[str, type[Activation]] = {}


@dataclass(frozen=True, kw_only=True)
class Activation(ABC):
    """Fields that are tensors hold one value a latent; the others, `kind` first, are JSON."""

    kind: str
    is_elementwise: ClassVar[bool] = True

    def __init_subclass__(cls, **others: Any) -> None:
        super().__init_subclass__(**others)
        _BY_KIND[cls.kind] = cls

    @abstractmethod
    def __call__(self, pre: Float[Tensor, "*token latent"]) -> Float[Tensor, "*token latent"]:
        """Latents from all pre-activations, dense."""

    def scaled(self, gain: float | Float[Tensor, "latent"]) -> Self:
        """The activation whose latents of `gain * pre` are `gain` times these of `pre`."""
        return self


@dataclass(frozen=True, kw_only=True)
class Relu(Activation):
    """Every positive pre-activation is a latent."""

    kind: Literal["relu"] = "relu"

    def __call__(self, pre: Float[Tensor, "*token latent"]) -> Float[Tensor, "*token latent"]:
        return pre.relu()


@dataclass(frozen=True, kw_only=True)
class TopKActivation(Activation):
    """The `k` largest pre-activations of each token, those of them that are positive. Of equal ones
    at the edge, which stay is unspecified."""

    k: int
    kind: Literal["topk"] = "topk"
    is_elementwise: ClassVar[bool] = False

    def __call__(self, pre: Float[Tensor, "*token latent"]) -> Float[Tensor, "*token latent"]:
        value, index = pre.topk(self.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter_(-1, index, value.relu())


@dataclass(frozen=True, kw_only=True, eq=False)
class Threshold(Activation):
    """Pre-activations above a threshold of their own. `theta` is never negative, so latents are
    positive."""

    theta: Float[Tensor, "latent"]
    kind: Literal["threshold"] = "threshold"

    def __call__(self, pre: Float[Tensor, "*token latent"]) -> Float[Tensor, "*token latent"]:
        return torch.where(pre > self.theta, pre, 0.0)

    def scaled(self, gain: float | Float[Tensor, "latent"]) -> Self:
        return replace(self, theta=self.theta * gain)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gated(Activation):
    """A gate decides whether a latent is active, an affine map of the same pre-activation how
    strongly."""

    gain: Float[Tensor, "latent"]
    offset: Float[Tensor, "latent"]
    kind: Literal["gated"] = "gated"

    def __call__(self, pre: Float[Tensor, "*token latent"]) -> Float[Tensor, "*token latent"]:
        return torch.where(pre > 0, (self.gain * pre + self.offset).relu(), 0.0)

    def scaled(self, gain: float | Float[Tensor, "latent"]) -> Self:
        return replace(self, offset=self.offset * gain)


def tensors_of(activation: Activation) -> dict[str, Tensor]:
    """The activation's per-latent tensors by name; empty where it has none."""
    values = {field.name: getattr(activation, field.name) for field in fields(activation)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def with_tensors(activation: Activation, tensors: Mapping[str, Tensor]) -> Activation:
    """The same activation with other tensors: moved, cut to some latents, scaled."""
    changed: dict[str, Any] = dict(tensors)
    return replace(activation, **changed)


def describe(activation: Activation) -> dict[str, Any]:
    """The activation without its tensors, as JSON values: `{"kind": "topk", "k": 32}`."""
    values = {field.name: getattr(activation, field.name) for field in fields(activation)}
    return {name: value for name, value in values.items() if not isinstance(value, Tensor)}


def activations() -> Mapping[str, type[Activation]]:
    """Every activation by kind, those beside the architectures of other packages too."""
    plugins("architectures")
    return _BY_KIND
