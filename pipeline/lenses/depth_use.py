"""Which layers does the text need; can the middle go; is a layer that looks idle idle?

1. Every block is passed over on held-out contexts: rise of the cross-entropy of the next token,
   with intervals over documents. Three ways: on all rows, on ordinary rows only, on the start
   token and other sinks only. A block that writes the sink looks useful in the first way alone.
2. Block influence: 1 − cosine of ordinary rows before and after, which needs no second pass.
3. Spans around the middle, and a greedy order of removal among the `n_candidates` cheapest blocks.
4. Choosing the block to pass over per document, with hindsight, against the best fixed choice.
   Null: the choice made for another document.

Cost: about 3 × n_layers partial passes over `n_tokens`. Sources: Skip the Middle (arXiv
2506.21103): adaptive skipping gains no better trade at small scale; FiRST, LAET, Direct Multi-Token
Decoding (abstracts only). Running late blocks alone for later tokens was not tried.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import scipy.stats
import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Doc

from data.model.partial_forward import continued_from, passed_over
from featureflow.sites import Site
from featureflow.statistics import mean_over, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.held_out import Contexts, choose_contexts
from pipeline.run import Run

TITLE = "what passing over each layer costs, with and without the sink, and what could be saved"
NEEDS = ("collect",)
WAYS = ("all rows", "ordinary rows", "sink rows")
_BATCH = 4


class Config(Sampled):
    """On how much text, and how much is pruned."""

    n_tokens: Annotated[int, Ge(16), Doc("held-out tokens")] = 2048
    n_spans: Annotated[int, Ge(0), Doc("spans around the middle: 2, 4, 6 … blocks")] = 5
    n_candidates: Annotated[int, Ge(1), Doc("blocks that greedy pruning chooses from")] = 8
    n_pruned: Annotated[int, Ge(0), Doc("blocks that greedy pruning removes")] = 4


def look(run: Run, config: Config) -> Finding:
    """Cost of every block, of spans, of greedy pruning."""
    contexts = choose_contexts(run, config, config.n_tokens)
    n = run.model.n_layers
    before = Site(0, "resid_pre")
    posts = [Site(layer, "resid_post") for layer in range(n)]
    parts = [run.model.activations(i, [before, *posts]) for i in contexts.ids.split(_BATCH)]
    h = [torch.cat([part[site] for part in parts]) for site in (before, *posts)]
    document = contexts.documents[contexts.counted].numpy()
    plain = losses(run, h[n], n - 1, contexts)
    rows, rises = [], {}
    for layer in run.each("pass over a block", range(n)):
        influence = 1 - torch.cosine_similarity(h[layer].float(), h[layer + 1].float(), dim=-1)
        for way in WAYS:
            mixed = mix(h[layer], h[layer + 1], contexts.spliced, way)
            rise = losses(run, mixed, layer, contexts) - plain
            row: dict[str, Any] = {"layer": layer, "way": way}
            row |= named("cost", mean_over(rise, document, seed=config.seed))
            rows.append(row | {"influence": float(influence[contexts.spliced].mean())})
            if way == WAYS[0]:
                rises[layer] = rise
    table = pd.DataFrame(rows)
    saved = [*_spans(run, h, plain, document, contexts, config)]
    saved += _greedy(run, table, plain, document, contexts, config)
    savings = pd.DataFrame(saved)
    choice = _hindsight(rises, document, config.seed)
    return Finding(
        tables={"layers": table, "savings": savings, "choice": pd.DataFrame([choice])},
        figure=lambda: lines(
            table, x="layer", line="way", columns={"cost": "rise of the loss, nats per token"}
        ),
        text=_text(table, savings, choice, float(plain.mean())),
        headline={
            "loss": round(float(plain.mean()), 4),
            "cheapest": int(choice["fixed_layer"]),
            "influence and cost": round(_agreement(table), 4),
        },
    )


def mix(
    before: Float[Tensor, "context position d_model"],
    after: Float[Tensor, "context position d_model"],
    ordinary: Tensor,
    way: str,
) -> Float[Tensor, "context position d_model"]:
    """The stream after a block that is passed over on some rows."""
    passed = {WAYS[0]: torch.ones_like(ordinary), WAYS[1]: ordinary, WAYS[2]: ~ordinary}[way]
    return torch.where(passed[..., None], before, after)


def losses(run: Run, residual: Tensor, layer: int, contexts: Contexts) -> np.ndarray:
    """Cross-entropy of every counted token when the model goes on from this stream."""
    found = []
    for h, ids, counted in zip(
        *(x.split(_BATCH) for x in (residual, contexts.ids, contexts.counted)), strict=True
    ):
        with continued_from(run.model, layer, h):
            logits = run.model.logits(ids)
        found.append(_cross_entropy(logits, ids, counted))
    return np.concatenate(found)


def _cross_entropy(logits: Tensor, ids: Tensor, counted: Tensor) -> np.ndarray:
    log_p = logits[:, :-1].float().log_softmax(-1)
    own = log_p.gather(-1, ids[:, 1:, None].to(log_p.device))[..., 0].cpu()
    return -own[counted[:, :-1]].double().numpy()


def _without(run: Run, layers: list[int], contexts: Contexts) -> np.ndarray:
    found = []
    for ids, counted in zip(
        contexts.ids.split(_BATCH), contexts.counted.split(_BATCH), strict=True
    ):
        with passed_over(run.model, layers):
            found.append(_cross_entropy(run.model.logits(ids), ids, counted))
    return np.concatenate(found)


def _spans(
    run: Run,
    h: list[Tensor],
    plain: np.ndarray,
    document: np.ndarray,
    contexts: Contexts,
    config: Config,
) -> list[dict[str, Any]]:
    """Blocks around the middle, passed over together."""
    n, rows = run.model.n_layers, []
    for k in range(1, min(config.n_spans, (n - 2) // 2) + 1):
        first, last = n // 2 - k, n // 2 + k - 1
        rise = losses(run, h[first], last, contexts) - plain
        row = {"what": "span", "layers": f"{first}–{last}", "saved": 2 * k / n}
        rows.append(row | named("cost", mean_over(rise, document, seed=config.seed)))
    return rows


def _greedy(
    run: Run,
    table: pd.DataFrame,
    plain: np.ndarray,
    document: np.ndarray,
    contexts: Contexts,
    config: Config,
) -> list[dict[str, Any]]:
    """At each step the candidate whose removal costs least beside those gone already."""
    singles = _of(table, WAYS[0]).sort_values("cost")
    left = singles["layer"].astype(int).tolist()[: config.n_candidates]
    gone: list[int] = []
    rows = []
    for step in range(min(config.n_pruned, len(left))):
        run.context.progress("prune", step, config.n_pruned)
        tried = {each: _without(run, [*gone, each], contexts) - plain for each in left}
        best = min(tried, key=lambda each: tried[each].mean())
        gone.append(best)
        left.remove(best)
        names = ", ".join(map(str, sorted(gone)))
        row = {"what": "greedy", "layers": names, "saved": len(gone) / run.model.n_layers}
        rows.append(row | named("cost", mean_over(tried[best], document, seed=config.seed)))
    return rows


def _hindsight(rises: dict[int, np.ndarray], document: np.ndarray, seed: int) -> dict[str, Any]:
    """Cost of the best block for all, of the best for each document, of another document's best."""
    names, unit = np.unique(document, return_inverse=True)
    cost = np.stack([np.bincount(unit, rise) / np.bincount(unit) for rise in rises.values()])
    best, fixed = cost.argmin(0), int(cost.mean(1).argmin())
    other = np.random.default_rng(seed).permutation(len(names))
    at = np.arange(len(names))
    return {
        "fixed_layer": list(rises)[fixed],
        "fixed": float(cost[fixed].mean()),
        "by_document": float(cost[best, at].mean()),
        "another_document": float(cost[best[other], at].mean()),
        "n_documents": len(names),
    }


def _of(table: pd.DataFrame, way: str) -> pd.DataFrame:
    return table[table["way"] == way]


def _agreement(table: pd.DataFrame) -> float:
    own = _of(table, WAYS[0])
    return float(scipy.stats.spearmanr(own["influence"], own["cost"]).statistic)


def _text(table: pd.DataFrame, savings: pd.DataFrame, choice: dict[str, Any], plain: float) -> str:
    wide = table.pivot(index="layer", columns="way", values="cost")
    influence = table.groupby("layer")["influence"].first()
    whole = _of(table, WAYS[0]).set_index("layer")
    said = [
        f"  L{layer}: {ranged(whole.loc[layer], 'cost')}, ordinary rows only "
        f"{row[WAYS[1]]:.2f}, sink rows only {row[WAYS[2]]:.2f}, influence {influence[layer]:.3f}"
        for layer, row in wide.iterrows()
    ]
    gone = [
        f"  {row.what} {row.layers}: {row.saved:.0%} of the blocks saved for "
        f"{ranged(row, 'cost')} nats"
        for row in savings.itertuples()
    ]
    return (
        "What the papers saw (abstracts only): the middle layers are the most redundant; adaptive "
        "skipping gains no better trade of\nloss and compute at small scale.\n\n"
        f"What this model shows (loss {plain:.2f} nats; rise when a block is passed over, 95 % "
        "intervals over documents):\n"
        + "\n".join(said)
        + "\n"
        + "\n".join(gone)
        + f"\nOne block less: the best fixed one (L{choice['fixed_layer']}) costs "
        f"{choice['fixed']:.3f}, the best for each document with hindsight "
        f"{choice['by_document']:.3f}, another document's {choice['another_document']:.3f}.\n"
        f"Influence ranks blocks as cost does at {_agreement(table):.2f}."
    )
