"""Where in the layers does the model's answer appear, and which rival does it overtake?

1. On held-out rows and on `prompts`, every layer is read out as it is and carried to the end by the
   map of `translators`: rank and log-probability of the token that the model says in the end.
2. Onset: the first layer from which the rank is at most k in all later layers (k = 1, 5), as a
   share of the depth. Rival: the token that is first at the layer before the onset.
3. Null: the answer of another row of the same split; baseline: the answer of the row before (what
   copying would read).

Cost: two read-outs a layer and row. Source: "Understanding Hidden Computations in Chain-of-Thought
Reasoning" (arXiv 2412.04537; abstract only): hidden characters are recovered by lower ranks; the
logit lens alone is poor in early layers here, so both ways are shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from jaxtyping import Int
from torch import Tensor
from typing_extensions import Doc

from featureflow.sites import residual_sites
from featureflow.statistics import mean_over, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.held_out import choose_rows
from pipeline.lenses.parts.read_out import carried, document_of, first_tokens, ranked, rows_at
from pipeline.lenses.parts.texts import last_tokens
from pipeline.run import Run

TITLE = "at which layer the model's answer appears, and which rival it overtakes"
NEEDS = ("collect", "translators")
WAYS = ("as it is", "carried")
ONSETS = (1, 5)


class Config(Sampled):
    """On which prompts and rows."""

    prompts: Annotated[tuple[str, ...], Doc("texts whose next token is followed")] = (
        "The capital of France is",
        "Two plus two is",
        "The opposite of hot is",
        "Water is made of hydrogen and",
    )
    n_rows: Annotated[int, Ge(8), Doc("held-out rows")] = 300


def look(run: Run, config: Config) -> Finding:
    """Ranks of the answer by layer; onsets; and the prompts, layer by layer."""
    maps = run.lens("translators").arrays
    sites = residual_sites(run.store.sites)
    blocks = choose_rows(run, config, config.n_rows)
    document = document_of(run, blocks)
    said = last_tokens(run, config.prompts, sites)
    answer = torch.from_numpy(first_tokens(run, rows_at(run, sites[-1], blocks)))
    own_answer = torch.from_numpy(first_tokens(run, said[sites[-1]]))
    ranks: dict[str, list[np.ndarray]] = {way: [] for way in WAYS}
    rows, prompts = [], []
    for site in run.each("ranks at", sites):
        for way in WAYS if site.short in maps else WAYS[:1]:
            x, y = rows_at(run, site, blocks), said[site]
            if way == WAYS[1]:
                x, y = carried(x, maps, site.short), carried(y, maps, site.short)
            others = answer.roll(len(answer) // 2), answer.roll(1)
            _, (rank, log_p), (null, _), (copied, _) = ranked(run, x, answer, *others)
            ranks[way].append(rank)
            where: dict[str, Any] = {"site": site.short, "layer": site.layer, "read": way}
            row = where | named("first", mean_over((rank == 1) * 1.0, document, seed=config.seed))
            medians = zip(("rank", "null_rank", "before_rank"), (rank, null, copied), strict=True)
            row |= {name: float(np.median(values)) for name, values in medians}
            rows.append(row | {"log_p": float(log_p.mean())})
            prompts += [where | each for each in _of_prompts(run, config, y, own_answer)]
    if len(ranks[WAYS[1]]) < len(ranks[WAYS[0]]):  # the last layer needs no map
        ranks[WAYS[1]].append(ranks[WAYS[0]][-1])
    onsets = pd.DataFrame(
        [
            {"read": way, "k": k}
            | named("onset", mean_over(onset(np.stack(each), k), document, seed=config.seed))
            for way, each in ranks.items()
            for k in ONSETS
        ]
    )
    table = pd.DataFrame(rows)
    return Finding(
        tables={"layers": table, "onsets": onsets, "prompts": pd.DataFrame(prompts)},
        figure=lambda: lines(
            table.assign(log_rank=np.log10(table["rank"])),
            x="layer",
            line="read",
            columns={"first": "the answer is first", "log_rank": "log10 of its median rank"},
        ),
        text=_text(onsets, pd.DataFrame(prompts)),
        headline={
            f"onset, {row.read}, k {row.k}": round(float(row.onset), 4)
            for row in onsets.itertuples()
        },
    )


def _of_prompts(run: Run, config: Config, x: Tensor, answer: Tensor) -> Iterator[dict[str, Any]]:
    """Rank of each prompt's answer, and what is said in its place."""
    text = run.model.tokenizer.token_text
    top, (rank, log_p) = ranked(run, x, answer)
    for i, prompt in enumerate(config.prompts):
        yield {
            "prompt": prompt,
            "answer": text(int(answer[i])),
            "rank": int(rank[i]),
            "log_p": float(log_p[i]),
            "first_token": text(int(top[i])),
        }


def onset(rank: Int[np.ndarray, "layer row"], k: int) -> np.ndarray:
    """The first layer from which a row's rank stays at most k, as a share of the depth (1: none
    but the last)."""
    stays = np.logical_and.accumulate((rank <= k)[::-1], 0)[::-1]
    return np.where(stays.any(0), stays.argmax(0), len(rank) - 1) / max(len(rank) - 1, 1)


def _text(onsets: pd.DataFrame, prompts: pd.DataFrame) -> str:
    said = [
        f"  {row.read}, among the first {row.k}: at {ranged(row, 'onset')} of the depth"
        for row in onsets.itertuples()
    ]
    shown = []
    for (prompt, answer), part in prompts.groupby(["prompt", "answer"], sort=False):
        carried_rows = part[part["read"] == WAYS[1]].sort_values("layer")
        late = carried_rows[carried_rows["rank"] > 1]
        rival = late.iloc[-1] if len(late) else None
        overtakes = (
            f", overtakes {rival['first_token']!r} after {rival['site']}"
            if rival is not None
            else ""
        )
        shown.append(f"  {prompt!r} → {answer!r}{overtakes}")
    return (
        "What the paper saw (abstract only): hidden characters of a model trained with fillers are "
        "recovered from lower ranks.\n\nWhat this model shows: the answer stays\n"
        + "\n".join(said)
        + "\n"
        + "\n".join(shown)
    )
