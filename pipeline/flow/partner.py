"""A pair of dictionaries → which source each target shares most with, and what would be left of it.

A target whose partner is missing is still near its partner's siblings, active on some of their
tokens, and beyond any null that knows of no partner. What a link must beat is what is left when the
partner is taken away:

1. Two latents share what they *read* of each other (`match.reading`: an encoder tells a feature
   from its siblings, which a decoder's cosine does not). Where there are held-out tokens they are
   compared a second time by the geometric mean of that and the correlation of their activations.
2. The source that a target shares most with is taken away, and with it the copies of that source:
   those with a cosine above `SAME`, and those active with it (correlation of at least `TOGETHER`),
   for two latents that are active together are one feature, whatever their directions. The best of
   those that are left is the target's rival.
3. A link's p-value is its place among the rivals of targets that have a partner (judge.py). By
   activity a source counts for one target only, the one it shares most with, and for targets that
   are active with that one: a stand-in has a partner of its own.

On SmolLM2 no classifier over cosine, reading, correlation and their margins tells a partner from
its siblings better than the reading alone; in the world `compiled`, copies by activity and the
correlation matter too (docs/log.md). A target that two sources share equally has no partner.
Cost: three products of [target, d_model] × [d_model, source], and the correlations of
`N_CANDIDATES` sources a target.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipeline.flow.directions import Directions
from pipeline.flow.edges import EdgeColumns
from pipeline.flow.functional import Codes, agreement
from pipeline.flow.match import best_readings, match, reading
from pipeline.flow.siblings import SAME

N_NEAREST = 8
"""Sources of a target, by cosine, of which one is proposed as its partner."""
N_CANDIDATES = 16
"""Sources of a target, by reading, among which its rival is looked for."""
TOGETHER = 0.99
"""Correlation of the activations of two latents of one SAE from which they count as one feature:
always active together. At 0.7 to 0.95 siblings count as one whose SAE hardly tells them apart, and
up to nine in ten links between planted clusters are false (tests/pipeline/flow/test_partner.py)."""
CodePair = tuple[Codes, Codes]


def most_shared(
    source: Directions, target: Directions, codes: CodePair | None, *, tile: int = 2048
) -> Int64[np.ndarray, "target"]:
    """Of the nearest sources of each target by cosine the one that it shares most with; without
    tokens the nearest. -1 for a target without one."""
    k = 1 if codes is None else min(N_NEAREST, source.n_latents)
    near = match(source, target, k=k, tile=tile).predecessors.index
    place = _shared(source, target, codes, near).argmax(1, keepdim=True)
    return near.gather(1, place)[:, 0].cpu().numpy()


def stand_ins(
    source: Directions,
    target: Directions,
    codes: CodePair | None,
    edges: EdgeColumns,
    *,
    tile: int = 2048,
) -> Iterator[tuple[Float[np.ndarray, "edge"], Float[np.ndarray, "target"]]]:
    """What the ends of each edge share, and what each target shares with its rival (steps 1 and 2):
    by reading, then, where there are tokens, by reading and activity."""
    left, right = (torch.from_numpy(x).to(source.unit.device) for x in (edges.source, edges.target))
    near = best_readings(source, target, k=min(N_CANDIDATES, source.n_latents), tile=tile).index
    for used in (None, codes)[: 1 if codes is None else 2]:
        shared = _pairs(source, target, used, left, right)
        left_over = _rivals(source, _shared(source, target, used, near), near, codes)
        if used is not None:
            shared = torch.where(_preferred(edges, shared, used[1]), shared, 0.0)
        yield shared.double().cpu().numpy(), left_over.double().cpu().numpy()


def _preferred(
    edges: EdgeColumns, shared: Float[Tensor, "edge"], target: Codes
) -> Bool[Tensor, "edge"]:
    """Whether the source shares most with this target, or with one that is active with it, among
    the targets that chose the source. A stand-in shares more with a target of its own."""
    chose = np.flatnonzero(edges.top)
    chose = chose[shared[chose].argsort().cpu().numpy()]
    best = np.full(edges.source.max(initial=0) + 1, -1)
    best[edges.source[chose]] = edges.target[chose]
    other = best[edges.source]
    same = other == edges.target
    near = np.flatnonzero(~same & (other >= 0))
    same[near] = agreement(target, target, other[near], edges.target[near]) >= TOGETHER
    return torch.from_numpy(same).to(shared.device)


def _rivals(
    source: Directions,
    shared: Float[Tensor, "target k"],
    index: Int64[Tensor, "target k"],
    codes: CodePair | None,
) -> Float[Tensor, "target"]:
    """What each target shares with the best source but the first and that one's copies."""
    shared, order = shared.sort(dim=1, descending=True)
    index = index.gather(1, order).clamp_min(0)
    first = index[:, :1].expand_as(index)
    copy = (source.unit[index] * source.unit[first]).sum(2) > SAME
    if codes is not None:
        copy |= _correlation((codes[0], codes[0]), first, index) >= TOGETHER
    copy[:, 0] = True
    found = torch.where(copy, -1.0, shared).amax(1)
    if index.shape[1] < source.n_latents:  # copies as far as was looked: the rest is no better
        found = torch.where(found < 0, shared[:, -1], found)
    return found.clamp_min(0)


def _shared(
    source: Directions, target: Directions, codes: CodePair | None, index: Int64[Tensor, "target k"]
) -> Float[Tensor, "target k"]:
    """What each target shares with some sources; -1 where there is no source."""
    here = torch.arange(len(index), device=index.device)[:, None].expand_as(index)
    shared = _pairs(source, target, codes, index.clamp_min(0).flatten(), here.flatten())
    return torch.where(index >= 0, shared.reshape(index.shape), -1.0)


def _pairs(
    source: Directions,
    target: Directions,
    codes: CodePair | None,
    left: Int64[Tensor, "pair"],
    right: Int64[Tensor, "pair"],
) -> Float[Tensor, "pair"]:
    shared = reading(source, target, left, right)
    return shared if codes is None else (shared * _correlation(codes, left, right)).sqrt()


def _correlation(
    codes: CodePair, left: Int64[Tensor, "*pair"], right: Int64[Tensor, "*pair"]
) -> Float[Tensor, "*pair"]:
    """Positive correlations of activations of (source, target) latents."""
    ends = [end.reshape(-1).cpu().numpy() for end in (left, right)]
    found = torch.from_numpy(agreement(*codes, *ends)).clamp_min(0).float()
    return found.reshape(left.shape).to(left.device)
