"""Are linked latents active together? Held-out activations → correlation and overlap of activity
for links and for chance.

1. Every dictionary encodes the same held-out tokens once; the codes are kept sparse (`Codes`).
2. For a pair, Σ z_source·z_target and the number of common activations come from sparse products,
   in blocks of targets, so only latents that are ever active together cost anything.
3. Pearson correlation and Jaccard overlap follow for the links; per target also the best partner by
   correlation.
4. Chance: each link's source is replaced by a source of similar density; the correlations of those
   pairs are the null. A stronger null is the rival: the best correlation of the target with any
   source but the link's own.

Memory: the codes (8 bytes an activation) and one block of the matrix of joint activity. Source:
Feature Flow appendix C.4 (Pearson); Balcells et al., arXiv 2410.08869 (Jaccard).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sparse
from jaxtyping import Float, Int64
from torch import Tensor

from sae import Sae
from sae.kernels.cpu import compiled

FEW_FIRINGS = 10
"""Latents that were active less often take no part in medians: their correlations are mostly
noise."""
_BLOCK = 2048
_PAIRS = 16384


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Latents of one dictionary on the held-out tokens, with their moments."""

    codes: sparse.csc_matrix
    n_fired: Int64[np.ndarray, "latent"]
    mean: Float[np.ndarray, "latent"]
    deviation: Float[np.ndarray, "latent"]

    @property
    def n_tokens(self) -> int:
        return int(self.codes.shape[0])

    @property
    def density(self) -> Float[np.ndarray, "latent"]:
        return self.n_fired / max(self.n_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class Firing:
    """How each of some (source, target) pairs is active together."""

    pearson: Float[np.ndarray, "link"]
    jaccard: Float[np.ndarray, "link"]


@dataclass(frozen=True, kw_only=True)
class BestByFiring:
    """Per target, the source that correlates best: its index (-1: none is active with it), its
    correlation, and that of the runner-up (0 for none)."""

    index: Int64[np.ndarray, "target"]
    pearson: Float[np.ndarray, "target"]
    runner_up: Float[np.ndarray, "target"]

    def rival(
        self, source: Int64[np.ndarray, "link"], target: Int64[np.ndarray, "link"]
    ) -> Float[np.ndarray, "link"]:
        """For each link the largest correlation of its target with any source but the link's
        own."""
        return np.where(self.index[target] == source, self.runner_up[target], self.pearson[target])


@dataclass(frozen=True, kw_only=True)
class Cofiring:
    """What a pair of dictionaries does on common tokens: the given links, chance, and the best
    partners."""

    links: Firing
    chance: Firing
    best: BestByFiring


def encode_tokens(sae: Sae, batches: Iterable[Float[Tensor, "token d_in"]]) -> Codes:
    """Sparse codes of all `batches`."""
    parts = []
    for batch in batches:
        found = sae.encode_sparse(batch)
        value = found.value.float().cpu().numpy()
        token, slot = np.nonzero(value)
        index = found.index.cpu().numpy()[token, slot]
        parts.append(
            sparse.csr_matrix(
                (value[token, slot], (token, index)), shape=(len(value), sae.n_latents)
            )
        )
    return codes_from(
        sparse.vstack(parts) if parts else sparse.csr_matrix((0, sae.n_latents), dtype=np.float32)
    )


def codes_from(matrix: sparse.spmatrix) -> Codes:
    """Moments of a `token × latent` matrix of latents."""
    codes = sparse.csc_matrix(matrix, dtype=np.float32)
    codes.eliminate_zeros()
    n = max(codes.shape[0], 1)
    wide = codes.astype(np.float64)
    mean = np.asarray(wide.sum(axis=0)).ravel() / n
    square = np.asarray(wide.multiply(wide).sum(axis=0)).ravel() / n
    return Codes(
        codes=codes,
        n_fired=np.diff(codes.indptr).astype(np.int64),
        mean=mean,
        deviation=np.sqrt(np.maximum(square - mean**2, 0.0)),
    )


def compare_firing(
    source: Codes,
    target: Codes,
    links: tuple[Int64[np.ndarray, "link"], Int64[np.ndarray, "link"]],
    *,
    rng: np.random.Generator,
    n_chance: int,
) -> Cofiring:
    """Correlations of the links (source latents, target latents), of `n_chance` chance pairs, and
    the best partners."""
    chosen = chance_pairs(source, links, rng=rng, n=n_chance)
    n_links = len(links[0])
    asked_source = np.concatenate([links[0], chosen[0]])
    asked_target = np.concatenate([links[1], chosen[1]])
    pearson, jaccard = np.zeros(len(asked_source)), np.zeros(len(asked_source))
    best_index = np.full(target.codes.shape[1], -1, dtype=np.int64)
    best_pearson, runner_up = np.zeros(target.codes.shape[1]), np.zeros(target.codes.shape[1])
    for start in range(0, target.codes.shape[1], _BLOCK):
        block = np.arange(start, min(start + _BLOCK, target.codes.shape[1]))
        here = np.flatnonzero((asked_target >= block[0]) & (asked_target <= block[-1]))
        products, common = _products(source, target, block)
        pearson[here], jaccard[here] = _at(
            source, target, products, common, asked_source[here], asked_target[here], block[0]
        )
        best_index[block], best_pearson[block], runner_up[block] = _best(
            source, target, products, block
        )
    return Cofiring(
        links=Firing(pearson=pearson[:n_links], jaccard=jaccard[:n_links]),
        chance=Firing(pearson=pearson[n_links:], jaccard=jaccard[n_links:]),
        best=BestByFiring(index=best_index, pearson=best_pearson, runner_up=runner_up),
    )


def agreement(
    source: Codes, target: Codes, left: Int64[np.ndarray, "pair"], right: Int64[np.ndarray, "pair"]
) -> Float[np.ndarray, "pair"]:
    """Correlation of activations of chosen pairs of latents on the same tokens; 0 where one of the
    two never varies."""
    found = np.zeros(len(left))
    for part in (slice(i, i + _PAIRS) for i in range(0, len(left), _PAIRS)):
        a, b = left[part], right[part]
        product = source.codes[:, a].multiply(target.codes[:, b]).sum(axis=0)
        found[part] = _pearson(source, target, np.asarray(product, np.float64).ravel(), a, b)
    return found


def chance_pairs(
    source: Codes,
    links: tuple[np.ndarray, np.ndarray],
    *,
    rng: np.random.Generator,
    n: int,
    window: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """`n` pairs of a link's target with another source of nearly the density of the link's own
    source."""
    n_sources = len(source.n_fired)
    if not len(links[0]) or n_sources < 2:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    drawn = rng.integers(len(links[0]), size=n)
    order = np.argsort(source.n_fired, kind="stable")
    place = np.empty(n_sources, dtype=np.int64)
    place[order] = np.arange(n_sources)
    reach = min(window, n_sources - 1)
    low = np.clip(place[links[0][drawn]] - reach // 2, 0, n_sources - 1 - reach)
    step = rng.integers(reach, size=n)
    other = low + step
    other += other >= place[links[0][drawn]]
    return order[other], links[1][drawn]


def _products(
    source: Codes, target: Codes, block: np.ndarray
) -> tuple[sparse.csc_matrix, sparse.csc_matrix]:
    right = target.codes[:, block]
    on_left, on_right = source.codes.astype(bool), right.astype(bool)
    products = (source.codes.T @ right).tocsc()
    common = (on_left.astype(np.float32).T @ on_right.astype(np.float32)).tocsc()
    return products, common


def _at(
    source: Codes,
    target: Codes,
    products: sparse.csc_matrix,
    common: sparse.csc_matrix,
    left: np.ndarray,
    right: np.ndarray,
    offset: int,
) -> tuple[np.ndarray, np.ndarray]:
    if not len(left):
        return np.zeros(0), np.zeros(0)
    together = np.asarray(common[left, right - offset]).ravel()
    either = source.n_fired[left] + target.n_fired[right] - together
    total = np.asarray(products[left, right - offset], dtype=np.float64).ravel()
    return _pearson(source, target, total, left, right), together / np.maximum(either, 1)


def _best(
    source: Codes, target: Codes, products: sparse.csc_matrix, block: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Index and correlation of the best source of each target of the block, and the correlation of
    the second best."""
    index, (best, second) = np.full(len(block), -1, dtype=np.int64), np.zeros((2, len(block)))
    _two_best(
        products.indptr,
        products.indices,
        products.data,
        max(source.n_tokens, 1),
        source.mean,
        source.deviation,
        target.mean[block],
        target.deviation[block],
        index,
        best,
        second,
    )
    return index, best, second


@compiled()
def _two_best(
    start: np.ndarray,
    source: np.ndarray,
    total: np.ndarray,
    n_tokens: int,
    source_mean: np.ndarray,
    source_deviation: np.ndarray,
    target_mean: np.ndarray,
    target_deviation: np.ndarray,
    index: np.ndarray,
    best: np.ndarray,
    second: np.ndarray,
) -> None:
    """The two largest of `_pearson` of each target's pairs, `start[t] … start[t + 1]`, that are
    above 0. Of equal ones the first source is the best."""
    for t in range(len(start) - 1):
        for e in range(start[t], start[t + 1]):
            s = source[e]
            scale = source_deviation[s] * target_deviation[t]
            if not scale > 0:
                continue
            covariance = np.float64(total[e]) / n_tokens - source_mean[s] * target_mean[t]
            pearson = covariance / scale
            if pearson > best[t] or (pearson == best[t] and s < index[t]):
                second[t], best[t], index[t] = best[t], pearson, s
            elif pearson > second[t]:
                second[t] = pearson


def _pearson(
    source: Codes, target: Codes, total: np.ndarray, left: np.ndarray, right: np.ndarray
) -> np.ndarray:
    """Correlation from Σ z_source·z_target; 0 where one of the two never varies."""
    covariance = total / max(source.n_tokens, 1) - source.mean[left] * target.mean[right]
    scale = source.deviation[left] * target.deviation[right]
    return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)
