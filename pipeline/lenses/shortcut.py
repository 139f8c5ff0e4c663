"""What would the model say if it stopped after a layer, and what does a feature promote by the time
it arrives?

1. Held-out rows of the last layer give the model's own distribution. A row of an earlier layer is
   read as the last one: as it is (the logit lens), carried by its map (lens `translators`), and,
   as the baseline that knows the token alone, carried from the token's embedding.
2. Per layer: share of rows whose own first token is the read-out's first (precision@1) or among its
   ten (precision@10), and surprisal, −log p of the model's first token; intervals over documents.
3. Early exit: the model stops at the first layer whose two best carried tokens differ by more than
   λ in probability. λ is the smallest that agrees with the model on 95 % of the rows of a third of
   the documents; layers saved and agreement are reported on the other documents.
4. Vocabulary of features: the ten tokens that a decoder row d promotes directly, u(d), and carried,
   u(d A). Does one of the ten come next more often where the feature is active than elsewhere?
   Binomial test by feature, Benjamini–Hochberg within a site; beside it the ten of another feature.

Cost: three read-outs a row and layer. Source: Yom Din et al. 2023, Jump to Conclusions (arXiv
2303.09435), its text was not read here. The map is a regression: it mixes what a vector causes with
what goes with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge, Gt, Lt
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Doc

from featureflow.sites import Site, parse_site
from featureflow.statistics import mean_over, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.held_out import choose_rows
from pipeline.lenses.parts.read_out import (
    EMBEDDING,
    N_TOKENS,
    carried,
    document_of,
    followed,
    iter_at,
    iter_log_p,
    later,
    rows_at,
    vocabulary_of,
    whole_stream,
)
from pipeline.run import Run

TITLE = "what the model would say after each layer, and what features promote by the end"
NEEDS = ("collect", "train", "translators")
CLAIMS = ("n_announcing_permuted",)
WAYS = ("direct", "carried", "permuted")


class Config(Sampled):
    """On how much text the read-outs are compared."""

    n_rows: Annotated[int, Ge(8), Doc("held-out rows read out at every layer")] = 1000
    n_tokens: Annotated[int, Ge(8), Doc("held-out rows on which features are tested")] = 8192
    agreement: Annotated[
        float, Gt(0), Lt(1), Doc("agreement with the whole model that λ is chosen for")
    ] = 0.95
    rate: Annotated[float, Gt(0), Lt(1), Doc("false-discovery rate of announcing features")] = 0.05


def look(run: Run, config: Config) -> Finding:
    """Precision by layer, early exit, and the vocabulary of every feature. Raises UserError when
    the last layer is not stored."""
    maps = run.lens("translators").arrays
    sites = whole_stream(run)
    layers, exits = _layers(run, sites, maps, config)
    vocabulary = [
        of_features(run, site, maps.get(site.short), config)
        for site in sites[:-1]
        if site in run.saes
    ]
    features = pd.concat(vocabulary, ignore_index=True) if vocabulary else pd.DataFrame()
    announcing = _announcing(features, config.rate)
    shown = features[["feature", "carried"]] if len(features) else None
    return Finding(
        tables={"layers": layers, "exit": exits, "announcing": announcing, "features": features},
        figure=lambda: lines(
            layers,
            x="layer",
            line="read",
            columns={"precision_1": "precision@1", "surprisal": "surprisal, nats"},
        ),
        text=_text(layers, exits, announcing),
        headline=_headline(layers, exits, announcing),
        columns=None if shown is None else shown.rename(columns={"carried": "promotes by the end"}),
    )


def _layers(
    run: Run, sites: list[Site], maps: Mapping[str, np.ndarray], config: Config
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The read-outs of every layer; and early exit."""
    blocks = choose_rows(run, config, config.n_rows)
    document = document_of(run, blocks)
    truth = torch.cat([p.argmax(-1) for p in iter_log_p(run, rows_at(run, sites[-1], blocks))])
    rows, best, gaps = [], [], []
    for site in run.each("read out", sites[:-1]):
        values = rows_at(run, site, blocks)
        ways = {"as it is": values, "carried": carried(values, maps, site.short)}
        if site == sites[0]:
            ways["carried from the embedding"] = carried(
                rows_at(run, None, blocks), maps, EMBEDDING
            )
        for name, value in ways.items():
            scores, first, gap = _scores(run, value, truth)
            where = {"site": site.short, "layer": site.layer, "read": name}
            rows.append(where | _summary(scores, document, config.seed))
            if name == "carried":
                best.append(first)
                gaps.append(gap)
    table = pd.DataFrame(rows)
    baseline = table[table["read"] == "carried from the embedding"]
    flat = [baseline.assign(site=site.short, layer=site.layer) for site in sites[1:-1]]
    layers = [site.layer for site in sites]
    exits = _early_exit(np.stack(best), np.stack(gaps), truth.numpy(), document, layers, config)
    return pd.concat([table, *flat], ignore_index=True), exits


def _scores(
    run: Run, x: Float[Tensor, "row d_model"], truth: Int[Tensor, "row"]
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Per row: whether the model's own token is first, among ten, and its surprisal; the read-out's
    first token, and its lead over the second in probability."""
    hits, ten, surprisal, first, gap = [], [], [], [], []
    for log_p, own in zip(iter_log_p(run, x), truth.split(256), strict=True):
        top = log_p.topk(min(N_TOKENS, log_p.shape[1]))
        hits.append(top.indices[:, 0] == own)
        ten.append((top.indices == own[:, None]).any(1))
        surprisal.append(-log_p.gather(1, own[:, None])[:, 0])
        first.append(top.indices[:, 0])
        gap.append(top.values[:, 0].exp() - top.values[:, 1].exp())
    scores = {"precision_1": hits, "precision_10": ten, "surprisal": surprisal}
    joined = {name: torch.cat(values).double().numpy() for name, values in scores.items()}
    return joined, torch.cat(first).numpy(), torch.cat(gap).numpy()


def _summary(scores: dict[str, np.ndarray], document: np.ndarray, seed: int) -> dict[str, float]:
    """Means over rows, with intervals over documents."""
    row: dict[str, float] = {}
    for name, values in scores.items():
        row |= named(name, mean_over(values, document, seed=seed))
    return row


def _early_exit(
    first: Int[np.ndarray, "layer row"],
    gap: Float[np.ndarray, "layer row"],
    truth: Int[np.ndarray, "row"],
    document: Int[np.ndarray, "row"],
    layers: list[int],
    config: Config,
) -> pd.DataFrame:
    """λ chosen on a third of the documents; agreement and layers saved on the others."""
    names = np.random.default_rng(config.seed).permutation(np.unique(document))
    choosing = np.isin(document, names[: max(1, len(names) // 3)])

    def exits(threshold: float) -> tuple[np.ndarray, np.ndarray]:
        stops = np.concatenate([gap > threshold, np.ones((1, len(truth)), dtype=bool)])
        at = stops.argmax(0)
        said = np.concatenate([first, truth[None]])[at, np.arange(len(truth))]
        return said == truth, np.array(layers)[at]

    fitting = [
        t for t in np.linspace(0, 1, 201) if exits(t)[0][choosing].mean() >= config.agreement
    ]
    threshold = min(fitting, default=1.0)
    agrees, at = exits(threshold)
    saved = 1 - (at + 1) / (layers[-1] + 1)
    rest = ~choosing if (~choosing).any() else choosing
    scores = {"agreement": agrees[rest].astype(float), "layers_saved": saved[rest]}
    row = {"threshold": threshold, "n_rows": int(rest.sum())}
    return pd.DataFrame([row | _summary(scores, document[rest], config.seed)])


def of_features(run: Run, site: Site, A: np.ndarray | None, config: Config) -> pd.DataFrame:
    """The ten tokens of every feature, direct and carried, and how often one of them comes next."""
    sae, vocabulary = run.saes[site], vocabulary_of(run)
    blocks = choose_rows(run, config, config.n_tokens)
    following = later(run, np.concatenate(blocks), 1)
    next_id = run.tokens.id[following].astype(np.int64)
    active = torch.cat([sae.encode(x) > 0 for x in iter_at(run, site, blocks)]).numpy()
    d = sae.W_dec.detach().float().cpu()
    tens = {"direct": vocabulary.promoted(d)}
    tens["carried"] = tens["direct"] if A is None else vocabulary.promoted(d @ torch.from_numpy(A))
    order = np.random.default_rng(config.seed).permutation(len(d))
    tens["permuted"] = tens["carried"][order]
    table = pd.DataFrame({"feature": [f"{site.short}/{i}" for i in range(len(d))]})
    for way, ten in tens.items():
        known = following >= 0
        table = table.join(followed(ten, active[known], next_id[known], name=way))
        if way != "permuted":
            table[way] = vocabulary.words(ten)
    return table.assign(n_active=active[following >= 0].sum(0))


def _announcing(features: pd.DataFrame, rate: float) -> pd.DataFrame:
    """Per site and way: how many of the tested features announce, and their median lift."""
    if not len(features):
        return pd.DataFrame(columns=["site", "way", "n_tested", "n", "share", "lift_median"])
    rows = []
    for site, part in features.groupby(features["feature"].str.rpartition("/")[0], sort=False):
        for way in WAYS:
            q, lift = part[f"{way}_q"].dropna(), part[f"{way}_lift"].dropna()
            n = int((q <= rate).sum())
            row = {"site": site, "way": way, "n_tested": len(q), "n": n}
            rows.append(row | {"share": n / max(len(q), 1), "lift_median": lift.median()})
    return pd.DataFrame(rows).sort_values(
        "site", key=lambda names: names.map(parse_site), kind="stable", ignore_index=True
    )


def _headline(
    layers: pd.DataFrame, exits: pd.DataFrame, announcing: pd.DataFrame
) -> dict[str, Any]:
    found = layers.groupby("read")["precision_1"].mean()
    numbers = {f"precision@1 {name}": round(float(value), 4) for name, value in found.items()}
    numbers["layers saved"] = round(float(exits["layers_saved"].iloc[0]), 4)
    counts = announcing.groupby("way")["n"].sum()
    return numbers | {f"n_announcing_{way}": int(counts.get(way, 0)) for way in WAYS}


def _text(layers: pd.DataFrame, exits: pd.DataFrame, announcing: pd.DataFrame) -> str:
    said = [
        f"  {row.site}, {row.read}: precision@1 {ranged(row, 'precision_1')}, "
        f"@10 {row.precision_10:.2f}, surprisal {row.surprisal:.1f}"
        for row in layers.itertuples()
    ]
    exit_ = exits.iloc[0]
    named = [
        f"  {row.site}, {row.way}: {row.n} of {row.n_tested} features announce, median lift "
        f"{row.lift_median:.1f}"
        for row in announcing.itertuples()
    ]
    return (
        "What the paper saw (abstract only): the linear map beats the logit lens at every layer; "
        "with 95 % agreement\n7.9 % (GPT-2) and 5.4 % (BERT) more layers are saved.\n\n"
        "What this model shows, held-out documents, 95 % intervals:\n"
        + "\n".join(said)
        + f"\nEarly exit: {exit_['layers_saved']:.1%} of the layers saved at agreement "
        f"{exit_['agreement']:.2f} (λ {exit_['threshold']:.2f}).\n"
        "Does one of a feature's ten tokens come next? (permuted: the ten of another feature)\n"
        + "\n".join(named or ["  there are no SAEs before the last layer"])
    )
