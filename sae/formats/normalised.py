"""Dictionaries over activations that are normalised token by token, as OpenAI's v5 and some SAELens
ones are.

    x̃ = normalise(x);  z = activation(W_enc (x̃ − b_in) + b_enc);  x̂ = undo(Σ z_i W_dec[i] +
    b_dec)

The normalisation depends on the token, so it cannot be folded into the tensors. Latents are the
peer's: measured in units of the normalised activation, so the share of `W_dec[i]` in the raw
activation is `z_i` times the token's scale (`scale_of`). `decode` stays in normalised space,
because it does not see the token; calling the dictionary goes the whole way. The native format
cannot hold such a dictionary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal, assert_never

import torch
from jaxtyping import Float, Int
from torch import Tensor

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


@dataclass(frozen=True, kw_only=True, eq=False)
class NormalisedSae(Sae):
    """A dictionary that normalises each token before encoding and undoes it after decoding."""

    normalisation: Normalisation = field(default_factory=LayerNorm)

    @classmethod
    def around(cls, sae: Sae, normalisation: Normalisation) -> NormalisedSae:
        """The same tensors, applied to normalised tokens."""
        return cls(
            **{f.name: getattr(sae, f.name) for f in fields(Sae)}, normalisation=normalisation
        )

    def scale_of(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token 1"]:
        """What one unit of normalised activation is in raw units, for each token."""
        return self._normalise(x)[2]

    def pre_activations(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token latent"]:
        return super().pre_activations(self._normalise(x)[0])

    @torch.no_grad()
    def encode_selected(
        self, x: Float[Tensor, "*token d_in"], latents: Sequence[int] | Int[Tensor, "selected"]
    ) -> Float[Tensor, "*token selected"]:
        chosen = torch.as_tensor(latents, dtype=torch.int64, device=self.device)
        return self.encode(x)[..., chosen]

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "*token d_in"]) -> Float[Tensor, "*token d_out"]:
        codes: SparseCodes = self.encode_sparse(x)
        _, shift, scale = self._normalise(x)
        return self.decode(codes) * scale + shift

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
