"""What a latent's decoder row does to the next token if nothing stood between: its projection on the vocabulary.

    scores = (W_U − mean over the vocabulary) · (gain ⊙ d),   in standard deviations over the vocabulary

The final norm's gain is folded in and W_U is centred, since a constant added to all logits changes nothing. The ten
largest are what the latent promotes, the ten smallest what it suppresses; only tokens that the corpus uses are listed,
since the others are mostly ones the model hardly learned. Excess kurtosis over the vocabulary tells whether few tokens
stand out, which is the mark of an output feature. (Gur-Arieh et al. 2025, "VocabProj".)

Cost: one product of `latent × d_model × vocab`; with bfloat16 the candidates come from the fast product and the scores
shown are recomputed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from pipeline.atlas.firings import Precision

N_SHOWN = 10
_CANDIDATES = 16
_BLOCK = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class Unembedding:
    """The vocabulary matrix with gain folded in and the mean removed. Ids in `hidden` are never listed."""

    matrix: Float[Tensor, "vocab d_model"]
    fast: Float[Tensor, "vocab d_model"]
    hidden: Int64[Tensor, "hidden"]

    @classmethod
    def of(
        cls,
        W_U: Float[Tensor, "vocab d_model"],
        gain: Float[Tensor, "d_model"],
        *,
        hidden: list[int],
        precision: Precision,
    ) -> Unembedding:
        """`hidden` are ids that are never listed (special tokens, padding of the vocabulary)."""
        matrix = W_U.float() * gain.float()
        matrix = matrix - matrix.mean(dim=0)
        return cls(
            matrix=matrix, fast=matrix.to(getattr(torch, precision)), hidden=torch.tensor(hidden, dtype=torch.int64)
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Per latent: ids and scores of the tokens it promotes and suppresses, strongest first, and the kurtosis."""

    promotes: Int64[np.ndarray, "latent ten"]
    promotes_score: Float32[np.ndarray, "latent ten"]
    suppresses: Int64[np.ndarray, "latent ten"]
    suppresses_score: Float32[np.ndarray, "latent ten"]
    kurtosis: Float32[np.ndarray, "latent"]


@torch.no_grad()
def project(W_dec: Float[Tensor, "latent d_model"], unembedding: Unembedding) -> Projection:
    """Project every decoder row. Rows of zeros get scores of 0."""
    blocks = [_project_block(block, unembedding) for block in W_dec.float().split(_BLOCK)]
    joined = [torch.cat([block[i] for block in blocks]).numpy() for i in range(5)]
    return Projection(
        promotes=joined[0],
        promotes_score=joined[1],
        suppresses=joined[2],
        suppresses_score=joined[3],
        kurtosis=joined[4],
    )


def _project_block(d: Float[Tensor, "latent d_model"], u: Unembedding) -> tuple[Tensor, ...]:
    logits = d.to(u.fast.dtype) @ u.fast.T
    moments = logits.float().square_()
    variance = moments.mean(dim=1)
    kurtosis = moments.square_().mean(dim=1) / variance.square().clamp_min(1e-30) - 3
    std = variance.sqrt().clamp_min(1e-12)
    logits[:, u.hidden] = -torch.inf
    up = _exact(_largest(logits), d, std, u, descending=True)
    logits.neg_()[:, u.hidden] = -torch.inf
    down = _exact(_largest(logits), d, std, u, descending=False)
    return *up, *down, kurtosis


def _largest(logits: Float[Tensor, "latent vocab"]) -> Int64[Tensor, "latent candidate"]:
    """Ids of the largest logits. The vocabulary is searched in stretches: the maxima of 64 first, which is much less
    to sort."""
    n = logits.shape[1]
    whole = n // 64 * 64
    if whole < 64 * _CANDIDATES:
        return logits.topk(min(_CANDIDATES, n), dim=1).indices
    stretches = logits[:, :whole].unflatten(1, (-1, 64))
    best = stretches.amax(dim=2).topk(_CANDIDATES, dim=1).indices
    ids = (best[:, :, None] * 64 + torch.arange(64)).flatten(1)
    ids = torch.cat([ids, torch.arange(whole, n).expand(len(logits), -1)], dim=1)
    return ids.gather(1, logits.gather(1, ids).topk(_CANDIDATES, dim=1).indices)


def _exact(
    ids: Int64[Tensor, "latent candidate"],
    d: Float[Tensor, "latent d_model"],
    std: Float[Tensor, "latent"],
    u: Unembedding,
    *,
    descending: bool,
) -> tuple[Int64[Tensor, "latent ten"], Float[Tensor, "latent ten"]]:
    scores = einsum(u.matrix[ids], d, "latent candidate d, latent d -> latent candidate") / std[:, None]
    scores, order = scores.sort(dim=1, descending=descending, stable=True)
    return ids.gather(1, order)[:, :N_SHOWN], scores[:, :N_SHOWN]
