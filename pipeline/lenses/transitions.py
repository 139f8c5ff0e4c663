"""How well do operators between neighbouring SAEs carry latents from layer to layer?

Every operator (permutations by each objective, top-k by each weighting, folded before comparing
where there is a θ) carries the source's latents of held-out tokens to the target; the explained
variance of the decoded result and the share of activations that meet an active partner are read.
Cost: one pass of the tokens per operator and pair. Source: Feature Flow App. F, Fig. 23 and 24.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from torch import Tensor

from featureflow.sites import Site
from pipeline.findings import Finding
from pipeline.flow.assignment import OBJECTIVES
from pipeline.flow.matchers import PairData
from pipeline.flow.transitions import (
    WEIGHTS,
    Choice,
    Permutation,
    TopK,
    explained_variance,
    matching_score,
    operator,
    rescaled,
    scale_of,
    skipping,
)
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.layers import (
    NPairs,
    Text,
    pair_data,
    residual_pairs,
    rows_after_contexts,
    spread,
)
from pipeline.run import Run
from sae import Sae, SparseCodes
from sae.activations import Threshold

TITLE = "carry latents by operators (Feature Flow, Fig. 23 and 24)"
GROUP = "paper"
NEEDS = ("collect", "train", "link")
EV_TOP_1, EV_PERMUTATION_FOLDED, EV_PERMUTATION = 0.791, (0.783, 0.786), (0.747, 0.751)
"""Fig. 23, Gemma 2 2B, layers 14 → 15: top-1 decoder cosine; permutations with and without folded
inference."""


class Config(Text):
    """How much is compared."""

    n_pairs: NPairs = 6


def look(run: Run, config: Config) -> Finding:
    """Explained variance and matching score of every operator, between neighbouring residual
    sites."""
    held_out = rows_after_contexts(run, config.n_tokens, config.n_contexts)
    pairs, saes = spread(residual_pairs(run), config.n_pairs), run.saes.keeping(2)
    rows = []
    for source, target in run.each("carry latents", pairs):
        rows += _operators_of(pair_data(saes, held_out, source, target), source, target)
    table = pd.DataFrame(rows)
    summary = table.groupby(["operator", "inference"], as_index=False, sort=False).agg(
        ev=("ev", "mean"),
        ev_low=("ev", "min"),
        ev_high=("ev", "max"),
        score=("score", "mean"),
        n_pairs=("ev", "size"),
    )
    order = summary.sort_values("ev", ascending=False)
    best = [(f"{row.operator}, {row.inference}", row.ev) for row in order.head(6).itertuples()]
    low, high = EV_PERMUTATION_FOLDED
    return Finding(
        tables={"summary": summary, "operators": table},
        figure=lambda: bars(
            order.head(24),
            by=("operator", "inference"),
            columns={"ev": "explained variance", "score": "matching score"},
        ),
        text=f"What the paper saw (Fig. 23, layers 14 → 15): top-1 decoder cosine {EV_TOP_1}, "
        "permutations with folded\n"
        f"inference {low} to {high}, without {EV_PERMUTATION[0]} to {EV_PERMUTATION[1]}.\n\n"
        f"What this model shows, mean over {len(pairs)} pairs, the best six (bars show the range "
        "over pairs):\n" + "\n".join(f"  {name}: {ev:.3f}" for name, ev in best),
        headline={f"ev {name}": round(ev, 4) for name, ev in best[:3]},
    )


def _choices(pair: PairData) -> dict[str, Choice]:
    """Every operator: permutations by objective, top-k by weights; folded before comparing where
    there is a θ."""
    folds = (False, True) if isinstance(pair.source.activation, Threshold) else (False,)
    found: dict[str, Choice] = {}
    for fold in folds:
        suffix = ", folded" if fold else ""
        for objective in OBJECTIVES:
            found[f"permutation {objective}{suffix}"] = Permutation(
                objective=objective, fold=fold, n_candidates=pair.n_candidates
            )
        for weights in WEIGHTS:
            for k in (1, 2, 3, 4, 5):
                found[f"top-{k} {weights}{suffix}"] = TopK(k=k, weights=weights, fold=fold)
    return found | {"top-1 dec-dec of each target": TopK(of="target")}


def _operators_of(pair: PairData, source: Site, target: Site) -> list[dict[str, object]]:
    """One row per operator and way of inference; the source is encoded once."""
    batches = [(pair.source.encode_sparse(left), right) for left, right in pair.rows()]
    scales = (scale_of(pair.source, pair.source_codes), scale_of(pair.target, pair.target_codes))
    where = {"source_site": source.short, "target_site": target.short}
    rows: list[dict[str, object]] = []
    for name, choice in _choices(pair).items():
        plain = operator(pair.source, pair.target, choice)
        score = matching_score(plain, pair.source_codes, pair.target_codes)
        for inference, matrix in (("unscaled", plain), ("folded", rescaled(plain, *scales))):
            ev = explained_variance(_decoding(skipping(pair.source, pair.target, matrix)), batches)
            rows.append(
                where
                | {
                    "operator": name,
                    "inference": inference,
                    "ev": ev,
                    "score": score.of_activations,
                }
            )
    own = ((right, right) for _, right in pair.rows())
    references = {
        "source's own decoder": explained_variance(_decoding(pair.source), batches),
        "target's own reconstruction": explained_variance(pair.target, own),
    }
    rows += [
        where | {"operator": n, "inference": "none", "ev": ev, "score": np.nan}
        for n, ev in references.items()
    ]
    return rows


def _decoding(sae: Sae) -> Callable[[SparseCodes], Tensor]:
    return lambda codes: sae.decode(codes)
