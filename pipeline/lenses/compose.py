"""Is the vector of a phrase the sum of its parts, and which latents bind them?

1. Three sets of phrases with two factors (adjective × noun, country × kind, verb × tense), each
   ended by the same words, so that the last token is the same in all.
2. At every layer the last token's vector is split into mean, main effects and interaction.
   Additive share: main effects' part of the variance between phrases. Null: cells permuted, which
   gives (n₁ + n₂ − 2) / (n₁ n₂ − 1) by degrees of freedom. Intervals over levels of the first
   factor.
3. A cell that is left out is predicted from the others' means; how often is it nearest to itself
   among all cells? Baseline: the sum of token embeddings instead of the layer.
4. Latents: interaction's share of a latent's variance between phrases; those that bind.

Cost: one forward pass over the phrases. Source: Trager et al. 2023, Linear Spaces of Meanings
(arXiv 2302.14383; abstract only): compositional structures are near linear in CLIP.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from jaxtyping import Float
from typing_extensions import Doc

from featureflow.sites import residual_sites
from featureflow.statistics import bootstrap_ratio, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Seeded
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.layers import spread
from pipeline.lenses.parts.read_out import embeddings
from pipeline.lenses.parts.texts import iter_texts
from pipeline.run import Run

TITLE = "whether vectors of phrases are sums of their parts, and which latents bind parts"
NEEDS = ("collect", "train")
SETS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "adjective and noun": (
        "The {} {} is",
        ("red", "old", "small", "wet", "heavy", "broken", "cheap", "famous"),
        ("car", "house", "dog", "book", "bridge", "table", "river", "song"),
    ),
    "country and kind": (
        "The {1} of {0} is",
        ("France", "Japan", "Brazil", "Egypt", "Canada", "India", "Spain", "Poland"),
        ("capital", "language", "president", "currency", "army", "food", "history", "north"),
    ),
    "subject and verb": (
        "The {} {} it and then",
        ("boy", "queen", "doctor", "cat", "teacher", "robot", "farmer", "soldier"),
        ("saw", "broke", "sold", "ate", "found", "lost", "painted", "carried"),
    ),
}


class Config(Seeded):
    """Where latents are looked at."""

    n_sites: Annotated[int, Ge(1), Doc("sites whose latents are split")] = 4


def look(run: Run, config: Config) -> Finding:
    """Additive shares by layer and set, and the latents that bind."""
    stream = residual_sites(run.store.sites)
    coded = spread(residual_sites(run.saes), config.n_sites)
    e, rows, binding = embeddings(run), [], []
    rng = np.random.default_rng(config.seed)
    for name, (frame, first, second) in SETS.items():
        texts = [frame.format(a, b) for a in first for b in second]
        shape = (len(first), len(second))
        states = {site: np.zeros((len(texts), run.model.d_model)) for site in stream}
        words = np.zeros((len(texts), run.model.d_model))
        for places, ids, found in iter_texts(run, texts, stream, label=f"read {name}"):
            words[places] = e[ids[:, 1:]].sum(1).numpy()
            for site, x in found.items():
                states[site][places] = x[:, -1].numpy()
        sources: list[tuple[Any, np.ndarray]] = [(None, words), *states.items()]
        for site, values in sources:
            cells = values.reshape(*shape, -1)
            mixed = values[rng.permutation(len(values))].reshape(*shape, -1)
            where = {"set": name, "site": None if site is None else site.short}
            where["layer"] = -1 if site is None else site.layer
            row = named("additive", additive(cells, config.seed))
            row["null"] = additive(mixed, config.seed).mean
            rows.append(where | row | {"found": predicted(cells), "found_null": predicted(mixed)})
        for site in coded:
            z = run.saes[site].encode(torch.from_numpy(states[site]).float()).double().numpy()
            binding.append(_bound(z.reshape(*shape, -1), site.short, name))
    table, latents = pd.DataFrame(rows), pd.concat(binding, ignore_index=True)
    strongest = latents.sort_values("interaction", ascending=False).head(200)
    mean = table[table["layer"] >= 0]
    return Finding(
        tables={"layers": table, "latents": strongest},
        figure=lambda: lines(
            table, x="layer", line="set", columns={"additive": "additive share of the variance"}
        ),
        text=_text(table, latents),
        headline={
            "additive": round(float(mean["additive"].mean()), 4),
            "permuted": round(float(mean["null"].mean()), 4),
            "left-out cells found": round(float(mean["found"].mean()), 4),
        },
    )


def split(
    cells: Float[np.ndarray, "first second d"],
) -> tuple[Float[np.ndarray, "first second d"], Float[np.ndarray, "first second d"]]:
    """What main effects predict, and what each cell is, both less the mean of all."""
    centred = cells - cells.mean((0, 1))
    return centred.mean(1, keepdims=True) + centred.mean(0, keepdims=True), centred


def additive(cells: Float[np.ndarray, "first second d"], seed: int) -> Any:
    """Main effects' part of the variance between cells; the first factor's levels are the units."""
    main, centred = split(cells)
    left = np.square(centred - main).sum((1, 2))
    share = bootstrap_ratio(left, np.square(centred).sum((1, 2)) + 1e-30, seed=seed)
    return type(share)(mean=1 - share.mean, low=1 - share.high, high=1 - share.low, n=share.n)


def predicted(cells: Float[np.ndarray, "first second d"]) -> float:
    """How often a left-out cell is nearest, of all cells, to what the others predict for it."""
    n, m, _ = cells.shape
    found = 0
    for i in range(n):
        for j in range(m):
            rows = np.delete(cells[:, j], i, 0).mean(0)
            columns = np.delete(cells[i], j, 0).mean(0)
            rest = np.delete(np.delete(cells, i, 0), j, 1).mean((0, 1))
            apart = np.square(cells - (rows + columns - rest)).sum(-1)
            found += int(apart.argmin() == i * m + j)
    return found / (n * m)


def _bound(z: Float[np.ndarray, "first second latent"], site: str, name: str) -> pd.DataFrame:
    main, centred = split(z)
    total = np.square(centred).sum((0, 1))
    living = np.flatnonzero((z > 0).sum((0, 1)) >= 3)
    share = np.square(centred - main).sum((0, 1))[living] / total[living].clip(1e-30)
    return pd.DataFrame(
        {
            "feature": [f"{site}/{i}" for i in living],
            "site": site,
            "set": name,
            "interaction": share,
            "n_active": (z > 0).sum((0, 1))[living],
        }
    )


def _text(table: pd.DataFrame, latents: pd.DataFrame) -> str:
    said = [
        f"  {row.set}, {'embedding sum' if row.layer < 0 else f'L{row.layer}'}: additive "
        f"{ranged(row, 'additive')} (permuted "
        f"{row.null:.2f}), left-out cells found {row.found:.2f} (permuted {row.found_null:.2f})"
        for row in table.itertuples()
    ]
    median = latents.groupby("site", sort=False)["interaction"].median()
    shares = ", ".join(f"{site} {value:.2f}" for site, value in median.items())
    return (
        "What the paper saw (abstract only): sums of parts work for classifying and retrieving in "
        "CLIP.\n\nWhat this model shows (95 % intervals over levels of the first factor):\n"
        + "\n".join(said)
        + f"\nInteraction's share of a latent's variance, median: {shares or 'no latents'}."
    )
