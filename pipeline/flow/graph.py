"""The flow graph, opened: features of all layers and the kept links between them, with queries of
one line each.

    graph = FlowGraph.open("artifacts/laptop/link")
    graph.chain("L12/402")          the residual chain through a feature, backward and forward, best
    link each time
    graph.ancestors("L12/402")      everything that flows into it;   graph.descendants(…)
    graph.best_path("L3/7", "L12/402")
    graph.trunks()      graph.splits()      graph.merges()      graph.communities()

Every link points forward in the computation. Queries follow kept links only; `thresholds` can
replace what the linking run kept by the paper's cosines or by another false-discovery rate. Cost:
each query touches only the links it follows.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import assert_never

import numpy as np
import pandas as pd

from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site, parse_feature, parse_site
from pipeline.artifact import MANIFEST, Artifact
from pipeline.flow.nodes import node_numbers
from pipeline.flow.options import Calibrated, Fixed, Thresholds
from pipeline.flow.pairing import Relation
from pipeline.flow.queries import (
    Adjacency,
    ChainStep,
    Fork,
    Leaf,
    Reached,
    Step,
    Trunk,
    forks,
    reachable,
    strongest_path,
    trunk_paths,
)
from pipeline.flow.tables import KIND, SCHEMA, FlowTables, read_tables


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
        """Open a link artifact, or a folder with a graph's tables alone. Raises UserError with
        every problem."""
        folder = Path(folder)
        if (folder / MANIFEST).is_file():
            Artifact.open(folder, kind=KIND, schema=SCHEMA)
        return cls(read_tables(folder), thresholds=thresholds)

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
                f"the dictionary at {wanted.site.short} has no latent {wanted.latent}",
                expected=f"0 … {n - 1}",
            )
        return start + wanted.latent

    def feature(self, number: int) -> FeatureId:
        """The feature at a row of the node table."""
        place = int(np.searchsorted(self._starts, number, side="right")) - 1
        return FeatureId(self.sites[place], int(number - self._starts[place]))

    def chain(
        self, feature: FeatureId | str, *, backward: bool = True, forward: bool = True
    ) -> list[ChainStep]:
        """The residual chain through a feature: best kept predecessor again and again, then best
        kept successor."""
        here = self.number(feature)
        before = list(self._best_predecessor.walk(here))[::-1] if backward else []
        after = list(self._best_successor.walk(here)) if forward else []
        links = [None, *(edge for edge, _ in before), *(edge for edge, _ in after)]
        numbers = [*(number for _, number in before), here, *(number for _, number in after)]
        return [self._step(number, edge) for number, edge in zip(numbers, links, strict=True)]

    def leaves(self, feature: FeatureId | str) -> list[Leaf]:
        """The best kept MLP and attention predecessors of a residual feature."""
        edges = self.predecessors(feature)
        chosen = edges[(edges["relation"] != "residual") & (edges["rank"] == 0)]
        return [
            Leaf(
                feature=FeatureId(parse_site(row.source_site), int(row.source_latent)),
                relation=str(row.relation),
                cosine=float(row.cosine),
                q_value=float(row.q_value),
            )
            for row in chosen.itertuples()
        ]

    def predecessors(self, feature: FeatureId | str) -> pd.DataFrame:
        """Kept edges into a feature, strongest first."""
        return self.edges.iloc[self._in.rows(self.number(feature))].sort_values(
            "cosine", ascending=False
        )

    def successors(self, feature: FeatureId | str) -> pd.DataFrame:
        """Kept edges out of a feature, strongest first."""
        return self.edges.iloc[self._out.rows(self.number(feature))].sort_values(
            "cosine", ascending=False
        )

    def ancestors(self, feature: FeatureId | str, *, max_hops: int | None = None) -> list[Reached]:
        """Every feature from which kept links lead to this one, nearest and strongest first."""
        return self._reached(self.number(feature), self._in, self._source, max_hops)

    def descendants(
        self, feature: FeatureId | str, *, max_hops: int | None = None
    ) -> list[Reached]:
        """Every feature to which kept links lead from this one, nearest and strongest first."""
        return self._reached(self.number(feature), self._out, self._target, max_hops)

    def best_path(self, start: FeatureId | str, end: FeatureId | str) -> list[ChainStep]:
        """The path with the largest product of cosines; empty when no kept links lead from `start`
        to `end`."""
        path = strongest_path(
            self.number(start), self.number(end), self._out, self._target, self._cosine
        )
        return [self._step(number, edge) for edge, number in path or []]

    def trunks(self, n: int | None = 20, *, min_length: int = 3) -> list[Trunk]:
        """The `n` longest residual paths whose every link is first choice both ways; no two share a
        feature."""
        mutual = self.kept & self.edges["mutual"].to_numpy(bool) & self._is("residual")
        step = Step.of(mutual, self._source, self._target, len(self.nodes))
        return [
            Trunk(
                features=tuple(self.feature(number) for number in numbers),
                mean_cosine=float(cosines.mean()),
                weakest=float(cosines.min()),
            )
            for numbers, cosines in trunk_paths(step, self._cosine, min_length=min_length)[:n]
        ]

    def splits(self, n: int | None = 20, *, relation: Relation = "residual") -> list[Fork]:
        """Features with several kept successors at one site, strongest second branch first."""
        return self._forks(self._source, self._target, relation, n)

    def merges(self, n: int | None = 20, *, relation: Relation = "residual") -> list[Fork]:
        """Features with several kept predecessors at one site, strongest second branch first."""
        return self._forks(self._target, self._source, relation, n)

    def communities(self, *, min_size: int = 2) -> dict[int, list[FeatureId]]:
        """Members of every community of at least `min_size` features, largest community first."""
        linked = self.nodes["community"][self.nodes["community"] >= 0]
        sizes = linked.value_counts()
        members = linked.groupby(linked).groups
        wanted = sorted(int(name) for name, size in sizes.items() if size >= min_size)
        return {name: [self.feature(int(number)) for number in members[name]] for name in wanted}

    def kept_between(self, numbers: set[int] | None = None) -> pd.DataFrame:
        """Kept edges among the given nodes (all): `edge` (row of the edge table), `source` and
        `target` (nodes)."""
        rows = np.flatnonzero(self.kept)
        if numbers is not None:
            wanted = np.zeros(len(self.nodes), dtype=bool)
            wanted[list(numbers)] = True
            rows = rows[wanted[self._source[rows]] & wanted[self._target[rows]]]
        return pd.DataFrame(
            {"edge": rows, "source": self._source[rows], "target": self._target[rows]}
        )

    def life(self, feature: FeatureId | str) -> tuple[int, int]:
        """Birth and death layer of a feature: how far back and forward its residual chain
        reaches."""
        steps = self.chain(feature)
        return steps[0].feature.site.layer, steps[-1].feature.site.layer

    @cached_property
    def _extent(self) -> dict[str, tuple[int, int]]:
        counts = self.nodes["site"].value_counts(sort=False)
        sizes = [int(counts[site.short]) for site in self.sites]
        starts = np.cumsum([0, *sizes])
        return {
            site.short: (int(a), n) for site, a, n in zip(self.sites, starts, sizes, strict=False)
        }

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
    def _cosine(self) -> np.ndarray:
        return self.edges["cosine"].to_numpy(np.float64)

    @cached_property
    def _in(self) -> Adjacency:
        return Adjacency.of(self._target, self.kept, len(self.nodes))

    @cached_property
    def _out(self) -> Adjacency:
        return Adjacency.of(self._source, self.kept, len(self.nodes))

    @cached_property
    def _best_predecessor(self) -> Step:
        chosen = self.kept & (self.edges["rank"] == 0).to_numpy() & self._is("residual")
        return Step.of(chosen, self._target, self._source, len(self.nodes))

    @cached_property
    def _best_successor(self) -> Step:
        chosen = self.kept & (self.edges["forward_rank"] == 0).to_numpy() & self._is("residual")
        return Step.of(chosen, self._source, self._target, len(self.nodes))

    def _is(self, relation: str) -> np.ndarray:
        return (self.edges["relation"] == relation).to_numpy(bool)

    def _step(self, number: int, edge: int | None) -> ChainStep:
        feature = self.feature(number)
        if edge is None:
            return ChainStep(feature=feature, cosine=None, q_value=None)
        q_value = float(self.edges["q_value"].iat[edge])
        return ChainStep(
            feature=feature, cosine=float(self._cosine[edge]), q_value=q_value, edge=edge
        )

    def _reached(
        self, start: int, along: Adjacency, other: np.ndarray, max_hops: int | None
    ) -> list[Reached]:
        found = reachable(start, along, other, self._cosine, max_hops)
        return [
            Reached(feature=self.feature(number), hops=hops, strength=strength)
            for number, hops, strength in found
        ]

    def _forks(
        self, one: np.ndarray, other: np.ndarray, relation: Relation, n: int | None
    ) -> list[Fork]:
        site = np.searchsorted(self._starts, other, side="right")
        groups = forks(
            self.kept & self._is(relation), one, site, self._cosine, len(self.sites) + 1
        )[:n]
        return [
            Fork(
                feature=self.feature(int(one[rows[0]])),
                others=tuple(self.feature(int(other[row])) for row in rows),
                cosines=tuple(float(self._cosine[row]) for row in rows),
            )
            for rows in groups
        ]


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
