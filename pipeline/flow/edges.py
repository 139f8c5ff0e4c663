"""A match both ways → one table of edges per pair of dictionaries, each with its cosine, rank,
margin and mutuality.

1. Every target keeps its top-k predecessors (`rank` 0 is the best).
2. Every source keeps its best successor too: forward chains need it even where the target prefers
   others. Such an edge has `rank` -1; `forward_rank` is the place of the target among the source's
   successors, -1 outside its top-k.
3. `margin` is the cosine minus that of the target's best other candidate; `mutual` means first
   choice both ways.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int64

from pipeline.flow.match import NO_PARTNER, Match, Nearest


@dataclass(frozen=True, kw_only=True)
class EdgeColumns:
    """Edges of one pair, column by column; `source` and `target` are latents."""

    source: Int64[np.ndarray, "edge"]
    target: Int64[np.ndarray, "edge"]
    rank: Int64[np.ndarray, "edge"]
    forward_rank: Int64[np.ndarray, "edge"]
    cosine: Float[np.ndarray, "edge"]
    margin: Float[np.ndarray, "edge"]

    @property
    def mutual(self) -> Bool[np.ndarray, "edge"]:
        return (self.rank == 0) & (self.forward_rank == 0)

    @property
    def top(self) -> Bool[np.ndarray, "edge"]:
        """Which edges are the target's first choice."""
        return self.rank == 0


def edges_of(found: Match, *, top_k: int) -> EdgeColumns:
    """All edges of a match whose k is at least `top_k` (and at least 2, so that the margin is
    known)."""
    target, rank, source, cosine = _listed(found.predecessors, top_k)
    ahead, forward_rank, reached, strength = _listed(found.successors, top_k)
    n_sources = found.successors.index.shape[0]
    backward_key = target * n_sources + source
    forward_key = reached * n_sources + ahead
    extra = (forward_rank == 0) & ~np.isin(forward_key, backward_key)
    best = _numpy(found.predecessors.cosine)
    other = np.where(rank == 0, best[target, 1], best[target, 0])
    return EdgeColumns(
        source=np.concatenate([source, ahead[extra]]),
        target=np.concatenate([target, reached[extra]]),
        rank=np.concatenate([rank, np.full(extra.sum(), -1)]),
        forward_rank=np.concatenate(
            [_looked_up(backward_key, forward_key, forward_rank), forward_rank[extra]]
        ),
        cosine=np.concatenate([cosine, strength[extra]]).astype(np.float64),
        margin=np.concatenate([cosine - other, strength[extra] - best[reached[extra], 0]]).astype(
            np.float64
        ),
    )


def _listed(nearest: Nearest, top_k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(row, rank, partner, cosine) of every partner found, best first within a row."""
    index = _numpy(nearest.index)[:, :top_k]
    row, rank = np.nonzero(index != NO_PARTNER)
    return row, rank, index[row, rank], _numpy(nearest.cosine)[row, rank]


def _looked_up(wanted: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`values` at the place of each wanted key, -1 where it is not among `keys`."""
    if not len(keys):
        return np.full(len(wanted), -1)
    order = np.argsort(keys)
    place = np.searchsorted(keys[order], wanted).clip(max=len(keys) - 1)
    return np.where(keys[order][place] == wanted, values[order][place], -1)


def _numpy(tensor: object) -> np.ndarray:
    return tensor.cpu().numpy()  # type: ignore[attr-defined]  # a torch tensor
