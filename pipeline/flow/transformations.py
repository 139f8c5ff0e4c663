"""Two dictionaries → which features of one are mixtures of several features of the other: splits,
merges and recombinations.

A link names one predecessor. A direction that is made of two has two middling cosines and no good
one. So each unit row of one side is built up from rows of the other, one at a time:

1. The source nearest to what is still unexplained of the target joins, if its cosine with that rest
   is beyond chance: the siblings null (siblings.py) of the *rests* of all targets, so that what
   relatives share explains nothing. With activations the source must also be active with the
   target more than a source of its density is. p is the larger; Benjamini and Hochberg over the
   targets that got so far.
2. Weights are refitted by least squares; a source that makes one of them negative is refused.
3. At most `most` sources; `explained_share` is 1 − ‖rest‖² of the unit row.

The same the other way round says which targets a source is made of. Then

    merge       several sources, and each of them goes into this target only
    split       one source, which is itself made of several targets
    recombined  several sources, of which at least one is itself made of several targets; and the
                other targets of such a source. A rotation in a plane looks like this, because a
                negative part is not looked for.

Cost: for each step and way the decoys of one linking of the pair. Source: non-negative orthogonal
matching pursuit (Bruckstein et al. 2008), with a null for each step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from featureflow.statistics import p_values, q_values
from pipeline.flow.directions import Directions
from pipeline.flow.functional import Codes, agreement, chance_pairs
from pipeline.flow.match import full_precision
from pipeline.flow.null import NullSampler, Siblings

MOST = 5
MERGE, SPLIT, RECOMBINED = "merge", "split", "recombined"


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixtures:
    """For each row of one side its accepted parts of the other, in the order they joined (−1), with
    weights; and the share of the unit row that they explain."""

    part: Int64[np.ndarray, "row step"]
    weight: Float[np.ndarray, "row step"]
    explained: Float[np.ndarray, "row"]

    @property
    def n_parts(self) -> Int64[np.ndarray, "row"]:
        return (self.part >= 0).sum(axis=1)


def mixtures_of(
    target: Directions,
    source: Directions,
    *,
    codes: tuple[Codes, Codes] | None = None,
    fdr: float = 0.05,
    most: int = MOST,
    n_null: int = 4096,
    seed: int = 0,
) -> Mixtures:
    """Each target row as a mixture of source rows; `codes` are those of target and source on the
    same tokens."""
    n = target.n_latents
    part, weight = np.full((n, most), -1), np.zeros((n, most))
    rest, going = target.unit.clone(), target.usable.cpu().numpy().copy()
    rng = np.random.default_rng(seed)
    with full_precision(), torch.no_grad():
        for step in range(most):
            chosen, p = _next(rest, going, source, part, step, n_null, seed)
            if codes is not None:
                p = np.maximum(p, _active_together(codes, chosen, part, going, rng, n_null))
            joins = going & (q_values(p, p[going]) <= fdr)
            part[joins, step] = chosen[joins]
            fitted = _weights(target.unit, source.unit, part[:, : step + 1], joins)
            refused = joins & (fitted <= 0).any(axis=1, where=part[:, : step + 1] >= 0)
            part[refused, step] = -1
            going = joins & ~refused
            weight[going, : step + 1] = fitted[going]
            if not going.any():
                break
            rest[going] = _rest(target.unit, source.unit, part, weight, going)
    explained = 1 - rest.square().sum(1).double().cpu().numpy()
    return Mixtures(part=part, weight=weight, explained=np.where(part[:, 0] >= 0, explained, 0.0))


def transformations_of(backward: Mixtures, forward: Mixtures) -> pd.DataFrame:
    """One row a target and source that belong to a transformation: `kind, target_latent,
    source_latent, weight, explained_share`. `backward` are targets made of sources, `forward`
    sources made of targets."""
    rows = []
    several = forward.n_parts >= 2
    for target in np.flatnonzero(backward.n_parts >= 2):
        sources = backward.part[target][backward.part[target] >= 0]
        kind = RECOMBINED if several[sources].any() else MERGE
        for source, weight in zip(sources, backward.weight[target], strict=False):
            rows.append((kind, target, source, weight, backward.explained[target]))
    for source in np.flatnonzero(several):
        targets = forward.part[source][forward.part[source] >= 0]
        alone = [t for t in targets if backward.n_parts[t] == 1 and backward.part[t, 0] == source]
        kind = RECOMBINED if (backward.n_parts[targets] >= 2).any() else SPLIT
        if kind == RECOMBINED or len(alone) >= 2:
            for target, weight in zip(targets, forward.weight[source], strict=False):
                if target in alone:
                    rows.append((kind, target, source, weight, forward.explained[source]))
    names = ["kind", "target_latent", "source_latent", "weight", "explained_share"]
    return pd.DataFrame(rows, columns=names)


def _next(
    rest: Float[Tensor, "target d_model"],
    going: Bool[np.ndarray, "target"],
    source: Directions,
    part: np.ndarray,
    step: int,
    n_null: int,
    seed: int,
) -> tuple[Int64[np.ndarray, "target"], Float[np.ndarray, "target"]]:
    """The source nearest to what is left of each target, and how often chance is as near."""
    length = torch.linalg.vector_norm(rest, dim=1, keepdim=True)
    unit = rest / length.clamp_min(1e-12)
    usable = torch.from_numpy(going).to(rest.device) & (length[:, 0] > 1e-6)
    living = unit * usable[:, None]
    left = Directions(
        unit=living, reads=living, usable=usable, n_duplicates=0, mean_share=0.0, warnings=()
    )
    cosine = left.unit @ source.unit.T
    cosine[:, ~source.usable] = -1.0
    for earlier in part[:, :step].T:
        has = np.flatnonzero(earlier >= 0)
        cosine[has, earlier[has]] = -1.0
    best, chosen = (x.cpu().numpy() for x in cosine.max(dim=1))
    p = np.ones(len(best))
    if usable.sum() >= 16:  # fewer have no siblings to tell their own part from
        sample = NullSampler(choice=Siblings(n_sources=0), n=n_null).sample(
            source, left, torch.Generator().manual_seed(seed + step)
        )
        own = np.flatnonzero(usable.cpu().numpy() & (best > 0))
        p[own] = sample.p_values(best[own], own)
    return chosen, p


def _active_together(
    codes: tuple[Codes, Codes],
    chosen: Int64[np.ndarray, "target"],
    part: Int64[np.ndarray, "target step"],
    going: Bool[np.ndarray, "target"],
    rng: np.random.Generator,
    n: int,
) -> Float[np.ndarray, "target"]:
    """How often sources of the same density, no parts of the target, are active with it as much as
    the chosen one."""
    target, source = codes
    own = np.flatnonzero(going)
    left, right = chance_pairs(source, (chosen[own], own), rng=rng, n=n)
    stranger = (part[right] != left[:, None]).all(axis=1)
    p = np.ones(len(chosen))
    found = agreement(source, target, chosen[own], own)
    p[own] = p_values(found, agreement(source, target, left[stranger], right[stranger]))
    return p


def _weights(
    rows: Tensor, parts: Tensor, part: Int64[np.ndarray, "row step"], wanted: np.ndarray
) -> Float[np.ndarray, "row step"]:
    """Least squares of the wanted rows on their parts; zeros elsewhere."""
    found = np.zeros(part.shape)
    for row in np.flatnonzero(wanted):
        has = part[row] >= 0
        basis = parts[torch.from_numpy(part[row][has])]
        gram = (basis @ basis.T).double().cpu().numpy()
        found[row, has] = np.linalg.lstsq(gram, (basis @ rows[row]).double().cpu().numpy())[0]
    return found


def _rest(
    rows: Tensor, parts: Tensor, part: np.ndarray, weight: np.ndarray, wanted: np.ndarray
) -> Float[Tensor, "wanted d_model"]:
    own = parts[torch.from_numpy(np.maximum(part[wanted], 0))]
    scale = torch.from_numpy(np.where(part[wanted] >= 0, weight[wanted], 0.0)).to(own)
    return rows[torch.from_numpy(wanted)] - torch.einsum("rs,rsd->rd", scale, own)
