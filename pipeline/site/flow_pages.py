"""The flow graph as the pages show it (docs/decisions/0003-atlas-shards.md).

1. `flow_shard`: the links that end at one site, by target and rank
2. `pairs_json`: pairs of dictionaries with their links and null
3. `trunk_shard`: every living feature of the residual stream on one path through the layers
4. `community_shard`: communities with their size, layers and typical tokens. A token is typical
   when the members are active on it and few other communities are (class-TF-IDF over the members'
   token shares); the three most typical name the community.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pipeline.describe.columns import PAD, Columns
from pipeline.describe.corpus import Corpus
from pipeline.flow.graph import RELATIONS, FlowGraph
from pipeline.flow.trunks import BEGINS, ENDS, trunks_of, written_by_site
from pipeline.site.shards import Shard, narrow

FEWEST_LAYERS = 3  # of what the headline and the flag on a feature call a trunk
_N_TOKENS = 8


def flow_shard(graph: FlowGraph, site: int) -> Shard:
    """The links that end at one site."""
    links, start, n = graph.links, graph.start, graph.n_latents[site]
    here = links.iloc[slice(*links["target"].searchsorted(start[site : site + 2]))]
    source = here["source"].to_numpy()
    source_site = graph.site_of(source)
    relation = here["relation"].astype(str).map(RELATIONS.index)
    columns = {
        "target_offset": np.searchsorted(here["target"] - start[site], np.arange(n + 1)).astype(
            np.uint32
        ),
        "source_site": source_site.astype(np.uint16),
        "source": narrow(source - start[source_site], max(graph.n_latents)),
        "relation": relation.to_numpy(np.uint8),
        "rank": here["rank"].clip(upper=255).to_numpy().astype(np.uint8),
        "cosine": _scaled(here, "cosine", np.int16, -32768),
        "q": _log_q(here),
        "pearson": _scaled(here, "pearson", np.int16, -32768),
        "jaccard": _scaled(here, "jaccard", np.uint16, 65535),
        "margin": _scaled(here, "margin", np.int16, -32768),
        "mutual": here["mutual"].to_numpy(np.uint8),
        "gradient_effect": _floats(here, "gradient_effect").astype(np.float32),
        "causal_success": _scaled(here, "causal_success", np.uint8, 255, scale=200),
        "causal_change": _floats(here, "causal_change").astype(np.float32),
        "causal_n": np.nan_to_num(_floats(here, "causal_n")).clip(0, 65535).astype(np.uint16),
    }
    return Shard(columns=columns)


def pairs_json(graph: FlowGraph) -> list[dict[str, Any]]:
    """The pairs of dictionaries with their links and null, for `flow/model`."""
    place = {site.short: i for i, site in enumerate(graph.sites)}
    return [_pair_json(row, place) for row in graph.pairs.to_dict(orient="records")]


def trunk_shard(graph: FlowGraph, features: pd.DataFrame) -> Shard:
    """`flow/trunks`; `features` has a row a feature in the graph's order. A trunk is named by its
    best-scored label."""
    n_active = features["n_active"].to_numpy()
    trunks = trunks_of(graph, n_active > 0)
    known = features["label_score"].fillna(-1.0).to_numpy()[trunks.feature]
    spans = zip(trunks.offset[:-1], trunks.offset[1:], strict=True)
    best = np.array([a + int(known[a:b].argmax()) for a, b in spans], dtype=np.int64)
    site = graph.site_of(trunks.feature)
    community = graph.nodes["community"].to_numpy()[trunks.feature[best]]
    columns = {
        "length": trunks.length.astype(np.uint16),
        "begin": trunks.begin.astype(np.uint8),
        "end": trunks.end.astype(np.uint8),
        "community": np.where(community < 0, PAD, community).astype(np.uint32),
        "score": np.where(known[best] < 0, 255, np.rint(254 * known[best])).astype(np.uint8),
        "site": site.astype(np.uint16),
        "latent": narrow(trunks.feature - graph.start[site], max(graph.n_latents)),
        "cosine": np.rint(trunks.cosine * 10000).astype(np.int16),
        "count": narrow(n_active[trunks.feature], int(n_active.max(initial=0)) + 1),
    }
    texts = {
        "begins": list(BEGINS),
        "ends": list(ENDS),
        "labels": features["label"].iloc[trunks.feature[best]].tolist(),
        "written": written_by_site(graph),
        "modules": _modules(graph, n_active > 0),
    }
    return Shard(json=texts, columns=columns)


def community_shard(graph: FlowGraph, columns: Sequence[Columns], corpus: Corpus) -> Shard:
    """Every community with two features or more, largest first."""
    community = graph.nodes["community"].to_numpy()
    member = community >= 0
    ids, place = np.unique(community[member], return_inverse=True)
    n_by_site = np.zeros((len(ids), len(graph.sites)), dtype=np.int64)
    np.add.at(n_by_site, (place, graph.site_of(np.flatnonzero(member))), 1)
    size = n_by_site.sum(axis=1)
    order = np.lexsort((ids, -size))
    order = order[size[order] >= 2]
    tokens = _typical_tokens(community, columns, corpus)
    token = np.full((len(order), _N_TOKENS), PAD, dtype=np.uint32)
    for row, c in enumerate(ids[order]):
        listed = tokens.get(int(c), [])
        token[row, : len(listed)] = listed
    names = [", ".join(corpus.quoted(t) for t in tokens.get(int(c), [])[:3]) for c in ids[order]]
    return Shard(
        json={"labels": names},
        columns={
            "id": ids[order].astype(np.uint32),
            "n_by_site": np.minimum(n_by_site[order], 65535).astype(np.uint16),
            "token": token,
        },
    )


def _modules(graph: FlowGraph, alive: np.ndarray) -> list[dict[str, Any]]:
    """Living features of every MLP and attention dictionary, and how many of them are linked into
    the stream."""
    out = []
    for i, site in enumerate(graph.sites):
        if site.kind != "resid_post":
            here = slice(graph.start[i], graph.start[i + 1])
            n_linked = int(((graph.degree[1][here] > 0) & alive[here]).sum())
            out.append({"site": i, "n_alive": int(alive[here].sum()), "n_linked": n_linked})
    return out


def _typical_tokens(
    community: np.ndarray, columns: Sequence[Columns], corpus: Corpus
) -> dict[int, list[int]]:
    """The members' token shares, weighed by how few communities share the token."""
    token = np.concatenate([c["token"] for c in columns]).astype(np.int64)
    share = np.concatenate([c["token_share"] for c in columns]).astype(np.float64)
    member = (community[:, None] >= 0) & (token != PAD)
    key = (community[:, None].astype(np.int64) * len(corpus.vocabulary) + token)[member]
    if not len(key):
        return {}
    pairs, inverse = np.unique(key, return_inverse=True)
    weight = np.bincount(inverse, weights=share[member])
    of, value = pairs // len(corpus.vocabulary), pairs % len(corpus.vocabulary)
    everywhere = np.bincount(value, weights=weight, minlength=len(corpus.vocabulary))
    total = np.bincount(of, weights=weight)
    score = weight / total[of] * np.log1p(total.mean() / everywhere[value])
    order = np.lexsort((value, -score, of))
    place = np.arange(len(order)) - np.searchsorted(of[order], of[order])
    out: dict[int, list[int]] = {}
    for i in order[place < _N_TOKENS]:
        out.setdefault(int(of[i]), []).append(int(value[i]))
    return out


def _pair_json(row: Mapping[Any, Any], place: Mapping[str, int]) -> dict[str, Any]:
    def number(name: str) -> float | None:
        value = row.get(name)
        return None if value is None or pd.isna(value) else round(float(value), 4)

    n_links, n_mutual = int(row["n_links"]), number("n_mutual")
    mutual = None if n_mutual is None or not n_links else round(min(1.0, n_mutual / n_links), 4)
    same = ("threshold", "null_median", "null_p99", "agreement")
    return {
        "source": place[str(row["source_site"])],
        "target": place[str(row["target_site"])],
        "relation": str(row["relation"]),
        "n_links": n_links,
        "n_possible": None if number("n_targets") is None else int(row["n_targets"]),
        "median_cosine": number("cosine_median"),
        "mutual": mutual,
        **{name: number(name) for name in same},
        "pearson_median": number("pearson_median_kept") or number("pearson_median"),
        "initialisation": str(row.get("start", "")),
        "null": str(row.get("null", "")),
        "adjacent": bool(number("gap") in (None, 0.0, 1.0)),
    }


def _floats(frame: pd.DataFrame, name: str) -> np.ndarray:
    if name not in frame.columns:
        return np.full(len(frame), np.nan)
    return pd.to_numeric(frame[name]).to_numpy(np.float64, na_value=np.nan)


def _scaled(
    frame: pd.DataFrame, name: str, dtype: type, missing: int, *, scale: int = 10000
) -> np.ndarray:
    values = np.rint(_floats(frame, name) * scale)
    return np.where(np.isfinite(values), np.nan_to_num(values), missing).astype(dtype)


def _log_q(frame: pd.DataFrame) -> np.ndarray:
    q = _floats(frame, "q_value")
    with np.errstate(divide="ignore"):
        scaled = np.clip(np.nan_to_num(np.rint(-10 * np.log10(q)), posinf=254), 0, 254)
    return np.where(np.isnan(q), 255, scaled).astype(np.uint8)
