"""The smallest set of supernodes whose change makes the model say the foil, found by really doing
it.

1. A supernode that helps the answer is removed; one that helps the foil is doubled.
2. Every single one is tried, then every pair of the strongest, then the best sets so far with each
   other supernode added, up to a size. The search ends with the first size at which the foil is the
   likeliest token.
3. Of the eight such sets with the lowest y the one with the least side effect is taken: the mean
   KL on the tokens of the prompt before the last, from the first that is changed.
4. The same number of random active features at the same cuts is changed as often: the share of
   draws that flip the answer is the null.

It is the smallest found, not proven the smallest: sets above two are searched by beam. Cost: at
most about 300 rows of a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import torch

from featureflow.errors import UserError
from featureflow.progress import Progress, silent
from pipeline.trace.stream import Traced, edited, edits_of, run_whole
from pipeline.trace.supernodes import random_like
from pipeline.trace.trace import Trace

_BEAM, _PAIRED, _MOST, _DRAWS, _COMPARED, _DOUBLED = 4, 12, 4, 20, 8, 2.0


@dataclass(frozen=True, kw_only=True)
class Flip:
    """`supernodes` with the `factors` they are set to (0 or 2), y and the answer's and foil's
    probability then, whether the foil is the likeliest token (`flips`), the mean and largest KL on
    the rest of the prompt, the share of random draws that flip, and how many sets were tried."""

    supernodes: tuple[int, ...]
    factors: tuple[float, ...]
    flips: bool
    y: float
    p_answer: float
    p_foil: float
    kl_rest: float
    kl_rest_largest: float
    random_flips: float
    n_tried: int


def counterfactual(
    trace: Trace, *, most: int = _MOST, seed: int = 0, progress: Progress = silent
) -> Flip:
    """The set that flips the answer; where none up to `most` supernodes does, the one that brings y
    lowest (`flips` is False). Raises UserError for a trace of a feature."""
    found = trace.traced
    if found.target.feature is not None:
        raise UserError("only an answer has a foil", found=f"a trace of {found.target.feature}")
    factor = {
        int(row.supernode): 0.0 if row.removed > 0 else _DOUBLED
        for row in trace.supernodes.itertuples()
    }
    order, n_tried = list(factor), 0
    nodes = {number: trace.members(number).assign(to=lambda m, n=number: factor[n] * m["z"])
             for number in order}  # fmt: skip
    sets: list[tuple[int, ...]] = [(number,) for number in order]
    for size in range(1, most + 1):
        y, is_foil = _tried(found, [pd.concat([nodes[n] for n in each]) for each in sets], progress)
        n_tried += len(sets)
        ranked = [sets[i] for i in np.argsort(y, kind="stable")]
        best = [s for s, flips in zip(sets, is_foil, strict=True) if flips] or ranked[:1]
        if any(is_foil) or size == most:
            break
        if size == 1:
            sets = list(combinations([each[0] for each in ranked[:_PAIRED]], 2))
        else:
            grown = {
                tuple(sorted({*each, n})) for each in ranked[:_BEAM] for n in order if n not in each
            }
            sets = sorted(grown)
        if not sets:
            break
    best = sorted(best, key=ranked.index)[:_COMPARED]
    sides = _side_effects(found, [pd.concat([nodes[n] for n in each]) for each in best])
    chosen = min(range(len(best)), key=lambda i: sides[i][0])
    changed = pd.concat([nodes[n] for n in best[chosen]])
    gone = edited(found, [changed])
    p = gone.logits[0].softmax(-1)
    generator = np.random.default_rng(seed)
    draws = [random_like(changed, found.nodes, generator).assign(to=0.0) for _ in range(_DRAWS)]
    return Flip(
        supernodes=best[chosen],
        factors=tuple(factor[n] for n in best[chosen]),
        flips=int(p.argmax()) == found.target.foil,
        y=float(gone.y[0]),
        p_answer=float(p[found.target.answer]),
        p_foil=float(p[found.target.foil]),
        kl_rest=sides[chosen][0],
        kl_rest_largest=sides[chosen][1],
        random_flips=float(np.mean(_tried(found, draws, progress)[1])),
        n_tried=n_tried,
    )


def _tried(
    found: Traced, sets: Sequence[pd.DataFrame], progress: Progress
) -> tuple[list[float], list[bool]]:
    """y and whether the foil is the likeliest token, for every set."""
    gone = edited(found, sets, progress=progress)
    return gone.y.tolist(), (gone.logits.argmax(-1) == found.target.foil).tolist()


@torch.no_grad()
def _side_effects(found: Traced, sets: Sequence[pd.DataFrame]) -> list[tuple[float, float]]:
    """Mean and largest KL after the tokens before the last, from the first one changed on; 0 where
    only the last token is changed."""
    rows = [sets[0].iloc[:0], *sets]
    edits = edits_of(found.saes, rows)
    before, *after = run_whole(found.model, [found.ids] * len(rows), edits).log_softmax(-1)
    effects = []
    for changed, now in zip(sets, after, strict=True):
        start = int(changed["token"].min())
        kl = (before.exp() * (before - now)).sum(-1)[start:-1]
        effects.append((float(kl.mean()), float(kl.max())) if len(kl) else (0.0, 0.0))
    return effects
