"""Is a concept one latent, a handful, or spread; and is the dictionary better than raw coordinates?

1. For every topic against the others, columns are ranked by |difference of means| / σ on the
   fitting texts; a logistic probe of the k best is fitted there.
2. F1 and AUROC on the reporting texts, intervals over texts, for four bases: latents, coordinates
   of the residual stream, a random rotation of them, and (null) latents with permuted labels:
   the best of 2,048 by chance.
3. Trivial baseline: a TF-IDF probe of the words.

Cost: topics × bases × k small fits a site. Source: Gurnee et al. 2023, Finding Neurons in a
Haystack (arXiv 2305.01610): early layers superpose, middle layers have dedicated neurons (abstract
only read here).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import pandas as pd
from annotated_types import Ge
from sklearn.feature_extraction.text import TfidfVectorizer
from typing_extensions import Doc

from featureflow.statistics import bootstrap_mean, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Seeded
from pipeline.lenses.concept_states import FIT, REPORT
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.probes import best_columns, judged, scores
from pipeline.run import Run

TITLE = "how few latents, coordinates or words tell a concept (sparse probes)"
NEEDS = ("collect", "train", "concept-states")
LATENTS, COORDINATES, ROTATION, NULL, WORDS = (
    "latents",
    "coordinates",
    "random rotation",
    "permuted labels",
    "words",
)


class Config(Seeded):
    """How many columns probes read."""

    sizes: Annotated[tuple[int, ...], Doc("columns k of a probe")] = (1, 4, 16, 64)
    n_shown: Annotated[int, Ge(1), Doc("latents a concept named in the table")] = 5


def look(run: Run, config: Config) -> Finding:
    """F1 by topic, site, basis and k; the best latents of each concept."""
    states = run.lens("concept-states")
    texts, arrays = states.tables["texts"], states.arrays
    sites = [name.removesuffix(".latents") for name in arrays if name.endswith(".latents")]
    sites = sorted(sites, key=lambda s: int(s[1:]))
    rows = [*_words(texts, config)]
    named_latents: list[dict[str, Any]] = []
    for site in run.each("probe", sites):
        bases = _bases(arrays, site, config.seed)
        for topic in texts["topic"].unique():
            rows += probed(bases, texts, topic, config, site=site)
            named_latents += _named(bases[LATENTS], texts, topic, site, config.n_shown)
    table, latents = pd.DataFrame(rows), pd.DataFrame(named_latents)
    summary = _summary(table, config.seed)
    best = latents.sort_values("f1", ascending=False).drop_duplicates("feature")
    return Finding(
        tables={"summary": summary, "topics": table, "latents": latents},
        figure=lambda: lines(
            summary[summary["basis"] != WORDS].assign(
                k=np.log2(summary["k"]), line=summary["basis"] + " " + summary["site"].fillna("")
            ),
            x="k",
            line="line",
            columns={"f1": "F1, mean over topics"},
            x_label="log2 of the columns read",
        ),
        text=_text(summary),
        headline={
            f"F1 of one of {basis}": round(
                float(summary[(summary["basis"] == basis) & (summary["k"] == 1)]["f1"].mean()), 4
            )
            for basis in (LATENTS, COORDINATES, ROTATION, NULL)
        },
        columns=pd.DataFrame(
            {
                "feature": best["feature"],
                "marks": best["topic"] + " (F1 " + best["f1"].round(2).astype(str) + ")",
            }
        ),
    )


def _bases(arrays: Any, site: str, seed: int) -> dict[str, np.ndarray]:
    x = arrays[f"{site}.mean"].astype(np.float32)
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.standard_normal((x.shape[1], x.shape[1])).astype(np.float32))
    latents = arrays[f"{site}.latents"].astype(np.float32)
    spread = (x - x.mean(0)) / (x.std(0) + 1e-6)
    return {LATENTS: latents, COORDINATES: x, ROTATION: spread @ rotation, NULL: latents}


def probed(
    bases: dict[str, np.ndarray], texts: pd.DataFrame, topic: str, config: Config, *, site: str
) -> Iterator[dict[str, Any]]:
    """F1 and AUROC of the k best columns of every basis for one topic."""
    fit, report = (texts["split"] == part for part in (FIT, REPORT))
    y = (texts["topic"] == topic).to_numpy().astype(int)
    rng = np.random.default_rng(config.seed)
    permuted = y.copy()
    permuted[fit] = rng.permutation(y[fit])
    for basis, x in bases.items():
        label = permuted if basis == NULL else y
        for k in config.sizes if basis != NULL else config.sizes[:1]:
            columns = best_columns(x[fit], label[fit], k)
            p = scores(x[fit][:, columns], label[fit], x[report][:, columns])[:, 1]
            f1, auc = judged(p, y[report])
            yield {"site": site, "basis": basis, "topic": topic, "k": k, "f1": f1, "auc": auc}


def _named(
    x: np.ndarray, texts: pd.DataFrame, topic: str, site: str, n: int
) -> Iterator[dict[str, Any]]:
    """The best latents of a concept, each judged alone."""
    fit, report = (texts["split"] == part for part in (FIT, REPORT))
    y = (texts["topic"] == topic).to_numpy().astype(int)
    for rank, latent in enumerate(best_columns(x[fit], y[fit], n)):
        one = x[:, [latent]]
        f1, auc = judged(scores(one[fit], y[fit], one[report])[:, 1], y[report])
        yield {"feature": f"{site}/{latent}", "topic": topic, "rank": rank, "f1": f1, "auc": auc}


def _words(texts: pd.DataFrame, config: Config) -> Iterator[dict[str, Any]]:
    """What the words alone tell."""
    fit, report = (texts["split"] == part for part in (FIT, REPORT))
    counts = TfidfVectorizer(min_df=2).fit(texts["text"][fit])
    x = counts.transform(texts["text"]).toarray()
    for topic in texts["topic"].unique():
        y = (texts["topic"] == topic).to_numpy().astype(int)
        f1, auc = judged(scores(x[fit], y[fit], x[report])[:, 1], y[report])
        row = {"site": None, "basis": WORDS, "topic": topic, "k": x.shape[1]}
        yield row | {"f1": f1, "auc": auc}


def _summary(table: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Means over topics, with intervals over topics."""
    rows = []
    for (basis, site, k), part in table.groupby(["basis", "site", "k"], dropna=False, sort=False):
        row: dict[str, Any] = {"basis": basis, "site": site, "k": k, "n_topics": len(part)}
        for column in ("f1", "auc"):
            row |= named(column, bootstrap_mean(part[column].tolist(), seed=seed))
        rows.append(row)
    return pd.DataFrame(rows)


def _text(summary: pd.DataFrame) -> str:
    said = [
        f"  {row.basis}{'' if pd.isna(row.site) else ' of ' + row.site}, k = {row.k}: F1 "
        f"{ranged(row, 'f1')}, AUROC {row.auc:.2f}"
        for row in summary.itertuples()
    ]
    return (
        "What the paper saw (abstract only): early layers use sparse combinations of neurons, "
        "middle layers have dedicated ones,\nand sparsity grows with scale.\n\n"
        "What this model shows, texts that nothing was fitted on, 95 % intervals over topics:\n"
        + "\n".join(said)
    )
