"""Several ideas of "the same feature in the layer before", behind one interface, compared on the
same targets.

A matcher maps what is known of a pair of dictionaries (`PairData`) to one source latent per target
latent, -1 for none:

0. shared           of the nearest by cosine the one that is read most and active with the target
   partner.py
1. cosine           the largest cosine of decoder rows, positive only                       Feature
   Flow §3.2
2. permutation      one-to-one assignment by decoder rows                                   SAE
   Match §3
3. pearson          the largest correlation of firing, from codes of the same tokens        Feature
   Flow App. C.4
4. jaccard          the largest overlap of firing                                           Balcells
   et al., 2410.08869
5. transport        cosine after source rows went through a ridge map between the layers,   after
   Yom Din et al.,
                    fitted on activations: for links over several layers
                    2303.09435
6. distribution     the most similar mean of hidden states, weighted by activation, at      the
   first moment of Cao et
                    the target's site                                                       al.,
                    2605.28567

`compare_matchers` judges all by what none of them saw: firing on other tokens, and if wanted by
removing each one's predecessor in the model. Cost: one pass over codes or activations each, and
products of latent × latent in tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import scipy.sparse as sparse
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from featureflow.errors import UserError
from featureflow.plugins import plugins
from pipeline.flow.assignment import assign
from pipeline.flow.directions import Directions, directions_of, sae_directions
from pipeline.flow.functional import FEW_FIRINGS, Codes, Cofiring, compare_firing, encode_tokens
from pipeline.flow.match import match
from pipeline.flow.partner import most_shared
from sae import Sae

NOBODY = -1
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Ridge strengths tried, as shares of the mean variance of a coordinate."""
_BLOCK = 2048

Rows = Callable[
    [], Iterable[tuple[Float[Tensor, "token d_source"], Float[Tensor, "token d_target"]]]
]
"""A fresh pass over activations of both sites on the same tokens, in batches."""
Best = Int64[np.ndarray, "target"]


@dataclass(frozen=True, kw_only=True)
class PairData:
    """A pair of dictionaries and activations to match them by. What a matcher does not need is
    never computed."""

    source: Sae
    target: Sae
    rows: Rows
    n_candidates: int | None = None

    @cached_property
    def source_codes(self) -> Codes:
        return encode_tokens(self.source, (left for left, _ in self.rows()))

    @cached_property
    def target_codes(self) -> Codes:
        return encode_tokens(self.target, (right for _, right in self.rows()))

    @cached_property
    def source_directions(self) -> Directions:
        return sae_directions(self.source, name="source")

    @cached_property
    def target_directions(self) -> Directions:
        return sae_directions(self.target, name="target")

    @cached_property
    def cofiring(self) -> Cofiring:
        """Best partners by correlation; no links are asked about."""
        nothing = np.zeros(0, dtype=np.int64)
        rng = np.random.default_rng(0)
        return compare_firing(
            self.source_codes, self.target_codes, (nothing, nothing), rng=rng, n_chance=0
        )


Matcher = Callable[[PairData], Best]


def shared(pair: PairData) -> Best:
    """Of the nearest by cosine the one that shares most with the target (partner.py)."""
    codes = pair.source_codes, pair.target_codes
    return most_shared(pair.source_directions, pair.target_directions, codes)


def cosine(pair: PairData) -> Best:
    """The largest positive cosine of decoder rows."""
    return (
        match(pair.source_directions, pair.target_directions, k=1)
        .predecessors.index[:, 0]
        .cpu()
        .numpy()
    )


def permutation(pair: PairData) -> Best:
    """The one-to-one assignment by decoder rows. Of unequal widths, some latents have no
    partner."""
    return assign(pair.source, pair.target, n_candidates=pair.n_candidates).source_of


def pearson(pair: PairData) -> Best:
    """The largest positive correlation of firing."""
    return pair.cofiring.best.index


def jaccard(pair: PairData) -> Best:
    """The largest overlap of firing: tokens where both fire over tokens where either does."""
    source, target = pair.source_codes, pair.target_codes
    fired_source = source.codes.astype(bool).astype(np.float32)
    fired_target = target.codes.astype(bool).astype(np.float32)
    best = np.full(pair.target.n_latents, NOBODY, dtype=np.int64)
    for start in range(0, len(best), _BLOCK):
        together = (fired_source.T @ fired_target[:, start : start + _BLOCK]).tocsc()
        owner = np.repeat(np.arange(together.shape[1]), np.diff(together.indptr))
        either = source.n_fired[together.indices] + target.n_fired[start + owner] - together.data
        _keep_best(
            best[start : start + _BLOCK],
            owner,
            together.indices,
            together.data / np.maximum(either, 1),
        )
    return best


def transport(pair: PairData) -> Best:
    """The largest positive cosine after the source's rows went through the ridge map between the
    layers."""
    moved = directions_of(
        pair.source.W_dec.float() @ ridge_map(pair.rows), name="transported source"
    )
    return match(moved, pair.target_directions, k=1).predecessors.index[:, 0].cpu().numpy()


def distribution(pair: PairData) -> Best:
    """The most similar mean hidden state at the target's site, weighted by activation and without
    the common mean."""
    means = [
        _weighted_means(sae, pair, side) for side, sae in enumerate((pair.source, pair.target))
    ]
    found = match(
        directions_of(means[0], name="source"), directions_of(means[1], name="target"), k=1
    )
    return found.predecessors.index[:, 0].cpu().numpy()


SHARED = "shared"
MATCHERS: dict[str, Matcher] = {
    SHARED: shared,
    "cosine": cosine,
    "permutation": permutation,
    "pearson": pearson,
    "jaccard": jaccard,
    "transport": transport,
    "distribution": distribution,
}


def matcher_named(name: str) -> Matcher:
    """One of MATCHERS, or of another package (entry point group `featureflow.matchers`). Raises
    UserError."""
    known = {**plugins("matchers"), **MATCHERS}
    if name not in known:
        raise UserError(
            f"there is no matcher {name!r}", where="link.matcher", expected=", ".join(known)
        )
    return known[name]


def ridge_map(
    rows: Rows, *, ridges: Sequence[float] = RIDGES
) -> Float[Tensor, "d_source d_target"]:
    """The matrix M with x_target − mean ≈ (x_source − mean) M. Of the strengths in `ridges` the one
    with the smallest error on every fifth batch is taken; when there is only one batch, the middle
    one. Raises UserError without rows."""
    fitted, tested = _Moments(), _Moments()
    for number, (left, right) in enumerate(rows()):
        (tested if number % 5 == 4 else fitted).add(left, right)
    if not fitted.n:
        raise UserError("a map between layers needs activations", found="no rows")
    if not tested.n:
        return fitted.solve(ridges[len(ridges) // 2]).float()
    best = min(ridges, key=lambda ridge: tested.error(fitted, fitted.solve(ridge)))
    return (fitted + tested).solve(best).float()


def compare_matchers(
    pair: PairData,
    judge: tuple[Codes, Codes],
    matchers: Mapping[str, Matcher] | None = None,
    *,
    few: int = FEW_FIRINGS,
) -> tuple[pd.DataFrame, dict[str, Best]]:
    """All matchers on the same targets: those that fired at least `few` times on the tokens of
    `judge` (codes of source and target there). Returns one row a matcher, and what each matched.

    `n_targets`, `matched_share`, `n_sources` (distinct), `same_as_cosine`, and over targets, a
    missing partner counting 0: `pearson_median`, `pearson_mean`, `jaccard_mean`, `fires_too`
    (P(source fires | target fires)), `cosine_mean`."""
    chosen = matchers or MATCHERS
    best = {name: matcher(pair) for name, matcher in chosen.items()}
    source, target = judge
    judged = np.flatnonzero(target.n_fired >= few)
    by_cosine = best.get("cosine", cosine(pair))[judged]
    rows = []
    for name, index in best.items():
        here = index[judged]
        firing = _firing_of(source, target, here, judged)
        rows.append(
            {
                "matcher": name,
                "n_targets": len(judged),
                "matched_share": _mean(here != NOBODY),
                "n_sources": len(np.unique(here[here != NOBODY])),
                "same_as_cosine": _mean(here == by_cosine),
                "pearson_median": float(np.median(firing["pearson"]))
                if len(judged)
                else float("nan"),
                "pearson_mean": _mean(firing["pearson"]),
                "jaccard_mean": _mean(firing["jaccard"]),
                "fires_too": _mean(firing["fires_too"]),
                "cosine_mean": _mean(_cosine_of(pair, here, judged)),
            }
        )
    return pd.DataFrame(rows), best


def _firing_of(
    source: Codes, target: Codes, index: Best, judged: Int64[np.ndarray, "judged"]
) -> dict[str, np.ndarray]:
    """Correlation, overlap and P(source fires | target fires) per judged target; 0 without a
    partner."""
    has: Bool[np.ndarray, "judged"] = index != NOBODY
    links = (index[has], judged[has])
    found = compare_firing(source, target, links, rng=np.random.default_rng(0), n_chance=0).links
    together = (
        found.jaccard
        * (source.n_fired[links[0]] + target.n_fired[links[1]])
        / (1.0 + found.jaccard)
    )
    values = {name: np.zeros(len(judged)) for name in ("pearson", "jaccard", "fires_too")}
    values["pearson"][has], values["jaccard"][has] = found.pearson, found.jaccard
    values["fires_too"][has] = together / np.maximum(target.n_fired[links[1]], 1)
    return values


def _cosine_of(
    pair: PairData, index: Best, judged: Int64[np.ndarray, "judged"]
) -> Float[np.ndarray, "judged"]:
    left = pair.source_directions.unit[torch.from_numpy(np.maximum(index, 0))]
    right = pair.target_directions.unit[torch.from_numpy(judged)]
    if left.shape[1] != right.shape[1]:
        return np.full(len(index), np.nan)
    values = torch.einsum("nd,nd->n", left, right).cpu().numpy()
    return np.where(index == NOBODY, 0.0, values)


def _mean(values: np.ndarray) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


def _keep_best(best: Best, owner: np.ndarray, index: np.ndarray, value: np.ndarray) -> None:
    """Write each owner's index of the largest positive value; ties to the lower index."""
    order = np.lexsort((index, -value, owner))
    order = order[value[order] > 0]
    owners, first = np.unique(owner[order], return_index=True)
    best[owners] = index[order[first]]


def _weighted_means(sae: Sae, pair: PairData, side: int) -> Float[Tensor, "latent d_target"]:
    """Σ z x / Σ z over tokens, minus the mean of x; x is the target site's activation. Zero for
    silent latents."""
    total = np.zeros((sae.n_latents, pair.target.d_in))
    weight, common, n = np.zeros(sae.n_latents), np.zeros(pair.target.d_in), 0
    for batch in pair.rows():
        found = sae.encode_sparse(batch[side])
        value, index = found.value.float().cpu().numpy(), found.index.cpu().numpy()
        token = np.repeat(np.arange(len(value)), value.shape[1])
        z = sparse.csr_matrix(
            (value.ravel(), (token, index.ravel())), shape=(len(value), sae.n_latents)
        )
        x = batch[1].double().cpu().numpy()
        total += z.T @ x
        weight += np.asarray(z.sum(axis=0)).ravel()
        common, n = common + x.sum(0), n + len(x)
    if not n:
        raise UserError("matching by activations needs activations", found="no rows")
    means = total / np.maximum(weight, 1e-30)[:, None] - common / n
    return torch.from_numpy(np.where(weight[:, None] > 0, means, 0.0)).float()


class _Moments:
    """Sums that a ridge regression needs, grown batch by batch in float64."""

    def __init__(self) -> None:
        self.n = 0
        self.sums: tuple[Tensor, ...] = ()

    def add(
        self, left: Float[Tensor, "token d_source"], right: Float[Tensor, "token d_target"]
    ) -> None:
        x, y = left.double(), right.double()
        here = (x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum())
        self.sums = (
            tuple(a + b for a, b in zip(self.sums, here, strict=True)) if self.sums else here
        )
        self.n += len(x)

    def __add__(self, other: _Moments) -> _Moments:
        both = _Moments()
        both.n = self.n + other.n
        both.sums = tuple(a + b for a, b in zip(self.sums, other.sums, strict=True))
        return both

    def solve(self, ridge: float) -> Float[Tensor, "d_source d_target"]:
        x, y, xx, xy, _ = self.sums
        covariance = xx / self.n - torch.outer(x, x) / self.n**2
        cross = xy / self.n - torch.outer(x, y) / self.n**2
        strength = ridge * covariance.diagonal().mean().clamp_min(1e-30)
        return torch.linalg.solve(covariance + strength * torch.eye(len(x), dtype=x.dtype), cross)

    def error(self, fitted: _Moments, mapping: Float[Tensor, "d_source d_target"]) -> float:
        """Σ‖(x − x̄) M + ȳ − y‖² over these rows, means and M from `fitted`."""
        x, y, xx, xy, yy = self.sums
        shift = fitted.sums[1] / fitted.n - fitted.sums[0] / fitted.n @ mapping
        squares = (mapping * (xx @ mapping)).sum() + self.n * shift.square().sum() + yy
        return float(
            squares + 2 * (x @ mapping @ shift) - 2 * (mapping * xy).sum() - 2 * (y @ shift)
        )
