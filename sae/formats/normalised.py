"""Dictionaries over activations that are normalised token by token, as OpenAI's v5 and some SAELens
ones are.

    x̃ = normalise(x);  z = activation(W_enc (x̃ − b_in) + b_enc);  x̂ = undo(Σ z_i W_dec[i] +
    b_dec)

The normalisation depends on the token, so it cannot be folded into the tensors. With `raw_units`
latents are multiplied by the token's scale: `z_i W_dec[i]` is then what latent i adds to the raw
activation, as with every other dictionary here, and a difference of latents decodes to a difference
of activations. Without, they are the peer's, in units of the normalised activation. `decode` does
not see the token and leaves out what depends on it; calling the dictionary goes the whole way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor

from featureflow.errors import UserError
from sae.dictionary import Sae, SparseCodes


@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """Subtract the token's mean over dimensions, divide by its standard deviation (n − 1) plus
    `epsilon`."""

    epsilon: float = 1e-5
    kind: Literal["layer_norm"] = "layer_norm"


@dataclass(frozen=True, kw_only=True)
class ConstantNorm:
    """Rescale every token to the norm √d."""

    kind: Literal["constant_norm"] = "constant_norm"


Normalisation = LayerNorm | ConstantNorm


def normalisation_of(described: Any, where: Path) -> Normalisation:
    """A normalisation as a description holds it. Raises UserError."""
    match described:
        case {"kind": "layer_norm", "epsilon": float(epsilon)} if epsilon >= 0:
            return LayerNorm(epsilon=epsilon)
        case {"kind": "constant_norm"}:
            return ConstantNorm()
    raise UserError(
        "unknown normalisation",
        where=f"{where}: normalisation",
        expected='{"kind": "layer_norm", "epsilon": 1e-05}, or {"kind": "constant_norm"}',
        found=str(described)[:200],
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class NormalisedSae(Sae):
    """A dictionary that normalises each token before encoding and undoes it after decoding."""

    normalisation: Normalisation = field(default_factory=LayerNorm)
    raw_units: bool = True

    @classmethod
    def around(
        cls, sae: Sae, normalisation: Normalisation, *, raw_units: bool = True
    ) -> NormalisedSae:
        """The same tensors, applied to normalised tokens."""
        tensors = {f.name: getattr(sae, f.name) for f in fields(Sae)}
        return cls(**tensors, normalisation=normalisation, raw_units=raw_units)

    def scale_of(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token 1"]:
        """What one unit of normalised activation is in raw units, for each token."""
        return self._normalise(x)[2]

    def pre_activations(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token latent"]:
        return super().pre_activations(self._normalise(x)[0])

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token latent"]:
        return super().encode(x) * self._unit(x)

    @torch.no_grad()
    def encode_sparse(self, x: Float[Tensor, "*token d_in"]) -> SparseCodes:
        codes = self._peer_codes(x)
        return replace(codes, value=codes.value * self._unit(x))

    @torch.no_grad()
    def encode_selected(
        self, x: Float[Tensor, "*token d_in"], latents: Sequence[int] | Int[Tensor, "selected"]
    ) -> Float[Tensor, "*token selected"]:
        chosen = torch.as_tensor(latents, dtype=torch.int64, device=self.device)
        return self.encode(x)[..., chosen]

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token d_out"]:
        _, shift, scale = self._normalise(x)
        return self.decode(self._peer_codes(x)) * scale + shift

    def _peer_codes(self, x: Float[Tensor, "*token d_in"]) -> SparseCodes:
        """Latents in units of the normalised activation."""
        return Sae.encode_sparse(replace(self, raw_units=False), x)

    def _unit(self, x: Float[Tensor, "*token d_in"]) -> Tensor | float:
        return self.scale_of(x) if self.raw_units else 1.0

    def _normalise(self, x: Float[Tensor, "*token d_in"]) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised x, and what undoes it: x̂ = ŷ · scale + shift."""
        x = x.to(self.device, self.dtype)
        match self.normalisation:
            case LayerNorm(epsilon=epsilon):
                mean = x.mean(dim=-1, keepdim=True)
                deviation = (x - mean).std(dim=-1, keepdim=True)
                return (x - mean) / (deviation + epsilon), mean, deviation
            case ConstantNorm():
                scale = (
                    x.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
                    / self.d_in**0.5
                )
                return x / scale, torch.zeros_like(scale), scale
            case _:
                assert_never(self.normalisation)
