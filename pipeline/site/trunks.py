"""The flow graph → trunks: every living feature of the residual stream on exactly one path through
the layers.

1. `f` continues in `g` when `f` is the best kept predecessor of `g` and, of the features it is that
   of, `g` is the closest;
2. a trunk is a maximal path of such steps, a feature without any is a trunk by itself: trunks share
   no feature, and together they hold all living features of the residual stream;
3. how a trunk begins and ends says what happens to features in a layer: BEGINS, ENDS;
4. `trunk_shard` lays them out for the pages, with what writes into trunks on their way and what
   modules write at all.

Cost: O(features + links).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from pipeline.site.graph import RELATIONS, AtlasGraph
from pipeline.site.shards import Shard, narrow

BEGINS = ("first", "branch", "mlp", "attention", "both", "unexplained", "unread")
"""In the first layer; branching off a feature that goes on elsewhere; written by this layer's MLP,
attention, both; neither though they could be looked at; not known, since this layer has no
dictionary of its MLP or attention."""
ENDS = ("last", "joins", "ends")
"""In the last layer; linked onward to features with a closer predecessor; without a link onward."""
FEWEST_LAYERS = 3  # of what the headline and the flag on a feature call a trunk


@dataclass(frozen=True, kw_only=True, eq=False)
class Trunks:
    """Longest first, then by the product of cosines. `feature[offset[i] : offset[i + 1]]` are the
    numbers of trunk i's features from its first layer to its last; `cosine` is that of the step to
    a feature, 0 for a trunk's first."""

    offset: Int64[np.ndarray, "trunk_and_one"]
    feature: Int64[np.ndarray, "member"]
    cosine: Float32[np.ndarray, "member"]
    begin: Int64[np.ndarray, "trunk"]
    end: Int64[np.ndarray, "trunk"]

    def __len__(self) -> int:
        return len(self.begin)

    @cached_property
    def length(self) -> Int64[np.ndarray, "trunk"]:
        return np.diff(self.offset)

    @property
    def first(self) -> Int64[np.ndarray, "trunk"]:
        """The feature each begins with."""
        return self.feature[self.offset[:-1]]

    @property
    def last(self) -> Int64[np.ndarray, "trunk"]:
        """The feature each ends with."""
        return self.feature[self.offset[1:] - 1]


def trunks_of(graph: AtlasGraph, alive: Bool[np.ndarray, "feature"]) -> Trunks:
    """All trunks of features that are alive or linked."""
    parent, cosine = graph.parent
    child = _best_child(parent, cosine)
    continued = np.zeros(len(parent), dtype=bool)
    continued[child[child >= 0]] = True
    firsts = np.flatnonzero(_residual(graph) & (alive | (child >= 0)) & ~continued)
    paths = [_path(int(first), child) for first in firsts]
    length = np.array([len(path) for path in paths], dtype=np.int64)
    product = np.array([np.prod(cosine[path[1:]]) for path in paths])
    order = np.lexsort((firsts, -product, -length))
    feature = np.array([f for i in order for f in paths[i]], dtype=np.int64)
    offset = np.concatenate([[0], np.cumsum(length[order])]).astype(np.int64)
    step = cosine[feature]
    step[offset[:-1]] = 0
    return Trunks(
        offset=offset,
        feature=feature,
        cosine=step,
        begin=_begins(graph, firsts[order]),
        end=_ends(graph, feature[offset[1:] - 1]),
    )


def trunk_shard(
    graph: AtlasGraph,
    trunks: Trunks,
    n_firings: np.ndarray,
    labels: Sequence[str],
    score: np.ndarray,
) -> Shard:
    """`flow/trunks` of docs/decisions/0003-atlas-shards.md. `n_firings`, `labels`, `score` (NaN
    none) are by feature; a trunk is named by its best-scored label."""
    known = np.nan_to_num(score[trunks.feature], nan=-1.0)
    best = [
        a + int(known[a:b].argmax())
        for a, b in zip(trunks.offset[:-1], trunks.offset[1:], strict=True)
    ]
    site = graph.site_of(trunks.feature)
    community = graph.column("community", -1)[trunks.feature[best]]
    columns = {
        "length": trunks.length.astype(np.uint16),
        "begin": trunks.begin.astype(np.uint8),
        "end": trunks.end.astype(np.uint8),
        "community": np.where(community < 0, 0xFFFFFFFF, community).astype(np.uint32),
        "score": np.where(known[best] < 0, 255, np.rint(254 * known[best])).astype(np.uint8),
        "site": site.astype(np.uint16),
        "latent": narrow(trunks.feature - graph.start[site], max(graph.n_latents)),
        "cosine": np.rint(trunks.cosine * 10000).astype(np.int16),
        "count": narrow(n_firings[trunks.feature], int(n_firings.max(initial=0)) + 1),
    }
    names = [labels[trunks.feature[i]] for i in best]
    return Shard(
        json={
            "begins": list(BEGINS),
            "ends": list(ENDS),
            "labels": names,
            "written": _written(graph),
            "modules": _modules(graph, n_firings > 0),
        },
        columns=columns,
    )


def _path(first: int, child: np.ndarray) -> list[int]:
    path = [first]
    while child[path[-1]] >= 0:
        path.append(int(child[path[-1]]))
    return path


def _best_child(parent: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Of the features that name f as parent, the closest; −1 for none."""
    has = np.flatnonzero(parent >= 0)
    order = has[np.lexsort((has, -cosine[has], parent[has]))]
    first = (
        np.concatenate([[True], np.diff(parent[order]) != 0]) if len(order) else np.zeros(0, bool)
    )
    child = np.full(len(parent), -1, dtype=np.int64)
    child[parent[order[first]]] = order[first]
    return child


def _residual(graph: AtlasGraph) -> Bool[np.ndarray, "feature"]:
    return np.repeat([site.kind == "resid_post" for site in graph.sites], graph.n_latents)


def _module_links(graph: AtlasGraph) -> dict[str, Bool[np.ndarray, "feature"]]:
    """Which features a kept link from this layer's MLP or attention ends at."""
    links = graph.links
    target = graph.start[links.target_site] + links.target
    found = {}
    for relation in ("mlp", "attention"):
        found[relation] = np.zeros(graph.start[-1], dtype=bool)
        found[relation][
            target[(links.relation == RELATIONS.index(relation)) & (links.rank == 0)]
        ] = True
    return found


def _begins(graph: AtlasGraph, first: np.ndarray) -> np.ndarray:
    """Index into BEGINS for the first feature of every trunk."""
    site = graph.site_of(first)
    residual = [i for i, s in enumerate(graph.sites) if s.kind == "resid_post"]
    module = graph.pairs[graph.pairs["relation"].astype(str).isin(("mlp", "attention"))]
    read = np.isin(site, module["target"].unique())
    wrote = _module_links(graph)
    mlp, attention = wrote["mlp"][first], wrote["attention"][first]
    is_first = site == residual[0] if residual else np.zeros(len(site), bool)
    cases = [is_first, graph.parent[0][first] >= 0, mlp & attention, mlp, attention, read]
    names = ("first", "branch", "both", "mlp", "attention", "unexplained")
    return np.select(cases, [BEGINS.index(name) for name in names], BEGINS.index("unread"))


def _ends(graph: AtlasGraph, last: np.ndarray) -> np.ndarray:
    """Index into ENDS for the last feature of every trunk."""
    links = graph.links
    onward = np.zeros(graph.start[-1], dtype=bool)
    onward[(graph.start[links.source_site] + links.source)[links.relation == 0]] = True
    residual = [i for i, s in enumerate(graph.sites) if s.kind == "resid_post"]
    is_last = graph.site_of(last) == residual[-1] if residual else np.zeros(len(last), bool)
    return np.select(
        [is_last, onward[last]], [ENDS.index("last"), ENDS.index("joins")], ENDS.index("ends")
    )


def _written(graph: AtlasGraph) -> dict[str, list[int]]:
    """Per site, how many features that come from the layer before are also written to here, and by
    what."""
    carried, wrote = graph.parent[0] >= 0, _module_links(graph)
    mlp, attention = wrote["mlp"] & carried, wrote["attention"] & carried
    by = {"mlp": mlp & ~attention, "attention": attention & ~mlp, "both": mlp & attention}
    return {
        name: np.add.reduceat(mask.astype(np.int64), graph.start[:-1]).tolist()
        for name, mask in by.items()
    }


def _modules(graph: AtlasGraph, alive: np.ndarray) -> list[dict[str, Any]]:
    """Living features of every MLP and attention dictionary, and how many of them are linked into
    the stream."""
    out = []
    for i, site in enumerate(graph.sites):
        if site.kind != "resid_post":
            here = slice(graph.start[i], graph.start[i + 1])
            n_linked = int(((graph.degree[1][here] > 0) & alive[here]).sum())
            out.append({"site": i, "n_alive": int(alive[here].sum()), "n_linked": n_linked})
    return out
