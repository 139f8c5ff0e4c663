"""At which layer can a concept be read, does it fade, and is that where its feature is born?

1. A probe of the topic (logistic, all topics at once) at every layer, on the mean over tokens and
   on the last token; accuracy on texts that nothing was fitted on, intervals over texts.
2. Baselines: the mean token embedding (layer −1); permuted training labels. `jump` is the deepest
   layer whose accuracy is 1.1 times that before, `converge` the deepest with less than 3 % change;
   both as shares of the depth, as in the paper. `onset` is the first layer whose interval reaches
   the best accuracy.
3. Without a probe: silhouette and Xie–Beni index of the topics, on standardised coordinates.
4. Overlay on the flow graph: per topic, the birth layer of its best latent (deepest kept site)
   beside the topic's own onset; rank correlation with an interval over topics.

Cost: three fits a layer. Source: Jin et al. 2024, Exploring Concept Depth (arXiv 2404.07066);
separation after the Alignment Quality Index (arXiv 2506.13901). Abstracts only; thresholds from
memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import scipy.stats
from jaxtyping import Float, Int
from sklearn.metrics import silhouette_score

from featureflow.statistics import bootstrap, mean_over, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Seeded
from pipeline.lenses.concept_states import FIT, REPORT
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.probes import best_columns, right, scores
from pipeline.lenses.parts.read_out import EMBEDDING
from pipeline.run import Run

TITLE = "at which layer concepts can be read, and where the flow says their features are born"
NEEDS = ("collect", "train", "link", "concept-states")
JUMP, STILL = 1.1, 0.03


class Config(Seeded):
    """Seeds."""


def look(run: Run, config: Config) -> Finding:
    """Accuracy and separation by layer, and onsets beside births."""
    states = run.lens("concept-states")
    texts, arrays = states.tables["texts"], states.arrays
    names = [name for name in arrays if name.endswith((".mean", ".last"))]
    names.sort(key=lambda n: (-1 if n.startswith(EMBEDDING) else int(n[1 : n.index(".")]), n))
    rows, known = [], {}
    for name in run.each("probe", names):
        x = arrays[name].astype(np.float32)
        where, _, pooled = name.rpartition(".")
        row, known[name] = at_layer(x, texts, config.seed)
        layer = -1 if where == EMBEDDING else int(where[1:])
        site = None if layer < 0 else where
        rows.append({"from": where, "site": site, "layer": layer, "read": pooled} | row)
    table = pd.DataFrame(rows)
    depth = _depths(table)
    topics = _overlay(run, arrays, texts, known)
    together = _rank(topics, config.seed)
    return Finding(
        tables={"layers": table, "depth": depth, "topics": topics},
        figure=lambda: lines(
            table,
            x="layer",
            line="read",
            columns={"accuracy": "accuracy on other texts", "silhouette": "silhouette of topics"},
        ),
        text=_text(table, depth, topics, together),
        headline={
            "embedding": round(float(table["accuracy"].iloc[0]), 4),
            "best": round(float(table["accuracy"].max()), 4),
            "births and onsets": round(together["spearman"], 4),
        },
    )


def at_layer(
    x: Float[np.ndarray, "text d_model"], texts: pd.DataFrame, seed: int
) -> tuple[dict[str, Any], Float[np.ndarray, "test"]]:
    """Accuracy, its null, and separation; and which test texts were named rightly."""
    fit, report = ((texts["split"] == part).to_numpy() for part in (FIT, REPORT))
    y = pd.factorize(texts["topic"])[0]
    named_rightly = right(x[fit], y[fit], x[report], y[report])
    permuted = np.random.default_rng(seed).permutation(y[fit])
    text = np.arange(report.sum())
    row = named("accuracy", mean_over(named_rightly, text, seed=seed))
    row["null"] = float(right(x[fit], permuted, x[report], y[report]).mean())
    standard = (x[report] - x[fit].mean(0)) / (x[fit].std(0) + 1e-6)
    row |= separation(standard, y[report])
    rng = np.random.default_rng(seed)
    row["silhouette_null"] = separation(standard, rng.permutation(y[report]))["silhouette"]
    return row, named_rightly


def separation(x: Float[np.ndarray, "text column"], y: Int[np.ndarray, "text"]) -> dict[str, float]:
    """Silhouette, and the Xie–Beni index: spread within groups by the nearest two centres' distance
    (smaller is further apart)."""
    centres = np.stack([x[y == group].mean(0) for group in np.unique(y)])
    place = np.unique(y, return_inverse=True)[1]
    within = np.square(x - centres[place]).sum() / len(x)
    apart = np.square(centres[:, None] - centres[None]).sum(-1)
    nearest = apart[~np.eye(len(centres), dtype=bool)].min()
    return {"silhouette": float(silhouette_score(x, y)), "xie_beni": float(within / nearest)}


def _depths(table: pd.DataFrame) -> pd.DataFrame:
    """Jump, converge and onset of each way of reading."""
    rows = []
    for read, part in table[table["layer"] >= 0].groupby("read"):
        ordered = part.sort_values("layer")
        accuracy, layer = ordered["accuracy"].to_numpy(), ordered["layer"].to_numpy()
        rows.append({"read": read} | depths(accuracy, layer, ordered["accuracy_high"].to_numpy()))
    return pd.DataFrame(rows)


def depths(
    accuracy: Float[np.ndarray, "layer"],
    layer: Int[np.ndarray, "layer"],
    high: Float[np.ndarray, "layer"],
) -> dict[str, float]:
    """Jump and converge as shares of the depth (NaN for none), onset as a layer."""
    change, share = accuracy[1:] / np.maximum(accuracy[:-1], 1e-9), layer[1:] / layer.max()
    jumps, still = share[change >= JUMP], share[np.abs(change - 1) < STILL]
    return {
        "jump": float(jumps.max()) if len(jumps) else float("nan"),
        "converge": float(still.max()) if len(still) else float("nan"),
        "onset": float(layer[(high >= accuracy.max()).argmax()]),
    }


def _overlay(
    run: Run, arrays: Any, texts: pd.DataFrame, known: dict[str, np.ndarray]
) -> pd.DataFrame:
    """Per topic: the first layer that names it as well as any does, within the noise; its best
    latent at the deepest site with latents, and that feature's birth."""
    report = (texts["split"] == REPORT).to_numpy()
    fit = ~report
    lasts = [name for name in known if name.endswith(".last")]
    layers = np.array([int(name[1 : name.index(".")]) for name in lasts])
    site = max((n[:-8] for n in arrays if n.endswith(".latents")), key=lambda n: int(n[1:]))
    z = arrays[f"{site}.latents"].astype(np.float32)
    born = run.graph.nodes.set_index(["site", "latent"])["birth_layer"]
    rows = []
    for topic in texts["topic"].unique():
        own = (texts["topic"] == topic).to_numpy()
        share = np.array([known[name][own[report]].mean() for name in lasts])
        noise = np.sqrt(share * (1 - share) / own[report].sum())
        onset = int(layers[(share + noise >= share.max()).argmax()])
        y = own.astype(int)
        latent = int(best_columns(z[fit], y[fit], 1)[0])
        p = scores(z[fit][:, [latent]], y[fit], z[report][:, [latent]])[:, 1]
        rows.append(
            {
                "topic": topic,
                "feature": f"{site}/{latent}",
                "onset_layer": onset,
                "birth_layer": float(born.get((site, latent), np.nan)),
                "recall": float((p[own[report]] > 0.5).mean()),
            }
        )
    return pd.DataFrame(rows)


def _rank(topics: pd.DataFrame, seed: int) -> dict[str, float]:
    both = topics.dropna(subset=["birth_layer"])
    a, b = both["birth_layer"].to_numpy(), both["onset_layer"].to_numpy()

    def statistic(weights: Float[np.ndarray, "draw unit"]) -> Float[np.ndarray, "draw"]:
        places = [np.repeat(np.arange(len(a)), w.astype(int)) for w in weights]
        return np.array([scipy.stats.spearmanr(a[p], b[p]).statistic for p in places])

    if min(len(np.unique(a)), len(np.unique(b))) < 2:
        return named("spearman", bootstrap(statistic, 0, seed=seed))
    return named("spearman", bootstrap(statistic, len(a), seed=seed, n=200))


def _text(
    table: pd.DataFrame, depth: pd.DataFrame, topics: pd.DataFrame, together: dict[str, float]
) -> str:
    said = [
        f"  {row['from']}, {row['read']}: {ranged(row, 'accuracy')} (permuted "
        f"{row['null']:.2f}), silhouette {row['silhouette']:.2f} "
        f"(permuted {row['silhouette_null']:.2f})"
        for row in table.to_dict("records")
    ]
    deep = [
        f"  {row.read}: jump {row.jump:.2f}, converge {row.converge:.2f} of the depth, onset L"
        f"{row.onset:.0f}"
        for row in depth.itertuples()
    ]
    return (
        "What the paper saw (abstract only): simple concepts converge early, complex ones "
        "later.\n\nWhat this model shows, accuracy over "
        f"{topics['topic'].nunique()} topics:\n"
        + "\n".join(said)
        + "\n"
        + "\n".join(deep)
        + "\nBirth of a topic's best feature against the layer at which it can be read: rank "
        f"correlation {ranged(together, 'spearman')} over {len(topics)} topics.\n"
        "The topic of a definition "
        "is mostly in its words: read the curves against the embedding."
    )
