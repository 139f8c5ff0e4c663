"""What do SAE Match's permutations keep, and what does the model lose when it goes on with them?

For pairs of neighbouring residual sites, a permutation by each objective:

1. mean squared distance of decoder and encoder rows, matched and with partners shuffled (Fig. 3);
2. ΔCE when the layer is skipped and the model goes on with carried latents (Fig. 10);
3. from a third of the depth on, permutations composed step by step, and found at once: how often
   partners are active together (Fig. 7 and 8).

Cost: an assignment per pair and objective, and one pass of the contexts per predictor. Source: SAE
Match (arXiv 2410.07656).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import scipy.sparse as sparse
from torch import Tensor

from featureflow.sites import Site
from pipeline.findings import Finding
from pipeline.flow.assignment import OBJECTIVES, Assignment, Objective, assign, latent_rows
from pipeline.flow.matchers import PairData
from pipeline.flow.sources import HeldOutRows
from pipeline.flow.transitions import (
    TopK,
    matching_score,
    measure_skipping,
    operator,
    rescaled,
    scale_of,
    skipping,
)
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.layers import (
    NPairs,
    Seed,
    Text,
    contexts_of,
    pair_data,
    residual_pairs,
    rows_after_contexts,
    spread,
)
from pipeline.run import Run
from sae import Sae

TITLE = "permutations, skipped layers, compositions (SAE Match, Fig. 3, 7, 8, 10)"
GROUP = "paper"
NEEDS = ("collect", "train", "link")
_PARTS: tuple[Objective, ...] = ("decoder", "encoder")
MOST_STEPS = 6
"""Distance, in sites, up to which compositions are followed."""


class Config(Text):
    """How much is compared."""

    n_pairs: NPairs = 6
    seed: Seed = 0


def look(run: Run, config: Config) -> Finding:
    """Permutations: parameters apart, loss when a layer is skipped, and compositions over several
    layers."""
    contexts = contexts_of(run, config.n_contexts)
    held_out = rows_after_contexts(run, config.n_tokens, config.n_contexts)
    saes, pairs = run.saes.keeping(3), residual_pairs(run)
    parameters, losses = [], []
    for source, target in spread(pairs, config.n_pairs):
        pair = pair_data(saes, held_out, source, target)
        found = {
            objective: assign(
                pair.source, pair.target, objective=objective, n_candidates=pair.n_candidates
            )
            for objective in OBJECTIVES
        }
        where = {"source_site": source.short, "target_site": target.short}
        parameters += [where | row for row in _distances(pair, found, config.seed)]
        table = measure_skipping(
            run.model,
            contexts,
            source=source,
            target=target,
            predictors=_predictors(pair, found),
            progress=run.context.progress,
        )
        losses.append(table.assign(**where, layer=target.layer))
    loss = pd.concat(losses, ignore_index=True)
    by_layer = loss.groupby(["layer", "target_site", "predictor"], as_index=False)[
        "delta_ce"
    ].mean()
    paths = _compositions(pairs, saes, held_out)
    mean = by_layer.groupby("predictor")["delta_ce"].mean()
    return Finding(
        tables={
            "by_layer": by_layer,
            "composition": paths,
            "parameters": pd.DataFrame(parameters),
            "skipping": loss,
        },
        figure=lambda: lines(
            by_layer,
            x="layer",
            line="predictor",
            columns={"delta_ce": "ΔCE when the layer is skipped, nats"},
        ),
        text=_text(by_layer, paths),
        headline={f"delta_ce {name}": round(float(value), 4) for name, value in mean.items()},
    )


def _predictors(
    pair: PairData, found: Mapping[Objective, Assignment]
) -> dict[str, Sae | Callable[[Tensor], Tensor]]:
    """What the model goes on with: permuted latents (folded), top-1 cosine, the unchanged
    stream."""
    scales = (scale_of(pair.source, pair.source_codes), scale_of(pair.target, pair.target_codes))
    made: dict[str, Sae | Callable[[Tensor], Tensor]] = {
        f"permutation {name}": skipping(
            pair.source, pair.target, rescaled(_matrix(assignment), *scales)
        )
        for name, assignment in found.items()
    }
    made["permutation decoder, not folded"] = skipping(
        pair.source, pair.target, _matrix(found["decoder"])
    )
    top_1 = operator(pair.source, pair.target, TopK())
    made["top-1 cosine"] = skipping(pair.source, pair.target, rescaled(top_1, *scales))
    made["the layer left out"] = lambda x: x
    return made


def _matrix(found: Assignment) -> sparse.csr_matrix:
    matched = np.flatnonzero(found.target_of >= 0)
    shape = (len(found.target_of), found.n_targets)
    ones = np.ones(len(matched), dtype=np.float32)
    return sparse.csr_matrix((ones, (matched, found.target_of[matched])), shape=shape)


def _distances(
    pair: PairData, found: Mapping[Objective, Assignment], seed: int
) -> list[dict[str, object]]:
    """Mean squared distance of decoder and encoder rows: matched, and with partners shuffled."""
    rows: list[dict[str, object]] = []
    for objective, assignment in found.items():
        matched = np.flatnonzero(assignment.target_of >= 0)
        partner = assignment.target_of[matched]
        shuffled = np.random.default_rng(seed).permutation(partner)
        for part in _PARTS:
            left, right = (latent_rows(sae, part).numpy() for sae in (pair.source, pair.target))
            distances = {
                name: float(np.square(left[matched] - right[others]).mean())
                for name, others in (("matched", partner), ("shuffled", shuffled))
            }
            rows.append({"objective": objective, "part": part, **distances})
    return rows


def _compositions(
    pairs: list[tuple[Site, Site]], saes: Mapping[Site, Sae], held_out: HeldOutRows
) -> pd.DataFrame:
    """From a third of the depth on: assignments composed step by step, and found at once; how often
    partners are active together."""
    first = len(pairs) // 3
    start, rows = pairs[first][0], []
    composed: Assignment | None = None
    for steps, (before, target) in enumerate(pairs[first : first + MOST_STEPS], start=1):
        pair = pair_data(saes, held_out, start, target)
        step = assign(saes[before], pair.target, n_candidates=pair.n_candidates)
        composed = step if composed is None else composed.then(step)
        at_once = assign(pair.source, pair.target, n_candidates=pair.n_candidates)
        for way, found in (("composed", composed), ("at once", at_once)):
            score = matching_score(_matrix(found), pair.source_codes, pair.target_codes)
            matched = np.flatnonzero(found.target_of >= 0)
            left = pair.source_directions.unit.numpy()[matched]
            right = pair.target_directions.unit.numpy()[found.target_of[matched]]
            rows.append(
                {
                    "source_site": start.short,
                    "target_site": target.short,
                    "steps": steps,
                    "way": way,
                    "score": score.of_activations,
                    "cosine": float((left * right).sum(1).mean()),
                    "same": float(np.mean(composed.target_of == at_once.target_of)),
                }
            )
    return pd.DataFrame(rows)


def _text(by_layer: pd.DataFrame, paths: pd.DataFrame) -> str:
    mean = by_layer.groupby("predictor", sort=False)["delta_ce"].mean()
    lines = [f"  {name}: {value:.2f} nats" for name, value in mean.items()]
    scores = paths.pivot(index="steps", columns="way", values="score")
    lines += [
        f"  {steps} step(s) apart, matching score: at once {row['at once']:.2f}, composed "
        f"{row['composed']:.2f}"
        for steps, row in scores.iterrows()
    ]
    return (
        "What the paper saw (SAE Match, axis level only): ΔCE of 0.5 to 3 nats in early layers, "
        "small from about\n"
        "layer 10 on (Fig. 10); matching score about 0.2 to 0.6 (Fig. 7); matching at once is at "
        "least as good as\n"
        "composing, and both fade over about five layers (Fig. 8).\n\n"
        f"What this model shows, over {by_layer['target_site'].nunique()} layers:\n"
        + "\n".join(lines)
    )
