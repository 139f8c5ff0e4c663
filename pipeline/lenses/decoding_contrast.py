"""Does contrast with an early layer make the model say better tokens (autocontrastive decoding)?

1. p_up is the model's distribution on held-out rows, p_low that of an early layer, carried to the
   end by the map of `translators` (or, as baseline, from the token's embedding).
2. On V = {v: p_up(v) ≥ α max p_up} the scores log p_up − log p_low are turned into probabilities
   that hold p_up's mass on V; outside V nothing changes.
3. Accuracy and cross-entropy of the real next token, beside the model's own; intervals over
   documents.

Cost: one read-out a row and layer. Source: Gera et al. 2023, The Benefits of Bad Advice (arXiv
2305.01628; abstract only): better open-ended text and accuracy with a contrast. In a prototype
accuracy on this model fell from 0.445 to 0.34–0.375; generation was not measured here.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Doc

from featureflow.sites import residual_sites
from featureflow.statistics import mean_over, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import bars
from pipeline.lenses.parts.held_out import choose_rows
from pipeline.lenses.parts.layers import spread
from pipeline.lenses.parts.read_out import (
    EMBEDDING,
    carried,
    document_of,
    iter_log_p,
    later,
    rows_at,
)
from pipeline.run import Run

TITLE = "whether contrast with an early layer improves the next token (autocontrastive decoding)"
NEEDS = ("collect", "translators")


class Config(Sampled):
    """On how many rows, with which layers."""

    n_rows: Annotated[int, Ge(8), Doc("held-out rows")] = 400
    n_layers: Annotated[int, Ge(1), Doc("early layers, spread over the depth")] = 4
    alpha: Annotated[float, Gt(0), Le(1), Doc("a token takes part from this share of the top")] = (
        0.1
    )


def look(run: Run, config: Config) -> Finding:
    """Accuracy and loss of the model, and with every contrast."""
    maps = run.lens("translators").arrays
    stream = residual_sites(run.store.sites)
    blocks = choose_rows(run, config, config.n_rows)
    following = later(run, np.concatenate(blocks), 1)
    known = torch.from_numpy(following >= 0)
    target = torch.from_numpy(run.tokens.id[following].astype(np.int64))[known]
    document = document_of(run, blocks)[known.numpy()]
    last = rows_at(run, stream[-1], blocks)[known]
    low: dict[str, Tensor | None] = {"none": None}
    low |= {
        f"contrast with {EMBEDDING}": carried(rows_at(run, None, blocks), maps, EMBEDDING)[known]
    }
    for site in spread([s for s in stream[:-1] if s.short in maps], config.n_layers):
        value = carried(rows_at(run, site, blocks), maps, site.short)
        low[f"contrast with {site.short}"] = value[known]
    rows = []
    for name, x in run.each("contrast", low.items()):
        right, loss = _judged(run, last, x, target, config.alpha)
        row: dict[str, Any] = {"decoding": name, "n_rows": len(right)}
        row |= named("accuracy", mean_over(right, document, seed=config.seed))
        rows.append(row | named("loss", mean_over(loss, document, seed=config.seed)))
    table = pd.DataFrame(rows)
    return Finding(
        tables={"decoding": table},
        figure=lambda: bars(
            table, by=["decoding"], columns={"accuracy": "accuracy", "loss": "cross-entropy"}
        ),
        text=_text(table),
        headline={
            "accuracy": round(float(table["accuracy"].iloc[0]), 4),
            "best with contrast": round(float(table["accuracy"].iloc[2:].max()), 4),
        },
    )


def contrasted(
    up: Float[Tensor, "row vocab"], low: Float[Tensor, "row vocab"], alpha: float
) -> Float[Tensor, "row vocab"]:
    """Log-probabilities of `up` contrasted with `low` among the tokens that are likely enough."""
    inside = up >= up.max(-1, keepdim=True).values + np.log(alpha)
    score = (up - low).masked_fill(~inside, -torch.inf).log_softmax(-1)
    mass = up.masked_fill(~inside, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.where(inside, score + mass, up)


def _judged(
    run: Run, last: Tensor, low: Tensor | None, target: Tensor, alpha: float
) -> tuple[np.ndarray, np.ndarray]:
    right, loss, start = [], [], 0
    lows = None if low is None else iter_log_p(run, low)
    for log_p in iter_log_p(run, last):
        if lows is not None:
            log_p = contrasted(log_p, next(lows), alpha)
        own = target[start : start + len(log_p)]
        right.append(log_p.argmax(-1) == own)
        loss.append(-log_p.gather(1, own[:, None])[:, 0])
        start += len(log_p)
    return torch.cat(right).double().numpy(), torch.cat(loss).double().numpy()


def _text(table: pd.DataFrame) -> str:
    said = [
        f"  {row.decoding}: accuracy {ranged(row, 'accuracy', '.3f')}, "
        f"cross-entropy {ranged(row, 'loss')}"
        for row in table.itertuples()
    ]
    return (
        "What the paper saw (abstract only): contrast with an early layer improves open-ended text "
        "and accuracy.\n\nWhat this model shows on held-out text (95 % intervals over documents):\n"
        + "\n".join(said)
    )
