"""A pair of dictionaries and their links → does a link mean this source, or would another do?

A target whose partner is missing is still near its partner's siblings, active on some of their
tokens, and beyond any null that knows of no partner. What a link must beat is what is left when the
partner is taken away:

1. Two latents are compared by what they *read* of each other (`match.reading`): an encoder tells a
   feature from its siblings, which a decoder's cosine does not.
2. For every target the source that it shares most with is taken away, and copies of that source
   (cosine above `SAME`) with it. The best of those that are left is the target's rival.
3. A link's p-value is its place among the rivals of targets that have a partner (judge.py).

On SmolLM2 the reading alone accepts 1.3 to 2 times as many links at one rate as the cosine, the
correlation of activations, or regression on all sources at once (docs/log.md). A target that two
sources share equally has no partner. Targets without any partner have rivals that are only a
little weaker than their best source, so this test says nothing of chance: `judge` asks it beside
the others. Cost: two products of [target, d_model] × [d_model, source].
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.flow.directions import Directions
from pipeline.flow.edges import EdgeColumns
from pipeline.flow.match import Nearest, best_readings, reading
from pipeline.flow.siblings import SAME

MOST_COPIES = 7
"""Copies of a partner that are looked for."""


def shared_and_rivals(
    source: Directions, target: Directions, columns: EdgeColumns, *, tile: int = 2048
) -> tuple[Float[np.ndarray, "edge"], Float[np.ndarray, "target"]]:
    """What the two ends of each link read of each other, and for each target what it shares with
    the best source but its first and that one's copies."""
    device = source.unit.device
    left, right = (torch.from_numpy(x).to(device) for x in (columns.source, columns.target))
    shared = reading(source, target, left, right)
    k = min(MOST_COPIES + 2, source.n_latents)
    best = best_readings(source, target, k=k, tile=tile)
    return _numpy(shared), _numpy(_rivals(best, source))


def _rivals(best: Nearest, source: Directions) -> Float[Tensor, "target"]:
    index, shared = best.index.clamp_min(0), best.cosine
    near = torch.einsum("td,tkd->tk", source.unit[index[:, 0]], source.unit[index])
    other = torch.where(near > SAME, -1.0, shared)
    other[:, 0] = -1.0
    found = other.amax(1)
    if (
        index.shape[1] < source.n_latents
    ):  # copies as far as was looked: something is left, and it is no better
        found = torch.where(found < 0, shared[:, -1], found)
    return found.clamp_min(0)


def _numpy(values: Tensor) -> np.ndarray:
    return values.double().cpu().numpy()
