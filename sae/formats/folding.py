"""A foreign dictionary, as its own code runs it, turned into the one inference form used here.

The foreign form, with `s_in`, `s_out` the scales that its code applies to activations:

    pre = W_enc (s_in x − b_in) + b_enc,   z = activation(pre),   x̂ = (Σ z_i W_dec[i] + b_dec +
    W_skip s_in x) / s_out

1. Scales go into the tensors: `W_enc s_in`, `b_in / s_in`, `W_dec / s_out`, `b_dec / s_out`.
   Pre-activations keep their values, so thresholds stay.
2. Decoder rows get unit length: with `n_i = |W_dec[i]|`, latents become `n_i z_i`. For ReLU and
   thresholds that is `W_enc n, b_enc n, θ n`; for gates the gain and the offset. TopK chooses by
   pre-activation, so rescaling row by row would choose others: it is done when the peer itself
   chooses by `n_i pre_i`, or when all rows have the same length; otherwise the rows stay as they
   are and `metadata["unit_decoder"]` is false.

Both steps are exact up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations import Activation, Gated, Relu, Threshold, TopKActivation
from sae.dictionary import Sae

_SAME_LENGTH = 1e-4
"""Relative spread of row lengths below which rows count as equally long."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Foreign:
    """What a foreign file says. `select_by_norm`: its TopK chooses by pre-activation times decoder
    row length."""

    W_enc: Float[Tensor, "latent d_in"]
    b_enc: Float[Tensor, "latent"]
    W_dec: Float[Tensor, "latent d_out"]
    b_dec: Float[Tensor, "d_out"]
    activation: Activation
    b_in: Float[Tensor, "d_in"] | None = None
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    input_scale: float = 1.0
    output_scale: float = 1.0
    select_by_norm: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)


def fold(foreign: Foreign, *, unit_decoder: bool = True) -> Sae:
    """The inference form. With `unit_decoder=False` latents have the size the peer gives them; a
    peer that chooses by `n_i pre_i` gives them the size they have with unit rows."""
    W_dec = foreign.W_dec / foreign.output_scale
    length = row_lengths(W_dec)
    factor = (
        _factor(foreign, length)
        if unit_decoder or foreign.select_by_norm
        else torch.ones_like(length)
    )
    b_in = (
        torch.zeros(foreign.W_enc.shape[1])
        if foreign.b_in is None
        else foreign.b_in / foreign.input_scale
    )
    W_enc, b_enc, activation = _scale_latents(
        foreign.W_enc * foreign.input_scale, foreign.b_enc, foreign.activation, factor
    )
    skip = foreign.W_skip
    return Sae(
        W_enc=W_enc.contiguous(),
        b_enc=b_enc,
        W_dec=(W_dec / factor[:, None]).contiguous(),
        b_dec=foreign.b_dec / foreign.output_scale,
        b_in=b_in,
        activation=activation,
        W_skip=None
        if skip is None
        else (skip * foreign.input_scale / foreign.output_scale).contiguous(),
        metadata={
            **foreign.metadata,
            "unit_decoder": bool(torch.allclose(length / factor, torch.ones(()), atol=1e-3)),
        },
    )


def full_like_latents(value: float, W_enc: Float[Tensor, "latent d_in"]) -> Float[Tensor, "latent"]:
    """One number for every latent: a global threshold."""
    return torch.full((W_enc.shape[0],), float(value))


def row_lengths(W_dec: Float[Tensor, "latent d_out"]) -> Float[Tensor, "latent"]:
    """The length of each decoder row; 1 for a row of zeros, which stays zero."""
    length = W_dec.norm(dim=1)
    return torch.where(length > 0, length, torch.ones_like(length))


def _factor(foreign: Foreign, length: Float[Tensor, "latent"]) -> Float[Tensor, "latent"]:
    """By how much each latent grows when its decoder row gets unit length."""
    if not isinstance(foreign.activation, TopKActivation) or foreign.select_by_norm:
        return length
    spread = (length.max() - length.min()) / length.max()
    return (
        torch.full_like(length, length.mean().item())
        if spread < _SAME_LENGTH
        else torch.ones_like(length)
    )


def _scale_latents(
    W_enc: Float[Tensor, "latent d_in"],
    b_enc: Float[Tensor, "latent"],
    activation: Activation,
    factor: Float[Tensor, "latent"],
) -> tuple[Float[Tensor, "latent d_in"], Float[Tensor, "latent"], Activation]:
    """The encoder whose latents are `factor` times as large."""
    match activation:
        case Gated(gain=gain, offset=offset):
            return W_enc, b_enc, Gated(gain=gain * factor, offset=offset * factor)
        case Threshold(theta=theta):
            return W_enc * factor[:, None], b_enc * factor, Threshold(theta=theta * factor)
        case Relu() | TopKActivation():
            return W_enc * factor[:, None], b_enc * factor, activation
        case _:
            assert_never(activation)
