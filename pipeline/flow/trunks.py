"""The flow graph → trunks: every living feature of the residual stream on exactly one path through
the layers.

1. `f` continues in `g` when `f` is the best kept predecessor of `g` and, of the features it is that
   of, `g` is the closest;
2. a trunk is a maximal path of such steps, a feature without any is a trunk by itself: trunks share
   no feature, and together they hold all living features of the residual stream;
3. how a trunk begins and ends says what happens to features in a layer: BEGINS, ENDS;
4. `written_by_site` counts what modules write into trunks on their way.

Cost: O(features + links).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float64, Int64

if TYPE_CHECKING:
    from pipeline.flow.graph import FlowGraph

BEGINS = ("first", "branch", "mlp", "attention", "both", "unexplained", "unread")
"""In the first layer; branching off a feature that goes on elsewhere; written by this layer's MLP,
attention, both; neither though they could be looked at; not known, since this layer has no
dictionary of its MLP or attention."""
ENDS = ("last", "joins", "ends")
"""In the last layer; linked onward to features with a closer predecessor; without a link onward."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Trunks:
    """Longest first, then by the product of cosines. `feature[offset[i] : offset[i + 1]]` are the
    numbers of trunk i's features from its first layer to its last; `cosine` is that of the step to
    a feature, 0 for a trunk's first."""

    offset: Int64[np.ndarray, "trunk_and_one"]
    feature: Int64[np.ndarray, "member"]
    cosine: Float64[np.ndarray, "member"]
    begin: Int64[np.ndarray, "trunk"]
    end: Int64[np.ndarray, "trunk"]

    def __len__(self) -> int:
        return len(self.begin)

    @property
    def length(self) -> Int64[np.ndarray, "trunk"]:
        return np.diff(self.offset)


def trunks_of(graph: FlowGraph, alive: Bool[np.ndarray, "feature"] | None = None) -> Trunks:
    """All trunks of features that are alive (the node table says which) or linked."""
    parent, cosine = graph.parent
    child = _best_child(parent, cosine)
    some = graph.nodes["alive"].to_numpy(bool) if alive is None else alive
    continued = np.zeros(len(parent), dtype=bool)
    continued[child[child >= 0]] = True
    residual = np.isin(graph.site_of(np.arange(len(parent))), graph.residual)
    firsts = np.flatnonzero(residual & (some | (child >= 0)) & ~continued)
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


def written_by_site(graph: FlowGraph) -> dict[str, list[int]]:
    """Per site, how many features that come from the layer before are also written to here, and by
    what."""
    carried = graph.parent[0] >= 0
    mlp, attention = (wrote & carried for wrote in _written(graph))
    by = {"mlp": mlp & ~attention, "attention": attention & ~mlp, "both": mlp & attention}
    return {
        name: np.add.reduceat(mask.astype(np.int64), graph.start[:-1]).tolist()
        for name, mask in by.items()
    }


def _path(first: int, child: np.ndarray) -> list[int]:
    path = [first]
    while child[path[-1]] >= 0:
        path.append(int(child[path[-1]]))
    return path


def _best_child(parent: np.ndarray, cosine: np.ndarray) -> np.ndarray:
    """Of the features that name f as parent, the closest; -1 for none."""
    has = np.flatnonzero(parent >= 0)
    order = has[np.lexsort((has, -cosine[has], parent[has]))]
    child = np.full(len(parent), -1, dtype=np.int64)
    first = np.unique(parent[order], return_index=True)[1]
    child[parent[order[first]]] = order[first]
    return child


def _written(graph: FlowGraph) -> list[Bool[np.ndarray, "feature"]]:
    """Which features are targets of a best kept link from this layer's MLP, and attention."""
    links, found = graph.links, []
    for relation in ("mlp", "attention"):
        best = (links["relation"] == relation) & (links["rank"] == 0)
        found.append(np.isin(np.arange(len(graph.nodes)), links["target"][best]))
    return found


def _begins(graph: FlowGraph, first: np.ndarray) -> np.ndarray:
    """Index into BEGINS for the first feature of every trunk."""
    site = graph.site_of(first)
    read_sites = graph.edges["target_site"][graph.edges["relation"] != "residual"].unique()
    read = np.isin([s.short for s in graph.sites], read_sites.astype(str))[site]
    mlp, attention = (wrote[first] for wrote in _written(graph))
    is_first = np.isin(site, graph.residual[:1])
    cases = [is_first, graph.parent[0][first] >= 0, mlp & attention, mlp, attention, read]
    names = ("first", "branch", "both", "mlp", "attention", "unexplained")
    return np.select(cases, [BEGINS.index(name) for name in names], BEGINS.index("unread"))


def _ends(graph: FlowGraph, last: np.ndarray) -> np.ndarray:
    """Index into ENDS for the last feature of every trunk."""
    is_last = np.isin(graph.site_of(last), graph.residual[-1:])
    cases = [is_last, graph.goes_on[last]]
    return np.select(cases, [ENDS.index("last"), ENDS.index("joins")], ENDS.index("ends"))
