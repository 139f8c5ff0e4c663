"""Is a text outside what an SAE knows? One step of encoding and decoding against many.

1. Held-out contexts are read as they are; with their tokens shuffled; with tokens drawn from the
   vocabulary. Scores of every row: one-step error ‖x − x̂‖ / ‖x − mean‖, length of the trajectory
   x → D(E(x)) → … over `n_steps`, distance to the mean in standardised coordinates, norm.
2. AUROC of telling the changed texts from the own ones, intervals over contexts.
3. Do iterations settle? Relative step after 1, 2, 5 … iterations.

Cost: `n_steps` encodings of `n_tokens` rows a site and kind of text. Source: Fumero et al. 2025,
Navigating the Latent Space Dynamics of Neural Models (arXiv 2505.22785; abstract only): attractors
emerge and trajectories detect unfamiliar inputs.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Doc

from featureflow.sites import residual_sites
from featureflow.statistics import Interval, bootstrap, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.held_out import choose_contexts
from pipeline.lenses.parts.layers import spread
from pipeline.run import Run
from sae import Sae

TITLE = "which score tells unfamiliar text: one step of the SAE, its dynamics, distance, norm"
NEEDS = ("collect", "train")
SCORES = ("one step", "trajectory", "distance", "norm")
TEXTS = ("shuffled", "from the vocabulary")
_STEPS_SHOWN = (1, 2, 5, 10, 20)


class Config(Sampled):
    """Where, on how much text, and how far."""

    n_sites: Annotated[int, Ge(1), Doc("residual sites, spread over the depth")] = 2
    n_tokens: Annotated[int, Ge(64), Doc("held-out tokens")] = 2048
    n_steps: Annotated[int, Ge(1), Doc("iterations of the trajectory")] = 10


def look(run: Run, config: Config) -> Finding:
    """AUROC of every score, and whether iterations settle."""
    contexts = choose_contexts(run, config, config.n_tokens)
    sites = spread(residual_sites(run.saes), config.n_sites)
    rng = np.random.default_rng(config.seed)
    ids = contexts.ids
    order = torch.from_numpy(np.stack([1 + rng.permutation(ids.shape[1] - 1) for _ in ids]))
    shuffled = torch.cat([ids[:, :1], ids.gather(1, order)], 1)
    drawn = torch.from_numpy(rng.integers(0, run.model.d_vocab, ids.shape))
    drawn[:, 0] = ids[:, 0]
    texts = {"own": ids, TEXTS[0]: shuffled, TEXTS[1]: drawn}
    read: dict[str, dict[Any, Tensor]] = {}
    for name, each in texts.items():
        run.context.progress(f"read {name} text", 0, 1)
        parts = [run.model.activations(part, sites) for part in each.split(8)]
        read[name] = {s: torch.cat([p[s] for p in parts]).float().cpu() for s in sites}
    keep = contexts.spliced.clone()
    keep[:, :4] = False  # the first tokens are strange in every text
    unit = np.repeat(np.arange(len(ids)), keep.sum(1).numpy())
    rows, settling = [], []
    for site in sites:
        statistics = run.store.statistics(site)
        mean, variance = (torch.from_numpy(x) for x in (statistics.mean, statistics.variance))
        found = {}
        for name in texts:
            x = read[name][site][keep]
            found[name], steps = scored(run.saes[site], x, mean, variance, config.n_steps)
            settling += [
                {"site": site.short, "text": name, "step": k, "relative_step": steps[k - 1]}
                for k in _STEPS_SHOWN
                if k <= len(steps)
            ]
        for text in TEXTS:
            for score in SCORES:
                own, changed = found["own"][score], found[text][score]
                row = {"site": site.short, "text": text, "score": score}
                rows.append(row | named("auroc", auroc(own, changed, unit, config.seed)))
    table = pd.DataFrame(rows)
    means = table.groupby("score")["auroc"].mean()
    return Finding(
        tables={"auroc": table, "settling": pd.DataFrame(settling)},
        figure=lambda: bars(table, by=["site", "text", "score"], columns={"auroc": "AUROC"}),
        text=_text(table, pd.DataFrame(settling)),
        headline={f"AUROC, {score}": round(float(means[score]), 4) for score in SCORES},
    )


def scored(
    sae: Sae,
    x: Float[Tensor, "row d"],
    mean: Float[Tensor, "d"],
    variance: Float[Tensor, "d"],
    n_steps: int,
) -> tuple[dict[str, np.ndarray], list[float]]:
    """The four scores of every row, and the mean relative step of each iteration."""
    size = (x - mean).norm(dim=-1).clamp_min(1e-6)
    now, length, steps = x, torch.zeros(len(x)), []
    one = torch.zeros(len(x))
    for step in range(n_steps):
        after = sae(now)
        moved = (after - now).norm(dim=-1) / size
        one = moved if step == 0 else one
        length, now = length + moved, after
        steps.append(float(moved.median()))
    far = ((x - mean).square() / variance.clamp_min(1e-6)).mean(-1)
    every = (one, length, far, x.norm(dim=-1))
    return {n: v.double().numpy() for n, v in zip(SCORES, every, strict=True)}, steps


def auroc(own: np.ndarray, changed: np.ndarray, unit: np.ndarray, seed: int) -> Interval:
    """Of telling changed rows from own ones; contexts are the units."""
    n = int(unit.max()) + 1
    largest = np.finfo(float).max / 4
    parts = [
        [np.sort(np.nan_to_num(score[unit == u], nan=largest, posinf=largest)) for u in range(n)]
        for score in (own, changed)
    ]
    won = np.zeros((n, n))  # pairs of an own and a changed row in which the changed one is higher
    for i, a in enumerate(parts[0]):
        for j, b in enumerate(parts[1]):
            lower, upper = (np.searchsorted(a, b, side) for side in ("left", "right"))
            won[i, j] = (lower.sum() + upper.sum()) / 2
    size = np.array([len(each) for each in parts[0]], dtype=float)

    def statistic(weights: Float[np.ndarray, "draw unit"]) -> Float[np.ndarray, "draw"]:
        return ((weights @ won) * weights).sum(1) / (weights @ size) ** 2

    return bootstrap(statistic, n, seed=seed)


def _text(table: pd.DataFrame, settling: pd.DataFrame) -> str:
    said = [
        f"  {row.site}, {row.text}, {row.score}: {ranged(row, 'auroc')}"
        for row in table.itertuples()
    ]
    own = settling[settling["text"] == "own"]
    steps = [f"  {r.site}, iteration {r.step}: {r.relative_step:.2g}" for r in own.itertuples()]
    return (
        "What the paper saw (abstract only): attractors emerge, and trajectories detect inputs "
        "from outside.\n\nWhat this model shows, AUROC with 95 % intervals over contexts:\n"
        + "\n".join(said)
        + "\nRelative step of iterating (it settles where this falls to 0):\n"
        + "\n".join(steps)
    )
