"""The sparse step written plainly, for PyTorch to differentiate: the oracle of every kernel, six
dense products.

It follows the formulas at the head of `sparse_step` with dense latents. Nothing else imports it but
tests and benchmarks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from sae.kernels.select import PerRow, Selection


def reference_losses(
    weights: dict[str, Tensor],
    x: Float[Tensor, "token d_in"],
    y: Float[Tensor, "token d_out"] | None,
    *,
    selection: Selection,
    dead: Bool[Tensor, "latent"],
    auxk_weight: float,
    auxk_k: int,
    group_ends: Sequence[int] | None = None,
) -> dict[str, Tensor]:
    """The parts of the loss, differentiable with respect to every weight."""
    W_enc, b_enc, W_dec, b_dec = (weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    centred, target = (x - b_dec, x) if y is None else (x, y)
    pre = F.linear(centred, W_enc, b_enc)
    z = _keep(pre, selection)
    skip = F.linear(x, weights["W_skip"]) if "W_skip" in weights else 0.0
    ends = group_ends or (len(W_enc),)
    errors = [z[:, :end] @ W_dec[:end] + b_dec + skip - target for end in ends]
    losses = {"reconstruction": torch.stack([error.square().mean() for error in errors]).mean()}
    if auxk_weight and dead.any():
        wanted = -errors[-1].detach()
        z_dead = _keep(pre[:, dead], PerRow(k=min(auxk_k, int(dead.sum()))))
        energy = (wanted - wanted.mean(0)).square().sum()
        losses["auxiliary"] = auxk_weight * (z_dead @ W_dec[dead] - wanted).square().sum() / energy
    return losses


def _keep(
    pre: Float[Tensor, "token latent"], selection: Selection
) -> Float[Tensor, "token latent"]:
    """The selected entries' positive part, the rest zero."""
    if isinstance(selection, PerRow):
        index = pre.topk(selection.k, dim=1).indices
        mask = torch.zeros_like(pre).scatter_(1, index, 1.0)
    else:
        index = pre.flatten().topk(selection.count(len(pre))).indices
        mask = torch.zeros_like(pre).flatten().scatter_(0, index, 1.0).view_as(pre)
    return pre.relu() * mask
