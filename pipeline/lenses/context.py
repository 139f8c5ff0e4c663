"""How much of the text before a token does a feature read: one token, a phrase, a sentence, the
document?

1. Held-out tokens deep in their context are read again with only the start token and the last k
   tokens (k = 1, 2, 4 …).
2. keep(k) of a feature is the share of its activations that are still there. Its *reach* is the
   smallest k with keep ≥ `least`. `value` compares pre-activations instead: TopK drops a latent
   because others are stronger.
3. Null: the same token after k − 1 tokens of another document. What is kept there owes nothing to
   the context.
4. Layers: D(k) = mean of 1 − cosine between the full row and the short one, both less the site's
   mean; the same under foreign text.

Cost: (k + 1) tokens through the model for every row, k and kind of context: 1,000 rows with
k = 1, 4, 16 are 60,000 tokens. Source: contrasting chains of embeddings, after "Understanding
Language Prior of LVLMs" (abstract only): there with and without the image, here
with and without context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Gt, Le
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Doc

from featureflow.errors import UserError
from featureflow.sites import Site, residual_sites
from featureflow.statistics import mean_over, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.layers import spread
from pipeline.run import Run

TITLE = "how much context each feature reads, and at which layer context enters"
NEEDS = ("collect", "train")
KINDS = ("own", "foreign")
_BATCH = 32
BADGES = ((1, "one token"), (4, "phrase"), (16, "sentence"))
"""What a reach of at most so many tokens is called; beyond them, `document`."""


class Config(Sampled):
    """On how many rows, and how short the contexts are."""

    n_rows: Annotated[int, Ge(4), Doc("held-out rows that are read again")] = 1000
    lengths: Annotated[tuple[int, ...], Doc("tokens that are left, this one included")] = (
        1,
        2,
        4,
        8,
        16,
        32,
        64,
    )
    least: Annotated[float, Gt(0), Le(1), Doc("share of activations that reach must keep")] = 0.8
    few: Annotated[int, Ge(1), Doc("activations a feature needs to be given a reach")] = 8


def look(run: Run, config: Config) -> Finding:
    """Reach of features and distance by layer. Raises UserError when contexts are too short."""
    fitting = tuple(k for k in config.lengths if k < run.store.n_context - 1)
    config = config.replace(lengths=fitting or config.lengths)
    rows = deep_rows(run, config)
    sites = list(run.saes)
    stream = residual_sites(sites)
    full = {site: _read(run, site, rows) for site in sites}
    codes = {site: run.saes[site].encode(x) > 0 for site, x in full.items()}
    document = run.tokens.document[rows].astype(np.int64)
    layers: list[dict[str, Any]] = []
    kept: dict[Site, list[tuple[str, int, Tensor, Tensor]]] = {site: [] for site in sites}
    for kind in KINDS:
        for k in config.lengths:
            run.context.progress(f"read {k} tokens ({kind})", 0, 1)
            short = _short(run, sites, contexts(run, rows, k, kind))
            for site in sites:
                found = run.saes[site].encode(short[site]) > 0
                pre = run.saes[site].pre_activations(short[site]).relu()
                kept[site].append((kind, k, found & codes[site], pre * codes[site]))
                if site in stream:
                    mean = torch.from_numpy(run.store.statistics(site).mean)
                    apart = 1 - torch.cosine_similarity(full[site] - mean, short[site] - mean)
                    interval = mean_over(apart.double().numpy(), document, seed=config.seed)
                    where = {"site": site.short, "layer": site.layer, "kind": kind, "k": k}
                    layers.append(where | named("distance", interval))
    run.context.progress("read short contexts", 1, 1)
    table = pd.DataFrame(layers)
    features = pd.concat(
        [_of_site(run, site, full[site], codes[site], kept[site], config) for site in sites],
        ignore_index=True,
    )
    by_layer = _by_layer(features, config)
    shown = spread(stream or sites, 6)
    return Finding(
        tables={"layers": table, "kept": by_layer, "features": features},
        figure=lambda: lines(
            by_layer[by_layer["site"].isin([site.short for site in shown])].assign(
                k=lambda short: np.log2(short["k"])
            ),
            x="k",
            line="site",
            columns={"kept": "share of activations kept", "foreign": "kept after foreign text"},
            x_label="log2 of the tokens that are left",
        ),
        text=_text(table, by_layer, features, config),
        headline={
            "n_features": len(features),
            "reach_one_token": round(float((features["reach"] == min(config.lengths)).mean()), 4),
            "reach_beyond": round(float(features["reach"].isna().mean()), 4),
        },
        columns=features[["feature", "reads", "reach"]],
    )


def deep_rows(run: Run, config: Config) -> Int[np.ndarray, "row"]:
    """Held-out rows with more tokens of their context before them than the longest short one."""
    tokens = run.tokens
    kept = run.store.kept_rows("validation", config.filters)
    deep = kept[tokens.position[kept] > max(config.lengths)]
    if not len(deep):
        raise UserError(
            "no held-out row has so much context",
            where=run.store.url,
            expected=f"contexts longer than {max(config.lengths) + 1} tokens",
            found=f"{run.store.n_context} tokens",
            fix="shorten lengths, or raise collect.n_context",
        )
    return np.sort(np.random.default_rng(config.seed).permutation(deep)[: config.n_rows])


def contexts(run: Run, rows: Int[np.ndarray, "row"], k: int, kind: str) -> Int[Tensor, "row short"]:
    """The start token, then k tokens that end in each row's own. The k − 1 before it are its own,
    or those of a row of another document."""
    tokens = run.tokens
    start = rows - tokens.position[rows].astype(np.int64)
    before = rows[:, None] + np.arange(-k + 1, 0)
    if kind == "foreign":
        order = np.argsort(tokens.document[rows], kind="stable")
        partner = np.empty(len(rows), dtype=np.int64)
        partner[order] = np.roll(order, len(rows) // 2)  # half of the documents away
        before = before[partner]
    ids = np.concatenate([start[:, None], before, rows[:, None]], axis=1)
    return torch.from_numpy(tokens.id[ids].astype(np.int64))


def _read(run: Run, site: Site, rows: Int[np.ndarray, "row"]) -> Float[Tensor, "row d_model"]:
    block = run.store.chunk_rows
    parts = np.split(rows, np.flatnonzero(np.diff(rows // block)) + 1)
    read = [run.store.read(site, int(p[0]), int(p[-1]) + 1)[p - p[0]] for p in parts]
    return torch.from_numpy(np.concatenate(read))


def _short(run: Run, sites: Sequence[Site], ids: Tensor) -> dict[Site, Tensor]:
    """Activations of the last token of every short context."""
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for batch in ids.split(_BATCH):
        for site, value in run.model.activations(batch, sites).items():
            parts[site].append(value[:, -1].float().cpu())
    return {site: torch.cat(each) for site, each in parts.items()}


def _of_site(
    run: Run,
    site: Site,
    full: Tensor,
    active: Tensor,
    kept: list[tuple[str, int, Tensor, Tensor]],
    config: Config,
) -> pd.DataFrame:
    n = active.sum(0).numpy()
    enough = np.flatnonzero(n >= config.few)
    strength = (run.saes[site].pre_activations(full) * active).sum(0)
    columns: dict[str, Any] = {"feature": [f"{site.short}/{i}" for i in enough], "n": n[enough]}
    for kind, k, still, value in kept:
        share = still.sum(0).numpy()[enough] / n[enough]
        columns[f"keep_{k}" if kind == "own" else f"foreign_{k}"] = share
        if kind == "own":
            columns[f"value_{k}"] = (value.sum(0) / strength).numpy()[enough]
    table = pd.DataFrame(columns)
    shares = table[[f"keep_{k}" for k in config.lengths]].to_numpy()
    return table.assign(**reach_of(shares, config.lengths, config.least))


def reach_of(
    shares: Float[np.ndarray, "feature length"], lengths: Sequence[int], least: float
) -> dict[str, Any]:
    """The smallest length from which on at least `least` is kept (NaN for none), and its name."""
    order = np.argsort(lengths)
    enough = np.minimum.accumulate(shares[:, order[::-1]] >= least, axis=1)[:, ::-1]
    sizes = np.array(lengths, dtype=float)[order]
    reach = np.where(enough.any(1), sizes[enough.argmax(1)], np.nan)
    names = [next((name for most, name in BADGES if r <= most), "document") for r in reach]
    return {"reach": reach, "reads": names}


def _by_layer(features: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Share of all activations that are kept, by site and length."""
    rows = []
    for site, part in features.groupby(features["feature"].str.rpartition("/")[0], sort=False):
        for k in config.lengths:
            kept, foreign = (
                float(np.average(part[f"{c}_{k}"], weights=part["n"])) for c in ("keep", "foreign")
            )
            rows.append({"site": site, "k": k, "kept": kept, "foreign": foreign})
    return pd.DataFrame(rows, columns=["site", "k", "kept", "foreign"])


def _text(
    table: pd.DataFrame, by_layer: pd.DataFrame, features: pd.DataFrame, config: Config
) -> str:
    said = [
        f"  {row.site}, {row.k} tokens: {row.kept:.2f} kept, {row.foreign:.2f} after foreign text"
        for row in by_layer.itertuples()
    ]
    first = table[(table["k"] == min(config.lengths)) & (table["kind"] == "own")]
    apart = [f"  {row.site}: {ranged(row, 'distance')}" for row in first.itertuples()]
    names = features["reads"].value_counts()
    reads = ", ".join(f"{name} {count}" for name, count in names.items())
    return (
        "What the paper saw (abstract only): one layer at which the image enters, in all 54 "
        "combinations of model and data.\n\n"
        f"What this model shows: {len(features)} features with {config.few} or more activations "
        f"read {reads or 'nothing'}.\nShare of activations kept:\n"
        + "\n".join(said)
        + f"\nDistance of the row with {min(config.lengths)} token left, by layer (95 % "
        "intervals over documents):\n" + "\n".join(apart)
    )
