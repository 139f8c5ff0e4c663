"""The flow graph, opened: features of all layers and the kept links between them, with queries of one line each.

    graph = FlowGraph.open("artifacts/laptop/link")
    graph.chain("L12/402")          the residual chain through a feature, backward and forward, best link each time
    graph.ancestors("L12/402")      everything that flows into it;   graph.descendants(…)
    graph.best_path("L3/7", "L12/402")      graph.trunks()      graph.splits()      graph.merges()      graph.communities()

Every link points forward in the computation. Queries follow kept links only; `thresholds` can replace what the linking
run kept by the paper's cosines or by another false-discovery rate. Cost: each query touches only the links it follows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import assert_never

import numpy as np
import pandas as pd

from data.sites import FeatureId, Site, parse_feature, parse_site
from pipeline.flow.nodes import node_numbers
from pipeline.flow.options import Calibrated, Fixed, Thresholds
from pipeline.flow.tables import FlowTables, read_tables
from sae.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ChainStep:
    """One feature of a chain. `cosine` and `q_value` are of the link to the step before it; None at the first."""

    feature: FeatureId
    cosine: float | None
    q_value: float | None


@dataclass(frozen=True, kw_only=True)
class Reached:
    """A feature that flow connects with another: over how many links, along the strongest of the shortest ways."""

    feature: FeatureId
    hops: int
    strength: float
    """Product of the cosines along the way."""


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A module's feature that feeds a residual feature: the relation (mlp, attention) and the evidence of the link."""

    feature: FeatureId
    relation: str
    cosine: float
    q_value: float


class FlowGraph:
    """Features and kept links. `nodes`, `edges` and `pairs` are the whole tables; kept or not."""

    def __init__(self, tables: FlowTables, *, thresholds: Thresholds | None = None) -> None:
        self.nodes = tables.nodes
        self.edges = tables.edges
        self.pairs = tables.pairs
        self.warnings = tables.warnings
        self.kept = _kept(tables.edges, thresholds)

    @classmethod
    def open(cls, folder: str | Path, *, thresholds: Thresholds | None = None) -> FlowGraph:
        """Open the folder of a link artifact. Raises UserError with every problem."""
        return cls(read_tables(Path(folder)), thresholds=thresholds)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """In order of the computation."""
        return tuple(parse_site(name) for name in pd.unique(self.nodes["site"]))

    def node(self, feature: FeatureId | str) -> pd.Series:
        """The row of a feature in the node table."""
        return self.nodes.iloc[self.number(feature)]

    def number(self, feature: FeatureId | str) -> int:
        """The row number of a feature. Raises UserError for one that the graph does not have."""
        wanted = parse_feature(feature) if isinstance(feature, str) else feature
        start, n = self._extent.get(wanted.site.short, (0, 0))
        if not n:
            known = ", ".join(site.short for site in self.sites)
            raise UserError(f"the flow graph has no site {wanted.site.short}", expected=known)
        if wanted.latent >= n:
            raise UserError(
                f"the dictionary at {wanted.site.short} has no latent {wanted.latent}", expected=f"0 … {n - 1}"
            )
        return start + wanted.latent

    def feature(self, number: int) -> FeatureId:
        """The feature at a row of the node table."""
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        return FeatureId(self.sites[place], int(number - self._starts[place]))

    def chain(self, feature: FeatureId | str, *, backward: bool = True, forward: bool = True) -> list[ChainStep]:
        """The residual chain through a feature: best kept predecessor again and again, then best kept successor."""
        here = self.number(feature)
        before = list(self._walk(here, self._best_predecessor)) if backward else []
        after = list(self._walk(here, self._best_successor)) if forward else []
        links = [edge for edge, _ in reversed(before)] + [edge for edge, _ in after]
        numbers = [number for _, number in reversed(before)] + [here] + [number for _, number in after]
        return [self._step(number, edge) for number, edge in zip(numbers, [None, *links], strict=True)]

    def leaves(self, feature: FeatureId | str) -> list[Leaf]:
        """The best kept MLP and attention predecessors of a residual feature."""
        rows = self._in.rows(self.number(feature))
        chosen = self.edges.iloc[rows]
        chosen = chosen[(chosen["relation"] != "residual") & (chosen["rank"] == 0)]
        return [
            Leaf(
                feature=FeatureId(parse_site(row.source_site), int(row.source_latent)),
                relation=str(row.relation),
                cosine=float(row.cosine),
                q_value=float(row.q_value),
            )
            for row in chosen.itertuples()
        ]

    def ancestors(self, feature: FeatureId | str, *, max_hops: int | None = None) -> list[Reached]:
        """Every feature from which kept links lead to this one, nearest and strongest first."""
        return self._reached(self.number(feature), self._in, self._source, max_hops)

    def descendants(self, feature: FeatureId | str, *, max_hops: int | None = None) -> list[Reached]:
        """Every feature to which kept links lead from this one, nearest and strongest first."""
        return self._reached(self.number(feature), self._out, self._target, max_hops)

    @cached_property
    def _extent(self) -> dict[str, tuple[int, int]]:
        counts = self.nodes["site"].value_counts(sort=False)
        sizes = [int(counts[site.short]) for site in self.sites]
        starts = np.cumsum([0, *sizes])
        return {site.short: (int(a), n) for site, a, n in zip(self.sites, starts, sizes, strict=False)}

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.array([start for start, _ in self._extent.values()])

    @cached_property
    def _source(self) -> np.ndarray:
        start = {name: a for name, (a, _) in self._extent.items()}
        return node_numbers(start, self.edges["source_site"], self.edges["source_latent"])

    @cached_property
    def _target(self) -> np.ndarray:
        start = {name: a for name, (a, _) in self._extent.items()}
        return node_numbers(start, self.edges["target_site"], self.edges["target_latent"])

    @cached_property
    def _in(self) -> _Adjacency:
        return _Adjacency.of(self._target, self.kept, len(self.nodes))

    @cached_property
    def _out(self) -> _Adjacency:
        return _Adjacency.of(self._source, self.kept, len(self.nodes))

    @cached_property
    def _best_predecessor(self) -> tuple[np.ndarray, np.ndarray]:
        return self._next("rank", self._target, self._source)

    @cached_property
    def _best_successor(self) -> tuple[np.ndarray, np.ndarray]:
        return self._next("forward_rank", self._source, self._target)

    def _next(self, column: str, here: np.ndarray, there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For every node the row of its kept first-choice residual edge and the node at its other end; -1 for none."""
        chosen = self.kept & (self.edges[column] == 0).to_numpy() & (self.edges["relation"] == "residual").to_numpy()
        edge, node = np.full(len(self.nodes), -1), np.full(len(self.nodes), -1)
        rows = np.flatnonzero(chosen)
        edge[here[rows]], node[here[rows]] = rows, there[rows]
        return edge, node

    def _walk(self, number: int, step: tuple[np.ndarray, np.ndarray]) -> Iterator[tuple[int, int]]:
        edge, node = step
        while node[number] >= 0:
            yield int(edge[number]), int(node[number])
            number = int(node[number])

    def _step(self, number: int, edge: int | None) -> ChainStep:
        if edge is None:
            return ChainStep(feature=self.feature(number), cosine=None, q_value=None)
        cosine, q_value = float(self.edges["cosine"].iat[edge]), float(self.edges["q_value"].iat[edge])
        return ChainStep(feature=self.feature(number), cosine=cosine, q_value=q_value)

    def _reached(self, start: int, along: _Adjacency, other: np.ndarray, max_hops: int | None) -> list[Reached]:
        cosine = self.edges["cosine"].to_numpy()
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
        found.pop(start)
        ordered = sorted(found.items(), key=lambda item: (item[1][0], -item[1][1], item[0]))
        return [Reached(feature=self.feature(number), hops=hops, strength=s) for number, (hops, s) in ordered]


@dataclass(frozen=True, kw_only=True)
class _Adjacency:
    """Kept edges grouped by one of their ends."""

    start: np.ndarray
    order: np.ndarray

    @classmethod
    def of(cls, end: np.ndarray, kept: np.ndarray, n_nodes: int) -> _Adjacency:
        rows = np.flatnonzero(kept)
        order = rows[np.argsort(end[rows], kind="stable")]
        return cls(start=np.searchsorted(end[order], np.arange(n_nodes + 1)), order=order)

    def rows(self, number: int) -> np.ndarray:
        return self.order[self.start[number] : self.start[number + 1]]


def _kept(edges: pd.DataFrame, thresholds: Thresholds | None) -> np.ndarray:
    match thresholds:
        case None:
            return edges["kept"].to_numpy(bool)
        case Calibrated(fdr=rate):
            return (edges["q_value"] <= rate).to_numpy(bool)
        case Fixed(residual=residual, modules=modules):
            cut = np.where(edges["relation"] == "residual", residual, modules)
            return (edges["cosine"] >= cut).to_numpy(bool)
        case _:
            assert_never(thresholds)
