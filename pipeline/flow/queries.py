"""What is asked of a flow graph, as functions over arrays: walks, reachable sets, best paths,
splits, merges.

Nodes are row numbers of the node table, edges row numbers of the edge table; `FlowGraph` (graph.py)
gives both and turns the answers into features. Edges point forward in the computation, so the graph
has no cycles.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from featureflow.sites import FeatureId


@dataclass(frozen=True, kw_only=True)
class ChainStep:
    """One feature of a chain. `cosine`, `q_value` and `edge` (a row number of the edge table) are
    of the link to the step before it; None at the first."""

    feature: FeatureId
    cosine: float | None
    q_value: float | None
    edge: int | None = None


@dataclass(frozen=True, kw_only=True)
class Reached:
    """A feature that flow connects with another: over how few links, and how strongly.

    `strength` is the product of the cosines along the strongest of the shortest ways.
    """

    feature: FeatureId
    hops: int
    strength: float


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A module's feature that feeds a residual feature: the relation (mlp, attention) and the
    evidence of the link."""

    feature: FeatureId
    relation: str
    cosine: float
    q_value: float


@dataclass(frozen=True, kw_only=True)
class Trunk:
    """A path of steps to the closest feature (flow/trunks.py). `weakest` is the smallest cosine
    along it."""

    features: tuple[FeatureId, ...]
    mean_cosine: float
    weakest: float

    @property
    def length(self) -> int:
        return len(self.features)


@dataclass(frozen=True, kw_only=True)
class Adjacency:
    """Kept edges grouped by one of their ends."""

    start: np.ndarray
    order: np.ndarray

    @classmethod
    def of(cls, end: np.ndarray, kept: np.ndarray, n_nodes: int) -> Adjacency:
        """Group the kept edges by `end`, the node number at that end of each edge."""
        rows = np.flatnonzero(kept)
        order = rows[np.argsort(end[rows], kind="stable")]
        return cls(start=np.searchsorted(end[order], np.arange(n_nodes + 1)), order=order)

    def rows(self, number: int) -> np.ndarray:
        """The edges at a node."""
        return self.order[self.start[number] : self.start[number + 1]]


@dataclass(frozen=True, kw_only=True)
class Step:
    """For every node its next node in one direction and the edge to it; -1 where there is none."""

    edge: np.ndarray
    node: np.ndarray

    @classmethod
    def of(cls, chosen: np.ndarray, here: np.ndarray, there: np.ndarray, n_nodes: int) -> Step:
        """From the `chosen` edges, of which each node has at most one."""
        edge, node = np.full(n_nodes, -1), np.full(n_nodes, -1)
        rows = np.flatnonzero(chosen)
        edge[here[rows]], node[here[rows]] = rows, there[rows]
        return cls(edge=edge, node=node)

    def walk(self, number: int) -> Iterator[tuple[int, int]]:
        """(edge, node) after node, until there is no next."""
        while self.node[number] >= 0:
            yield int(self.edge[number]), int(self.node[number])
            number = int(self.node[number])


def reachable(
    start: int, along: Adjacency, other: np.ndarray, cosine: np.ndarray, max_hops: int | None
) -> list[tuple[int, int, float]]:
    """(node, hops, strength) of every node reached from `start`, nearest and strongest first."""
    frontier, found, hops = {start: 1.0}, {start: (0, 1.0)}, 0
    while frontier and (max_hops is None or hops < max_hops):
        hops += 1
        ahead: dict[int, float] = {}
        for number, strength in frontier.items():
            for row in along.rows(number):
                reached = int(other[row])
                if reached not in found:
                    ahead[reached] = max(ahead.get(reached, 0.0), strength * float(cosine[row]))
        found |= {number: (hops, strength) for number, strength in ahead.items()}
        frontier = ahead
    del found[start]
    return sorted(
        ((n, hops, s) for n, (hops, s) in found.items()),
        key=lambda item: (item[1], -item[2], item[0]),
    )


def strongest_path(
    start: int, end: int, out: Adjacency, target: np.ndarray, cosine: np.ndarray
) -> list[tuple[int | None, int]] | None:
    """(edge, node) along the path with the largest product of cosines (Dijkstra over −log); None
    for no path."""
    queue: list[tuple[float, int]] = [(0.0, start)]
    cost: dict[int, float] = {start: 0.0}
    came_by: dict[int, tuple[int, int]] = {}
    while queue:
        spent, number = heapq.heappop(queue)
        if number == end:
            return _retraced(start, end, came_by)
        if spent > cost[number]:
            continue
        for row in out.rows(number):
            ahead, total = int(target[row]), spent - float(np.log(np.clip(cosine[row], 1e-12, 1.0)))
            if total < cost.get(ahead, np.inf):
                cost[ahead], came_by[ahead] = total, (int(row), number)
                heapq.heappush(queue, (total, ahead))
    return None


def _retraced(
    start: int, end: int, came_by: dict[int, tuple[int, int]]
) -> list[tuple[int | None, int]]:
    path: list[tuple[int | None, int]] = []
    number = end
    while number != start:
        row, before = came_by[number]
        path.append((row, number))
        number = before
    return [(None, start), *reversed(path)]
