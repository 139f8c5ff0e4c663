"""A pair of dictionaries → how near each target would come to a source if its partner were not
there.

Real dictionaries have siblings: rows that share most of their direction. A target whose partner is
missing still has a high cosine with its partner's siblings, and a null that ignores them calls that
a link. Here every target has a null of its own:

1. What a target shares with its siblings is its projection on the `n_common` leading directions of
   the target dictionary, plus the ridge regression of the rest on its nearest rows: those of its
   own dictionary, and sources beyond its two nearest (which may be its partner, or two parents).
   Rows with a cosine above `SAME` to the target or to its nearest source are the same feature and
   take no part.
2. The rest is the target's own part. A decoy keeps what is shared and replaces the own part: by
   that of another target, with random signs in the eigenbasis of all own parts, at the own length.
   Spectrum, mean, strong directions and clusters stay; the feature does not.
3. The best cosine of each of `n_decoys` decoys with the sources gives the target's expected best
   cosine without a partner (`centre`) and its spread (`scale`, half of its own and half of all).
4. The pooled sample holds each decoy's best cosine in the same units, judged by its target's other
   decoys. A link's p-value is its place in that sample.

Cost: `n_decoys` matches of the pair, one [target, target] product, and one small linear system per
target. On planted dictionaries (clusters, steep spectra, huge directions, a common mean; 64 to 512
dimensions) the realised false-discovery rate stays near the nominal one, where a rotation null
gives up to 90 % (tests/pipeline/flow/test_siblings.py). The idea is that of knockoffs (Barber and
Candès 2015, arXiv 1404.5609) and of target-decoy competition (Elias and Gygi 2007).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.flow.directions import Directions
from pipeline.flow.match import best_cosines, full_precision

SAME = 0.9
"""Cosine of two rows of one dictionary from which they count as one feature."""
MOST_NEIGHBOURS = 64
PARTNERS = 2
"""The nearest sources of a target that are not regressed on."""
RIDGE = 0.1
_BLOCK = 1024


def sibling_sample(
    source: Directions,
    target: Directions,
    *,
    n_decoys: int,
    n_sources: int,
    generator: torch.Generator,
    tile: int = 2048,
) -> tuple[
    Float[np.ndarray, "sample"], Float[np.ndarray, "target"], Float[np.ndarray, "target"],
    Float[np.ndarray, "decoy target"],
]:  # fmt: skip
    """The pooled sample in units of `scale` above `centre`, then `centre` and `scale` of every
    target latent (NaN for those without a direction), then the decoys' best cosines. Raises
    ValueError for fewer than three decoys."""
    if n_decoys < 3:
        raise ValueError("three decoys are the fewest that tell a spread")
    rows = target.unit[target.usable]
    with full_precision(), torch.no_grad():
        sources = source.unit[source.usable]
        made = iter_decoys(rows, sources, n=n_decoys, n_sources=n_sources, generator=generator)
        best = torch.stack([best_cosines(decoy, source, tile=tile) for decoy in made]).double()
    sample, centre, scale = _in_units(best)
    usable = target.usable.cpu().numpy()
    whole = np.full((2, target.n_latents), np.nan)
    whole[0, usable], whole[1, usable] = centre.cpu().numpy(), scale.cpu().numpy()
    return sample.flatten().cpu().numpy(), whole[0], whole[1], best.cpu().numpy()


def iter_decoys(
    rows: Float[Tensor, "target d_model"],
    sources: Float[Tensor, "source d_model"],
    *,
    n: int,
    n_sources: int,
    generator: torch.Generator,
) -> Iterator[Float[Tensor, "target d_model"]]:
    """`n` times, one unit decoy for each of the unit `rows`; `n_sources` of the sources count as
    siblings."""
    shared = shared_with_siblings(rows, sources, n_sources=n_sources)
    own = rows - shared
    length = torch.linalg.vector_norm(own, dim=1, keepdim=True)
    # NumPy's eigh is several times faster than torch's on CPUs
    basis = torch.from_numpy(np.linalg.eigh((own.T @ own).cpu().numpy())[1]).to(rows)
    inside = own @ basis
    for _ in range(n):
        donor = torch.randint(len(rows), (len(rows),), generator=generator).to(rows.device)
        signs = torch.randint(2, rows.shape, generator=generator).to(rows) * 2 - 1
        other = (inside[donor] * signs) @ basis.T
        fresh = length * other / _lengths(other)
        yield (shared + fresh) / _lengths(shared + fresh)


def shared_with_siblings(
    rows: Float[Tensor, "target d_model"],
    sources: Float[Tensor, "source d_model"],
    *,
    n_sources: int,
) -> Float[Tensor, "target d_model"]:
    """The part of each unit row that the others account for (step 1)."""
    n, d_model = rows.shape
    n_common = min(d_model // 8, n // 8)
    moment = (rows.T @ rows).cpu().numpy()
    leading = torch.from_numpy(np.linalg.eigh(moment)[1][:, d_model - n_common :].copy()).to(rows)
    common = rows @ leading @ leading.T
    rest, across = rows - common, sources - sources @ leading @ leading.T
    unit, across = rest / _lengths(rest), across / _lengths(across)
    parts = []
    for span in (slice(i, min(i + _BLOCK, n)) for i in range(0, n, _BLOCK)):
        own = _nearest_others(unit, rows, span)
        other = _nearest_sources(unit[span], across, sources, n_sources)
        parts.append(_regressed(rest[span], torch.cat([own, other], 1)))
    return common + torch.cat(parts)


def _nearest_others(unit: Tensor, rows: Tensor, span: slice) -> Float[Tensor, "span near d_model"]:
    """The nearest rows of the same dictionary, without copies of the row."""
    n, d_model = rows.shape
    nearness = unit[span] @ unit.T
    nearness[rows[span] @ rows.T > SAME] = -2.0  # the row itself, and copies of it
    found = nearness.topk(max(0, min(MOST_NEIGHBOURS, d_model // 8, (n - 1) // 4)), dim=1)
    return unit[found.indices] * (found.values > -2.0)[:, :, None]


def _nearest_sources(
    unit: Tensor, across: Tensor, sources: Tensor, most: int
) -> Float[Tensor, "span near d_model"]:
    """The nearest sources, without the first two and copies of the first."""
    n, d_model = sources.shape
    k = max(0, min(most, d_model // 16, (n - PARTNERS) // 4))
    found = (unit @ across.T).topk(min(k + PARTNERS, n), dim=1).indices
    first = sources[found[:, :1]]
    copies = (sources[found] * first).sum(2) > SAME
    return (across[found] * ~copies[:, :, None])[:, PARTNERS:]


def _regressed(rest: Tensor, neighbours: Tensor) -> Float[Tensor, "span d_model"]:
    """Ridge regression of each row on its neighbours."""
    gram = neighbours @ neighbours.mT
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE)
    weight = torch.linalg.solve(gram, neighbours @ rest[:, :, None])
    return (weight.mT @ neighbours)[:, 0]


def _in_units(best: Float[Tensor, "decoy target"]) -> tuple[Tensor, Tensor, Tensor]:
    """Each decoy judged by its target's others; `centre` and `scale` by all of a target's."""
    n = len(best)
    centre = best.mean(0)
    deviation = (best - centre) ** 2
    pooled = deviation.sum(0).mean() / (n - 1)
    scale = ((deviation.sum(0) / (n - 1) + pooled) / 2).sqrt()
    others = (best.sum(0) - best) / (n - 1)
    spread = (deviation.sum(0) - deviation * n / (n - 1)).clamp_min(0) / (n - 2)
    # one value against the mean of n - 1 varies more than one against the mean of n
    widening = math.sqrt((1 + 1 / n) / (1 + 1 / (n - 1)))
    sample = (best - others) / ((spread + pooled) / 2).sqrt().clamp_min(1e-12) * widening
    return sample, centre, scale.clamp_min(1e-12)


def _lengths(rows: Tensor) -> Float[Tensor, "row 1"]:
    return torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-12)
