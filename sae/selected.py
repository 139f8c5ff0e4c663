"""A few latents of a TopK encoder, without selecting in every row: raw pre-activations in, those
latents out.

A latent is in its row's TopK only if fewer than k others lie above it. To know that it is not
there, it is enough to find k that are, and nearly always a few columns show them:

1. `wanted`: the pre-activations of the selected latents, for all rows. A row in which all are 0 or
   less is done: all 0.
2. Blocks of columns, the first about √(2kN) wide, each as wide as all before it. After each, rows
   leave in which every selected latent is decided: not positive, or k columns above it by more than
   rounding.
3. Rows that are left have seen all columns; their TopK is taken as the encoder takes it, equals
   included. Values are those of step 1.

NaN is handed on as the encoder hands it on: it ranks above every number, so it takes a place among
the k, and where the encoder's latent is NaN, so is this one. It is never taken for a latent that
is not active.

Cost where every rank of the latent has the same chance, as for a random direction: a fifth of the
product and a fiftieth of the selections. A latent that is active in every row saves nothing.
Memory: one block of pre-activations.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.activations import TopKActivation

MOST_SELECTED = 8
_ROUNDING = 64 * 2.0**-24
_MULTIPLE = 64


def selected_of_topk(
    centred: Float[Tensor, "token d_in"],
    W_enc: Float[Tensor, "latent d_in"],
    b_enc: Float[Tensor, "latent"],
    activation: TopKActivation,
    chosen: Int[Tensor, "selected"],
) -> Float[Tensor, "token selected"]:
    """The columns `chosen` of the encoder's latents; `centred` is what its product sees (x −
    b_in)."""
    wanted = F.linear(centred, W_enc[chosen], b_enc[chosen])
    found = torch.zeros_like(wanted)
    rows = _may_be_active(wanted).any(-1).nonzero().squeeze(1)
    if not len(rows):
        return found
    x, wanted = centred[rows], wanted[rows]
    bar = wanted + _rounding(x, W_enc[chosen], b_enc[chosen])
    above = torch.zeros(wanted.shape, dtype=torch.int64, device=wanted.device)
    parts: list[Tensor] = []
    for start, stop in _blocks(len(W_enc), activation.k):
        part = F.linear(x, W_enc[start:stop], b_enc[start:stop])
        parts.append(part)
        above += _count_above(part, bar)
        kept = (_may_be_active(wanted) & (above < activation.k)).any(-1)
        if stop < len(W_enc) and not kept.all():
            rows, x, wanted, bar, above = rows[kept], x[kept], wanted[kept], bar[kept], above[kept]
            parts = [each[kept] for each in parts]
        if not len(rows):
            return found
    z = activation(torch.cat(parts, dim=1))[:, chosen]
    found[rows] = torch.where(z.isnan(), z, torch.where(z > 0, wanted, 0).relu())
    return found


def _may_be_active(wanted: Float[Tensor, "row selected"]) -> Bool[Tensor, "row selected"]:
    """Positive, or NaN."""
    return ~(wanted <= 0)


def _blocks(n_latents: int, k: int) -> list[tuple[int, int]]:
    """(start, stop) of the blocks of columns."""
    ends = [min(n_latents, _MULTIPLE * math.ceil(math.sqrt(2 * k * n_latents) / _MULTIPLE))]
    while ends[-1] < n_latents:
        ends.append(min(n_latents, 2 * ends[-1]))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _count_above(
    part: Float[Tensor, "row column"], bar: Float[Tensor, "row selected"]
) -> Int[Tensor, "row selected"]:
    """Comparisons with NaN are False, so such a row is read to the end and the encoder's TopK
    decides."""
    return torch.stack([(part > each[:, None]).sum(-1) for each in bar.unbind(-1)], dim=-1)


def _rounding(
    x: Float[Tensor, "row d_in"],
    rows: Float[Tensor, "selected d_in"],
    bias: Float[Tensor, "selected"],
) -> Float[Tensor, "row selected"]:
    """How far a product may come out differently in a matrix of another shape; in float32 a few
    times what is seen."""
    size = x.norm(dim=-1, keepdim=True) * rows.norm(dim=-1) + bias.abs()
    return size * (_ROUNDING if x.dtype == torch.float32 else 64 * torch.finfo(x.dtype).eps)
