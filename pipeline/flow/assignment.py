"""Two dictionaries → a one-to-one assignment of their latents, as SAE Match makes it.

1. Each latent becomes one row: its decoder row, its encoder row, or both with its bias
   (`Objective`). `folded` first moves JumpReLU thresholds into the weights: W_enc/θ, b_enc/θ,
   W_dec·θ, which leaves the dictionary's output as it is.
2. The similarity of two latents is the inner product of their rows. For a full permutation the
   largest sum of similarities is the smallest sum of squared distances.
3. Dense: the whole matrix goes to a linear assignment solver. Sparse: only the best candidates of
   every latent, both ways, are offered; each source may also stay alone, at the price of its worst
   candidate. Who stayed alone is then assigned among the targets left over.
4. Assignments of neighbouring layers compose to assignments of distant ones (`then`).

Direction: `target_of[u]` receives what source latent `u` holds, `z_target[target_of[u]] =
z_source[u]`. That is a scatter; indexing with the same numbers would apply the inverse permutation.

Cost: dense O(n³) at worst (about 70 s at 16k latents), n² memory; sparse about n · candidates of
memory. Source: SAE Match (Balagansky et al., arXiv 2410.07656) §3; sparse candidates are this
project's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

import numpy as np
import scipy.sparse as sparse
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from torch import Tensor

from featureflow.errors import UserError
from pipeline.flow.match import full_precision
from sae import Sae
from sae.activations import Threshold

Objective = Literal["decoder", "encoder", "full"]
OBJECTIVES: tuple[Objective, ...] = ("decoder", "encoder", "full")
NOBODY = -1
MOST_DENSE = 1 << 29
"""Entries of the similarity matrix beyond which the dense solver is refused: 2 GiB and hours of
work."""
_BLOCK_ROWS = 512
_LEFT_OVER_BLOCK = 4096


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """`target_of[source]` is the latent that receives a source latent, -1 for nobody. One-to-one:
    no target twice."""

    target_of: Int64[np.ndarray, "source"]
    n_targets: int

    @property
    def source_of(self) -> Int64[np.ndarray, "target"]:
        """The inverse: for each target the source it is assigned to, -1 for none."""
        inverse = np.full(self.n_targets, NOBODY, dtype=np.int64)
        matched = np.flatnonzero(self.target_of != NOBODY)
        inverse[self.target_of[matched]] = matched
        return inverse

    def apply(self, z: Float[Tensor, "*token source"]) -> Float[Tensor, "*token target"]:
        """Latents of the source, written where the target keeps them; targets of nobody are 0.
        Raises UserError."""
        if z.shape[-1] != len(self.target_of):
            raise UserError(
                "these latents are of another width",
                expected=str(len(self.target_of)),
                found=str(z.shape),
            )
        matched = torch.from_numpy(np.flatnonzero(self.target_of != NOBODY))
        place = torch.from_numpy(self.target_of)[matched].to(z.device)
        moved = z.new_zeros(*z.shape[:-1], self.n_targets)
        moved[..., place] = z[..., matched.to(z.device)]
        return moved

    def then(self, onward: Assignment) -> Assignment:
        """A→B followed by B→C is A→C. Raises UserError when the widths at B differ."""
        if self.n_targets != len(onward.target_of):
            raise UserError(
                "these assignments do not follow each other",
                expected=f"{self.n_targets} latents in the middle",
                found=str(len(onward.target_of)),
            )
        middle = self.target_of
        end = np.where(middle == NOBODY, NOBODY, onward.target_of[np.maximum(middle, 0)])
        return Assignment(target_of=end, n_targets=onward.n_targets)


def assign(
    source: Sae,
    target: Sae,
    *,
    objective: Objective = "decoder",
    fold: bool = False,
    n_candidates: int | None = None,
) -> Assignment:
    """The assignment with the largest sum of similarities. Of unequal widths the narrower is
    matched whole.

    `n_candidates` keeps so many best partners of each latent and solves the sparse problem; None
    solves the dense one. Raises UserError for dictionaries of different spaces, and for dense
    problems too large to hold."""
    left, right = (latent_rows(folded(sae) if fold else sae, objective) for sae in (source, target))
    if left.shape[1] != right.shape[1]:
        raise UserError(
            f"these dictionaries have no common {objective} space",
            expected=f"rows of {left.shape[1]} numbers",
            found=f"rows of {right.shape[1]}",
            fix="match dictionaries of one model's residual stream",
        )
    problem = (
        Candidates.all_of(left, right)
        if n_candidates is None
        else Candidates.best_of(left, right, n_candidates)
    )
    return problem.solve()


def folded(sae: Sae) -> Sae:
    """The same function with thresholds of one: W_enc/θ, b_enc/θ, W_dec·θ. Only JumpReLU has
    thresholds to fold; other dictionaries, and latents whose threshold is 0, come back as they
    are."""
    if not isinstance(sae.activation, Threshold):
        return sae
    theta = sae.activation.theta
    scale = torch.where(theta > 0, theta, torch.ones_like(theta))
    return sae.replace(
        W_enc=sae.W_enc / scale[:, None],
        b_enc=sae.b_enc / scale,
        W_dec=sae.W_dec * scale[:, None],
        activation=Threshold(theta=theta / scale),
    )


def latent_rows(sae: Sae, objective: Objective) -> Float[Tensor, "latent number"]:
    """What of a latent is compared. The bias counts the centre that the encoder subtracts, so that
    dictionaries with and without one are alike; b_dec belongs to no latent."""
    bias = sae.b_enc - sae.W_enc @ sae.b_in
    match objective:
        case "decoder":
            rows = sae.W_dec
        case "encoder":
            rows = sae.W_enc
        case "full":
            rows = torch.cat([sae.W_dec, sae.W_enc, bias[:, None]], dim=1)
        case _:
            assert_never(objective)
    return torch.nan_to_num(rows.detach().to("cpu", torch.float32))


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """An assignment problem: rows of both sides and, for the sparse problem, the pairs that may be
    matched."""

    left: Float[Tensor, "source number"]
    right: Float[Tensor, "target number"]
    pairs: sparse.csr_matrix | None

    @classmethod
    def all_of(
        cls, left: Float[Tensor, "source number"], right: Float[Tensor, "target number"]
    ) -> Candidates:
        """Every pair may be matched. Raises UserError when the matrix is too large."""
        if len(left) * len(right) > MOST_DENSE:
            raise UserError(
                "these dictionaries are too wide for the dense assignment",
                expected=f"at most {MOST_DENSE:,} pairs",
                found=f"{len(left):,} × {len(right):,}",
                fix="give n_candidates, for example 64",
            )
        return cls(left=left, right=right, pairs=None)

    @classmethod
    def best_of(
        cls, left: Float[Tensor, "source number"], right: Float[Tensor, "target number"], n: int
    ) -> Candidates:
        """The `n` best targets of every source and the `n` best sources of every target may be
        matched."""
        if n < 1:
            raise UserError("a latent needs candidates", expected="n_candidates >= 1", found=str(n))
        forward, backward = _best(left, right, n), _best(right, left, n)
        row = np.concatenate([forward[0], backward[1]])
        column = np.concatenate([forward[1], backward[0]])
        value = np.concatenate([forward[2], backward[2]])
        key, first = np.unique(row * len(right) + column, return_index=True)
        shape = (len(left), len(right))
        return cls(
            left=left,
            right=right,
            pairs=sparse.csr_matrix(
                (value[first], (key // len(right), key % len(right))), shape=shape
            ),
        )

    def solve(self) -> Assignment:
        """One-to-one, largest total similarity."""
        target_of = (
            _dense(self.left, self.right)
            if self.pairs is None
            else self._left_over(_sparse(self.pairs))
        )
        return Assignment(target_of=target_of, n_targets=len(self.right))

    def _left_over(self, target_of: Int64[np.ndarray, "source"]) -> Int64[np.ndarray, "source"]:
        """Whoever stayed alone is assigned among the targets left over, in blocks of a few
        thousand."""
        sources = np.flatnonzero(target_of == NOBODY)
        targets = np.setdiff1d(np.arange(len(self.right)), target_of[target_of != NOBODY])
        n_blocks = max(1, -(-max(len(sources), len(targets)) // _LEFT_OVER_BLOCK))
        filled = target_of.copy()
        for some, others in zip(
            np.array_split(sources, n_blocks), np.array_split(targets, n_blocks), strict=True
        ):
            if len(some) and len(others):
                found = _dense(
                    self.left[torch.from_numpy(some)], self.right[torch.from_numpy(others)]
                )
                filled[some] = np.where(found == NOBODY, NOBODY, others[np.maximum(found, 0)])
        return filled


def _dense(
    left: Float[Tensor, "source number"], right: Float[Tensor, "target number"]
) -> np.ndarray:
    with full_precision():
        similarity = (left @ right.T).numpy()
    row, column = linear_sum_assignment(similarity, maximize=True)
    target_of = np.full(len(left), NOBODY, dtype=np.int64)
    target_of[row] = column
    return target_of


def _best(
    rows: Float[Tensor, "row number"], others: Float[Tensor, "other number"], n: int
) -> tuple[np.ndarray, ...]:
    """Row, best others and similarity, flat, a block of rows at a time."""
    n = min(n, len(others))
    found = []
    with full_precision():
        for start in range(0, len(rows), _BLOCK_ROWS):
            value, index = (rows[start : start + _BLOCK_ROWS] @ others.T).topk(n, dim=1)
            row = np.repeat(np.arange(start, start + len(value)), n)
            found.append((row, index.numpy().ravel(), value.double().numpy().ravel()))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def _sparse(pairs: sparse.csr_matrix) -> Int64[np.ndarray, "source"]:
    """The best matching of the candidates. Each latent of the narrower side may also stay alone."""
    if pairs.shape[0] <= pairs.shape[1]:
        return _sparse_narrow(pairs)
    source_of = _sparse_narrow(pairs.T.tocsr())
    matched = np.flatnonzero(source_of != NOBODY)
    target_of = np.full(pairs.shape[0], NOBODY, dtype=np.int64)
    target_of[source_of[matched]] = matched
    return target_of


def _sparse_narrow(pairs: sparse.csr_matrix) -> Int64[np.ndarray, "row"]:
    """The column of each row. Every row has a partner of its own beside the columns, worth as much
    as its worst candidate, so that a matching always exists; who takes that partner stays alone."""
    n_rows, n_columns = pairs.shape
    worst = np.minimum.reduceat(pairs.data, pairs.indptr[:-1])
    row = np.concatenate([np.repeat(np.arange(n_rows), np.diff(pairs.indptr)), np.arange(n_rows)])
    column = np.concatenate([pairs.indices, n_columns + np.arange(n_rows)])
    similarity = np.concatenate([pairs.data, worst])
    cost = similarity.max() + 1.0 - similarity  # above 0: the solver takes 0 for no edge
    offered = sparse.csr_matrix((cost, (row, column)), shape=(n_rows, n_columns + n_rows))
    taken_row, taken = min_weight_full_bipartite_matching(offered)
    column_of = np.full(n_rows, NOBODY, dtype=np.int64)
    column_of[taken_row] = np.where(taken < n_columns, taken, NOBODY)
    return column_of
