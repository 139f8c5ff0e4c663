"""After a definition, at which layer does its headword appear?

1. The prompt is "<definition> is called"; the last token's stream at every layer is read out as it
   is, and carried to the end by the map of `translators`.
2. Median rank of the headword's first token, and how often it is among the ten likeliest; intervals
   over definitions.
3. Null: the headword of another definition of the same topic, which shares the topic but not the
   meaning.

Cost: one forward pass over the definitions and two read-outs a layer. Source: the reverse
dictionary task (Xu et al. 2024, "On the Tip of the Tongue: Analyzing Conceptual Representation in
Large Language Models with Reverse-Dictionary Probe", arXiv 2402.14404; abstract only read here).
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from typing_extensions import Doc

from data.concepts.topics import read_topics
from featureflow.sites import residual_sites
from featureflow.statistics import mean_over, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Seeded
from pipeline.lenses.concept_states import REPORT
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.read_out import carried, ranked
from pipeline.lenses.parts.texts import last_tokens
from pipeline.run import Run

TITLE = "at which layer the headword of a definition appears (reverse dictionary)"
NEEDS = ("collect", "translators")
N_BEST = 10


class Config(Seeded):
    """How many definitions are read."""

    n_texts: Annotated[int, Ge(2), Doc("definitions a topic")] = 15


def look(run: Run, config: Config) -> Finding:
    """Ranks of headwords by layer."""
    maps = run.lens("translators").arrays
    sites = residual_sites(run.store.sites)
    rng = np.random.default_rng(config.seed)
    prompts, words, others = [], [], []
    for topic in read_topics().values():
        own = [each for each in topic.definitions if each.split == REPORT][: config.n_texts]
        prompts += [f"{each.definition[:1].upper()}{each.definition[1:]} is called" for each in own]
        words += [each.word for each in own]
        others += [own[place].word for place in np.roll(rng.permutation(len(own)), 1)]
    encode = run.model.tokenizer.encode
    target, other = (
        torch.tensor([encode(f" {word}")[0] for word in each]) for each in (words, others)
    )
    last = last_tokens(run, prompts, sites)
    rows = []
    for site in run.each("read out", sites):
        ways = {"as it is": last[site]}
        if site.short in maps:
            ways["carried"] = carried(last[site], maps, site.short)
        for read, x in ways.items():
            _, (own_rank, _), (null_rank, _) = ranked(run, x, target, other)
            where = {"site": site.short, "layer": site.layer, "read": read}
            rows.append(where | _summary(own_rank, null_rank, config.seed))
    table = pd.DataFrame(rows)
    end = table.iloc[-1]
    return Finding(
        tables={"layers": table},
        figure=lambda: lines(
            table.assign(log_rank=np.log10(table["rank"])),
            x="layer",
            line="read",
            columns={"among_ten": "headword among ten", "log_rank": "log10 of its median rank"},
        ),
        text=_text(table, len(prompts)),
        headline={
            "among ten at the end": round(float(end["among_ten"]), 4),
            "another headword": round(float(end["null"]), 4),
        },
    )


def _summary(own: np.ndarray, null: np.ndarray, seed: int) -> dict[str, Any]:
    text = np.arange(len(own))
    found = mean_over((own <= N_BEST).astype(float), text, seed=seed)
    row: dict[str, Any] = {"rank": float(np.median(own)), "null_rank": float(np.median(null))}
    return row | named("among_ten", found) | {"null": float((null <= N_BEST).mean())}


def _text(table: pd.DataFrame, n: int) -> str:
    said = [
        f"  {row.site}, {row.read}: median rank {row.rank:.0f} (another headword "
        f"{row.null_rank:.0f}), among ten {ranged(row, 'among_ten')}"
        for row in table.itertuples()
    ]
    return (
        "What the paper saw (abstract only): language models name the word of a definition, and "
        "what they encode there generalises.\n\n"
        f"What this model shows on {n} definitions, 95 % intervals over definitions:\n"
        + "\n".join(said)
    )
