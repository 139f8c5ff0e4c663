"""What a latent's decoder row does to the next token if nothing stood between: its projection on
the vocabulary.

    scores = (W_U − mean over the vocabulary) · (gain ⊙ d),   in standard deviations over the
    vocabulary

The final norm's gain is folded in and W_U is centred, since a constant added to all logits changes
nothing. The ten largest are what the latent promotes, the ten smallest what it suppresses; only
tokens that the corpus uses are listed, since the others are mostly ones the model hardly learned.
Excess kurtosis over the vocabulary tells whether few tokens stand out, which is the mark of an
output feature. (Gur-Arieh et al. 2025, "VocabProj".)

Cost: one product of `latent × d_model × vocab`; with bfloat16 the candidates come from the fast
product and the scores shown are recomputed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from pipeline.describe.encoder import Precision

N_SHOWN = 10
_CANDIDATES = 16
_BLOCK, _TOKENS, _GROUP = 256, 2048, 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Unembedding:
    """The vocabulary matrix with gain folded in and the mean removed. `fast` has it in the dtype of
    the product, the rows of the ids that may be `listed` first."""

    matrix: Float[Tensor, "vocab d_model"]
    fast: Float[Tensor, "vocab d_model"]
    listed: Int64[Tensor, "listed"]

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
        is_hidden = torch.zeros(len(matrix), dtype=torch.bool)
        is_hidden[hidden] = True
        listed, rest = torch.nonzero(~is_hidden)[:, 0], torch.nonzero(is_hidden)[:, 0]
        return cls(
            matrix=matrix,
            fast=matrix[torch.cat([listed, rest])].to(getattr(torch, precision)),
            listed=listed,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Projection:
    """Per latent: ids and scores of the tokens it promotes and suppresses, strongest first, and the
    kurtosis."""

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
    n_listed = len(u.listed)
    logits = torch.empty(len(d), n_listed, dtype=u.fast.dtype)
    squares, fourths = torch.zeros(len(d)), torch.zeros(len(d))
    d_fast = d.to(u.fast.dtype)
    for start in range(
        0, len(u.fast), _TOKENS
    ):  # so few that one piece stays in the cache for all that is done to it
        piece = d_fast @ u.fast[start : start + _TOKENS].T
        logits[:, start : start + _TOKENS] = piece[:, : max(0, n_listed - start)]
        moments = piece.float().square_()
        squares += moments.sum(dim=1)
        fourths += torch.linalg.vecdot(moments, moments)
    variance = squares / len(u.fast)
    kurtosis = fourths / len(u.fast) / variance.square().clamp_min(1e-30) - 3
    std = variance.sqrt().clamp_min(1e-12)
    up = _exact(u.listed[_largest(logits)], d, std, u, descending=True)
    down = _exact(u.listed[_largest(logits.neg_())], d, std, u, descending=False)
    return *up, *down, kurtosis


def _largest(logits: Float[Tensor, "latent vocab"]) -> Int64[Tensor, "latent candidate"]:
    """Ids of the largest logits. The vocabulary is dealt into groups, of which only those with the
    largest maxima are searched: much less to sort. (A group takes every n-th token, so that maxima
    are taken along whole vectors.)"""
    n = logits.shape[1]
    n_groups = n // _GROUP
    if n_groups < 2 * _CANDIDATES:
        return logits.topk(min(_CANDIDATES, n), dim=1).indices
    whole = n_groups * _GROUP
    best = (
        logits[:, :whole]
        .unflatten(1, (_GROUP, n_groups))
        .amax(dim=1)
        .topk(_CANDIDATES, dim=1)
        .indices
    )
    ids = (best[:, :, None] + torch.arange(_GROUP) * n_groups).flatten(1)
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
    scores = (
        einsum(u.matrix[ids], d, "latent candidate d, latent d -> latent candidate") / std[:, None]
    )
    scores, order = scores.sort(dim=1, descending=descending, stable=True)
    return ids.gather(1, order)[:, :N_SHOWN], scores[:, :N_SHOWN]
