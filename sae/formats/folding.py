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

3. A stream that the peer centres (TransformerLens' `center_writing_weights`: every writer has mean
   0 over the channels) is `P x` with `P = I − 11ᵀ/d`: `W_enc P`, `b_enc − W_enc (I − P) b_in`, and
   the mean that was taken away is passed on by `W_skip = 11ᵀ/d`.
4. A normalisation of each token depends on the token: sae/formats/normalised.py.

All steps are exact up to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import UserError
from sae.activations import Activation, Gated, TopKActivation
from sae.dictionary import Sae
from sae.formats.normalised import ConstantNorm, LayerNorm, Normalisation, NormalisedSae

_SAME_LENGTH = 1e-4
"""Relative spread of row lengths below which rows count as equally long."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Foreign:
    """What a foreign file says. `select_by_norm`: its TopK chooses by pre-activation times decoder
    row length. None for `input_scale`, `output_scale` or `centred`: the file leaves it open, and
    conventions have to say it (sae/formats/conventions.py)."""

    W_enc: Float[Tensor, "latent d_in"]
    b_enc: Float[Tensor, "latent"]
    W_dec: Float[Tensor, "latent d_out"]
    b_dec: Float[Tensor, "d_out"]
    activation: Activation
    b_in: Float[Tensor, "d_in"] | None = None
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    input_scale: float | None = 1.0
    output_scale: float | None = 1.0
    centred: bool | None = False
    normalisation: Normalisation | None = None
    select_by_norm: bool = False
    metadata: dict[str, Any] = field(default_factory=dict)


def fold(foreign: Foreign, *, unit_decoder: bool = True) -> Sae:
    """The inference form. With `unit_decoder=False` latents have the size the peer gives them; a
    peer that chooses by `n_i pre_i` gives them the size they have with unit rows."""
    s_in, s_out = foreign.input_scale or 1.0, foreign.output_scale or 1.0
    W_dec, length = foreign.W_dec / s_out, row_lengths(foreign.W_dec / s_out)
    rescaled = unit_decoder or foreign.select_by_norm
    factor = _factor(foreign, length) if rescaled else torch.ones_like(length)
    W_enc, b_enc, activation = _scale_latents(
        foreign.W_enc * s_in, foreign.b_enc, foreign.activation, factor
    )
    b_in = torch.zeros(W_enc.shape[1]) if foreign.b_in is None else foreign.b_in / s_in
    skip = None if foreign.W_skip is None else foreign.W_skip * s_in / s_out
    if foreign.centred and not isinstance(foreign.normalisation, LayerNorm):
        W_enc, b_enc, skip = _for_raw_streams(foreign, W_enc, b_enc, b_in, skip)
    sae = Sae(
        W_enc=W_enc.contiguous(),
        b_enc=b_enc,
        W_dec=(W_dec / factor[:, None]).contiguous(),
        b_dec=foreign.b_dec / s_out,
        b_in=b_in,
        activation=activation,
        W_skip=None if skip is None else skip.contiguous(),
        metadata={
            **foreign.metadata,
            "unit_decoder": bool(((W_dec / factor[:, None]).norm(dim=1) - 1).abs().max() < 1e-3),
        },
    )
    if foreign.normalisation is None:
        return sae
    return NormalisedSae.around(sae, foreign.normalisation, raw_units=unit_decoder)


def _for_raw_streams(
    foreign: Foreign, W_enc: Tensor, b_enc: Tensor, b_in: Tensor, skip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Step 3: encoder, bias and skip for streams that keep their mean."""
    if isinstance(foreign.normalisation, ConstantNorm):
        raise UserError(
            "a centred stream that is rescaled token by token cannot be folded",
            where="conventions",
            expected="centred, or constant_norm_rescale, but not both",
            fix="leave out `centred` if the stream was not centred",
        )
    mean = W_enc.mean(dim=1, keepdim=True)
    b_enc = b_enc - mean[:, 0] * b_in.sum()
    if skip is not None:
        skip = skip - skip.mean(dim=1, keepdim=True)
    if "transcodes" not in foreign.metadata:
        passed = torch.full((len(b_in), len(b_in)), 1 / len(b_in))
        skip = passed if skip is None else skip + passed
    return W_enc - mean, b_enc, skip


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
        case _:
            return W_enc * factor[:, None], b_enc * factor, activation.scaled(factor)
