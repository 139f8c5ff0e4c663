"""A finished survey → the columns of the feature cards of one site, one array per column over all
latents.

Names, dtypes and meanings are those of docs/decisions/0003-atlas-shards.md, so that a card shard is
a slice of these. Cost: sorts of the (latent, token) pairs, and one product of `latent × latent ×
d_model` for the nearest decoder rows.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from pipeline.describe.corpus import Corpus
from pipeline.describe.counts import Counts
from pipeline.describe.encoder import threshold_of
from pipeline.describe.examples import Examples, Profile, choose_examples, deciles_of
from pipeline.describe.projection import Projection
from pipeline.describe.survey import Survey
from sae import Sae

PAGE_BINS = 64
PAD = 0xFFFFFFFF
"""Fills a list of ids that is shorter than its column."""
N_TOKENS, N_AROUND, N_NEAREST = 12, 8, 8
_BLOCK = 512

Columns = dict[str, np.ndarray]


def describe_site(
    survey: Survey, sae: Sae, corpus: Corpus, projection: Projection | None, profile: Profile
) -> Columns:
    """All columns of the site's cards. `projection` is None where the decoder does not write to the
    residual stream."""
    deciles, tables = deciles_of(survey), survey.tables(corpus)
    return {
        **_moments(survey),
        "decile": deciles,
        "threshold": threshold_of(sae),
        "histogram": _page_histogram(survey),
        **_token_columns(tables["token"], corpus, "token", N_TOKENS),
        **_token_columns(tables["previous"], corpus, "previous", N_AROUND),
        **{name: _dense(tables[name]) for name in ("position", "source", "topic")},
        **_projection_columns(projection, sae.n_latents),
        **_cofiring_columns(survey.cofiring, survey.cofiring_count),
        **_similar_columns(sae.W_dec),
        **example_columns(choose_examples(survey, deciles, profile)),
    }


def example_columns(examples: Examples) -> Columns:
    """Examples as the card shards hold them."""
    return {
        "example_offset": examples.offset.astype(np.uint32),
        "example_tab": examples.tab,
        "example_decile": examples.decile,
        "example_row": examples.row.astype(np.uint32),
        "example_value": examples.value,
        "example_gap": examples.gap,
        "act_offset": examples.act_offset.astype(np.uint32),
        "act_at": examples.act_at,
        "act_value": examples.act_value,
    }


def _moments(survey: Survey) -> Columns:
    n = np.maximum(survey.count, 1)
    mean = survey.total / n
    std = np.sqrt(np.maximum(survey.squares / n - mean * mean, 0))
    return {
        "count": survey.count.astype(np.uint32),
        "n_documents": survey.n_documents.astype(np.uint32),
        "mean": mean.astype(np.float32),
        "std": std.astype(np.float32),
        "max": survey.largest,
    }


def _page_histogram(survey: Survey) -> np.ndarray:
    """Two of the pass's bins make one of the page's."""
    n_latents, n_bins = survey.histogram.shape
    return (
        survey.histogram.reshape(n_latents, PAGE_BINS, n_bins // PAGE_BINS)
        .sum(axis=2)
        .astype(np.uint32)
    )


def _dense(table: Counts) -> np.ndarray:
    """Activations per latent and value."""
    out = np.zeros(table.n_latents * table.n_values, dtype=np.uint32)
    out[table.key] = table.n.astype(np.uint32)
    return out.reshape(table.n_latents, table.n_values)


def _token_columns(table: Counts, corpus: Corpus, name: str, n: int) -> Columns:
    """The n values with the largest share of Σa, with their lift over the corpus."""
    mass, active = table.mass, table.n
    total = np.bincount(table.latent, weights=mass, minlength=table.n_latents)
    place, rows = largest_places(table.latent, mass, n)
    latent, value = table.latent[rows], table.value[rows]
    base = corpus.totals(name).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = mass[rows] / total[latent]
        lift = np.log(share / (base[value] / base.sum()))
    shape = (table.n_latents, n)
    columns = {
        name: np.full(shape, PAD, dtype=np.uint32),
        f"{name}_share": np.zeros(shape, dtype=np.float32),
        f"{name}_lift": np.zeros(shape, dtype=np.float32),
        f"{name}_count": np.zeros(shape, dtype=np.uint32),
    }
    for column, values in zip(columns.values(), (value, share, lift, active[rows]), strict=True):
        column[latent, place] = values
    return columns


def largest_places(
    latent: Int64[np.ndarray, "pair"], weight: Float64[np.ndarray, "pair"], n: int
) -> tuple[Int64[np.ndarray, "kept"], Int64[np.ndarray, "kept"]]:
    """The n heaviest pairs of every latent, heaviest first: the place of each, and its index.
    `latent` is ascending; weights of 0 are left out."""
    near = (
        np.flatnonzero(weight >= _nth_largest(latent, weight, n))
        if len(latent)
        else np.zeros(0, np.int64)
    )
    near = near[weight[near] > 0]
    order = near[np.lexsort((-weight[near], latent[near]))]
    owner = latent[order]
    place = np.arange(len(order)) - np.searchsorted(owner, owner)
    return place[place < n], order[place < n]


def _nth_largest(latent: np.ndarray, weight: np.ndarray, n: int) -> Float32[np.ndarray, "pair"]:
    """For every pair a number just below its latent's n-th largest weight (or smallest, with
    fewer): the float32 bits of weights that are not negative sort as they do, so one sort of whole
    numbers finds it."""
    bits = np.nextafter(weight.astype(np.float32), np.float32(0)).view(np.uint32)
    packed = (latent.astype(np.uint64) << np.uint64(32)) | ~bits
    packed.sort()
    start = np.searchsorted(latent, np.arange(int(latent[-1]) + 2))
    nth = np.minimum(start[:-1] + n, start[1:]) - 1
    return (~packed[np.maximum(nth, 0)].astype(np.uint32)).view(np.float32)[latent]


def _projection_columns(projection: Projection | None, n_latents: int) -> Columns:
    if projection is None:
        pad, none = (
            np.full((n_latents, 10), PAD, np.uint32),
            np.full((n_latents, 10), np.nan, np.float32),
        )
        listed = {
            "promotes": pad,
            "promotes_score": none,
            "suppresses": pad,
            "suppresses_score": none,
        }
        return {**listed, "output_kurtosis": np.full(n_latents, np.nan, np.float32)}
    return {
        "promotes": projection.promotes.astype(np.uint32),
        "promotes_score": projection.promotes_score.astype(np.float32),
        "suppresses": projection.suppresses.astype(np.uint32),
        "suppresses_score": projection.suppresses_score.astype(np.float32),
        "output_kurtosis": projection.kurtosis.astype(np.float32),
    }


def _cofiring_columns(cofiring: sp.csr_matrix, count: Int64[np.ndarray, "latent"]) -> Columns:
    """The latents active together with each one, by Jaccard, in the whole dictionary."""
    blocks = []
    for start in range(0, len(count), _BLOCK):
        both = cofiring[start : start + _BLOCK].toarray()
        either = count[start : start + _BLOCK, None] + count[None, :] - both
        jaccard = (both / np.maximum(either, 1)).astype(np.float32)
        own = np.arange(len(jaccard))
        jaccard[own, start + own] = 0
        blocks.append(_largest_of_rows(jaccard))
    return _nearest_columns("cofiring", "cofiring_jaccard", blocks)


def _similar_columns(W_dec: Float[Tensor, "latent d_out"]) -> Columns:
    """The latents whose decoder rows point the same way; rows of zeros have no direction and are
    never listed."""
    unit = F.normalize(W_dec.detach().float(), dim=1, eps=1e-12)
    dead = (unit.square().sum(dim=1) < 0.5).numpy()
    blocks = []
    for start in range(0, len(unit), _BLOCK):
        cosine = (unit[start : start + _BLOCK] @ unit.T).numpy()
        own = np.arange(len(cosine))
        cosine[own, start + own] = 0
        cosine[:, dead] = 0
        blocks.append(_largest_of_rows(cosine))
    return _nearest_columns("similar", "similar_cosine", blocks)


def _largest_of_rows(score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = min(N_NEAREST, score.shape[1])
    index = np.argpartition(score, -n, axis=1)[:, -n:]
    value = np.take_along_axis(score, index, axis=1)
    order = np.argsort(-value, axis=1, kind="stable")
    return np.take_along_axis(index, order, axis=1), np.take_along_axis(value, order, axis=1)


def _nearest_columns(
    name: str, score_name: str, blocks: list[tuple[np.ndarray, np.ndarray]]
) -> Columns:
    index = np.concatenate([b[0] for b in blocks])
    score = np.concatenate([b[1] for b in blocks])
    n_latents = len(index)
    listed = np.full((n_latents, N_NEAREST), PAD, dtype=np.uint32)
    scores = np.zeros((n_latents, N_NEAREST), dtype=np.float32)
    listed[:, : index.shape[1]] = np.where(score > 0, index, PAD)
    scores[:, : index.shape[1]] = np.where(score > 0, score, 0)
    return {name: listed, score_name: scores}
