"""One training step of a TopK-like dictionary with one dense product instead of six: batch in,
gradients out.

With T tokens, width d, N latents, k active per token, S = ‖·‖² summed over the batch and c = 1 / (T
d):

    1. codes     z = the selected of W_enc (x − b_dec) + b_enc, positive part              2 T d N
       sae/kernels/select.py
    2. residual  r = Σ z W_dec + b_dec − y;    loss = c S(r)                               2 T k d
    3. at z      ∂z = ⟨2 c r, W_dec⟩ where z > 0                                           2 T k d
    4. weights   one sort by latent serves both: ∂W_dec = zᵀ 2cr,  ∂W_enc = ∂zᵀ (x − b_dec)    4 T k
       d
    5. biases    ∂b_enc = Σ ∂z;  ∂b_dec = Σ 2cr − ∂b_enc W_enc                             2 d N

Matryoshka prefixes (Bussmann et al. 2025, arXiv 2503.17547) are the same five steps on rows that
stand for a token and a group of latents: prefix p reconstructs from the groups up to p, the loss is
the mean over prefixes, and a latent of group g sees the sum of the residuals of every prefix that
holds it.

AuxK (Gao et al. 2024, arXiv 2406.04093): the k_aux largest pre-activations of *dead* latents
reconstruct what the others left, `weight · S(−r̄ − ê) / S(r̄ − mean)` with r̄ held fixed. Its
gradients reach encoder, decoder and biases; it costs four products over the dead latents' columns
and nothing when none is dead.

A transcoder (`y` given) subtracts nothing from its input, and with a `W_skip` adds a linear map of
it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels.codes import (
    Codes,
    decode,
    order_by_latent,
    products_at,
    residual_and_slope,
    summed_by_latent,
    totals_by_latent,
)
from sae.kernels.select import Selection, WholeBatch, encode
from sae.step import Pass, Situation, Weights


@dataclass(frozen=True, kw_only=True)
class AuxK:
    """The auxiliary loss on dead latents: its weight, and how many of them each token may use."""

    weight: float
    k: int


@torch.no_grad()
def sparse_step(
    weights: Weights,
    x: Float[Tensor, "token d_in"],
    y: Float[Tensor, "token d_out"] | None,
    now: Situation,
    *,
    selection: Selection,
    auxk: AuxK,
    group_ends: Int[Tensor, "group"] | None = None,
) -> Pass:
    """Losses and gradients of one batch. `group_ends` are the Matryoshka prefix widths, the last
    one N."""
    W_enc, W_dec, b_dec = weights["W_enc"], weights["W_dec"], weights["b_dec"]
    centred = x - b_dec if y is None else x
    target = x if y is None else y
    codes = encode(centred, W_enc, weights["b_enc"], selection, now.precision)
    n_groups = 1 if group_ends is None else len(group_ends)
    grouped = codes if group_ends is None else _by_group(codes, group_ends)
    base = (
        b_dec - target
        if "W_skip" not in weights
        else b_dec - target + F.linear(x, weights["W_skip"])
    )
    scale = 1.0 / (n_groups * target.numel())
    if n_groups == 1:
        full, at_z = residual_and_slope(codes, W_dec, base, 2.0 * scale)
        residual, seen = full[:, None], full * (2.0 * scale)
    else:
        residual = _residuals(grouped, W_dec, base, n_groups)
        full, slope = residual[:, -1], residual * (2.0 * scale)  # of each prefix' reconstruction
        seen = rearrange(slope.flip(1).cumsum(1).flip(1), "token group d -> (token group) d")
        at_z = products_at(grouped, seen, W_dec) * (codes.value > 0)
    by_latent = order_by_latent(grouped, len(W_enc))
    token = (
        by_latent.row
        if n_groups == 1
        else torch.div(by_latent.row, n_groups, rounding_mode="floor")
    )
    gradients = {
        "W_dec": summed_by_latent(by_latent, codes.value, seen),
        "W_enc": summed_by_latent(by_latent, at_z, centred, row=token),
        "b_enc": totals_by_latent(codes, by_latent, at_z),
        "b_dec": residual.sum((0, 1)) * (2.0 * scale),
    }
    if "W_skip" in weights:
        gradients["W_skip"] = residual.sum(1).T @ x * (2.0 * scale)
    squared_error = _sum_of_squares(full)
    losses = {
        "reconstruction": (squared_error if n_groups == 1 else _sum_of_squares(residual)) * scale
    }
    if auxk.weight and bool(now.dead.any()):
        losses["auxiliary"] = _add_auxk(gradients, weights, centred, full, now, auxk)
    if y is None:
        gradients["b_dec"] -= gradients["b_enc"] @ W_enc
    edge = codes.value.min() if isinstance(selection, WholeBatch) and len(codes.value) else None
    active = codes.value > 0
    return Pass(
        losses=losses,
        gradients=gradients,
        fired=totals_by_latent(codes, by_latent, active.float()) > 0,
        n_active=active.sum(),
        squared_error=squared_error,
        squared_target=_sum_of_squares(target),
        threshold=edge,
    )


def _sum_of_squares(values: Tensor) -> Tensor:
    """Without a temporary of the size of `values`."""
    return torch.linalg.vector_norm(values).square()


def _by_group(codes: Codes, group_ends: Int[Tensor, "group"]) -> Codes:
    """The same entries over rows (token, group); entries are in that order already since latents
    ascend in a row."""
    row = codes.row() * len(group_ends) + torch.bucketize(codes.latent, group_ends, right=True)
    start = torch.zeros(codes.n_rows * len(group_ends) + 1, dtype=torch.int64, device=row.device)
    torch.cumsum(torch.bincount(row, minlength=len(start) - 1), 0, out=start[1:])
    return Codes(start=start, latent=codes.latent, value=codes.value)


def _residuals(
    codes: Codes, W_dec: Tensor, base: Tensor, n_groups: int
) -> Float[Tensor, "token group d"]:
    """What each prefix' reconstruction misses, with the sign of reconstruction − target."""
    parts = rearrange(decode(codes, W_dec), "(token group) d -> token group d", group=n_groups)
    summed = parts.cumsum(1) if n_groups > 1 else parts
    return summed.add_(base[:, None])


def _add_auxk(
    gradients: Weights,
    weights: Weights,
    centred: Tensor,
    residual: Tensor,
    now: Situation,
    auxk: AuxK,
) -> Tensor:
    """Add AuxK's gradients in place (to b_enc too, before b_dec takes its share from it) and return
    its loss."""
    dead = now.dead.nonzero().flatten()
    W_enc, W_dec = weights["W_enc"][dead], weights["W_dec"][dead]
    pre = F.linear(centred, W_enc, weights["b_enc"][dead])
    if auxk.k < len(dead):
        kept = pre.topk(auxk.k, dim=1, sorted=False)
        z = torch.zeros_like(pre).scatter_(1, kept.indices, kept.values.relu())
    else:
        z = pre.relu()
    wanted = -residual
    energy = (wanted - wanted.mean(0)).square().sum().clamp_min(torch.finfo(wanted.dtype).tiny)
    miss = z @ W_dec - wanted
    slope = miss * (2 * auxk.weight / energy)
    at_z = (slope @ W_dec.T) * (z > 0)
    gradients["W_dec"].index_add_(0, dead, z.T @ slope)
    gradients["W_enc"].index_add_(0, dead, at_z.T @ centred)
    gradients["b_enc"].index_add_(0, dead, at_z.sum(0))
    return auxk.weight * miss.square().sum() / energy
