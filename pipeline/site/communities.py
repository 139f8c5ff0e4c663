"""Communities of the flow graph → what their pages show: size, layers, typical tokens, for every
one of them.

1. communities come with the nodes of the graph; those with two features or more in this atlas are
   kept;
2. a token is typical of a community when its members fire on it and few other communities do
   (class-TF-IDF over the members' token shares); the three most typical name it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.describe.columns import Columns
from pipeline.describe.corpus import Corpus
from pipeline.site.graph import AtlasGraph
from pipeline.site.shards import PAD, Shard

N_TOKENS = 8


def community_shard(graph: AtlasGraph, columns: Sequence[Columns], corpus: Corpus) -> Shard:
    """`flow/communities` of docs/decisions/0003-atlas-shards.md, largest first."""
    community = graph.column("community", -1)
    member = community >= 0
    site = graph.site_of(np.arange(len(community)))
    ids, place = np.unique(community[member], return_inverse=True)
    n_by_site = np.zeros((len(ids), len(graph.sites)), dtype=np.int64)
    np.add.at(n_by_site, (place, site[member]), 1)
    size = n_by_site.sum(axis=1)
    order = np.lexsort((ids, -size))
    order = order[size[order] >= 2]
    tokens = _typical_tokens(graph, columns, corpus)
    token = np.full((len(order), N_TOKENS), PAD, dtype=np.uint32)
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


def _typical_tokens(
    graph: AtlasGraph, columns: Sequence[Columns], corpus: Corpus
) -> dict[int, list[int]]:
    """The members' token shares, weighed by how few communities share the token."""
    community = graph.column("community", -1)
    token = np.concatenate([c["token"] for c in columns]).astype(np.int64)
    share = np.concatenate([c["token_share"] for c in columns]).astype(np.float64)
    member = (community[:, None] >= 0) & (token != PAD)
    key = (community[:, None] * len(corpus.vocabulary) + token)[member]
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
    for i in order[place < N_TOKENS]:
        out.setdefault(int(of[i]), []).append(int(value[i]))
    return out
