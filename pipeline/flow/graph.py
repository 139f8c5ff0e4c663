"""The flow graph, opened: features of all layers and the kept links between them, with queries of
one line each.

    graph = FlowGraph.open("artifacts/laptop/link")
    graph.chain("L12/402")          the residual chain through a feature, backward and forward, best
    link each time
    graph.ancestors("L12/402")      everything that flows into it;   graph.descendants(…)
    graph.best_path("L3/7", "L12/402")
    graph.trunks()      graph.communities()

For work on all features at once they are numbered through all sites, as the node table is:
`start`, `parent`, `degree`, `links` and `dying` are arrays over these numbers.

Every link points forward in the computation. Queries follow kept links only; `thresholds` can
replace what the linking run kept by the paper's cosines or by another false-discovery rate. Cost:
each query touches only the links it follows.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import assert_never

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float64, Int64

from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site, parse_feature, parse_site
from pipeline.artifact import MANIFEST, Artifact
from pipeline.flow.nodes import node_numbers
from pipeline.flow.options import Calibrated, Fixed, Thresholds
from pipeline.flow.queries import (
    Adjacency,
    ChainStep,
    Leaf,
    Reached,
    Step,
    Trunk,
    reachable,
    strongest_path,
)
from pipeline.flow.tables import KIND, SCHEMA, FlowTables, read_tables
from pipeline.flow.trunks import trunks_of

RELATIONS = ("residual", "mlp", "attention")


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

    def add_column(self, name: str, found: pd.DataFrame) -> None:
        """Give the edges the column `name` of what a lens found of some of them, by
        `source_feature` and `target_feature`; NaN for the others."""
        source, target = (
            [self.number(feature) for feature in found[end]]
            for end in ("source_feature", "target_feature")
        )
        value = pd.Series(found[name].to_numpy(), pd.MultiIndex.from_arrays([source, target]))
        ends = pd.MultiIndex.from_arrays([self._source, self._target])
        self.edges = self.edges.assign(**{name: value.reindex(ends).to_numpy()})
        self.__dict__.pop("links", None)

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
        if wanted.site not in self.sites:
            known = ", ".join(site.short for site in self.sites)
            raise UserError(f"the flow graph has no site {wanted.site.short}", expected=known)
        place = self.sites.index(wanted.site)
        start, n = int(self.start[place]), self.n_latents[place]
        if wanted.latent >= n:
            raise UserError(
                f"the dictionary at {wanted.site.short} has no latent {wanted.latent}",
                expected=f"0 … {n - 1}",
            )
        return start + wanted.latent

    def feature(self, number: int) -> FeatureId:
        """The feature at a row of the node table."""
        place = int(self.site_of(number))
        return FeatureId(self.sites[place], int(number - self.start[place]))

    def site_of(self, number: Int64[np.ndarray, "*feature"] | int) -> Int64[np.ndarray, "*feature"]:
        """The place in `sites` of features by number."""
        return np.searchsorted(self.start, number, side="right") - 1

    @cached_property
    def n_latents(self) -> tuple[int, ...]:
        """Latents of every site."""
        counts = self.nodes["site"].value_counts(sort=False)
        return tuple(int(counts[site.short]) for site in self.sites)

    @cached_property
    def start(self) -> Int64[np.ndarray, "site_and_one"]:
        """Latent f of the site at place s has the number `start[s] + f`."""
        return np.concatenate([[0], np.cumsum(self.n_latents)]).astype(np.int64)

    @property
    def parent(self) -> tuple[Int64[np.ndarray, "feature"], Float64[np.ndarray, "feature"]]:
        """The best kept predecessor of every feature along the residual stream (its number, -1 for
        none) and the cosine (0 for none)."""
        step = self._best_predecessor
        return step.node, np.where(step.edge >= 0, self._cosine[step.edge], 0.0)

    @property
    def degree(self) -> tuple[Int64[np.ndarray, "feature"], Int64[np.ndarray, "feature"]]:
        """Kept links into and out of every feature."""
        return np.diff(self._in.start), np.diff(self._out.start)

    @cached_property
    def links(self) -> pd.DataFrame:
        """The kept edges sorted by target, relation and rank, with `source` and `target` as
        numbers; the index is the row of the edge table."""
        rows = np.flatnonzero(self.kept)
        relation = self.edges["relation"].astype(str).map(RELATIONS.index).to_numpy()[rows]
        rank = self.edges["rank"].to_numpy()[rows]
        rows = rows[np.lexsort((rank, relation, self._target[rows]))]
        ends = {"source": self._source[rows], "target": self._target[rows]}
        return self.edges.iloc[rows].set_axis(rows).assign(**ends)

    @cached_property
    def goes_on(self) -> Bool[np.ndarray, "feature"]:
        """Which features have a kept link onward along the residual stream."""
        onward = np.zeros(len(self.nodes), dtype=bool)
        onward[self._source[self.kept & self._is("residual")]] = True
        return onward

    @property
    def dying(self) -> Bool[np.ndarray, "feature"]:
        """Features of the residual stream without a link onward, though it has a later site."""
        before_last = np.zeros(len(self.nodes), dtype=bool)
        for place in self.residual[:-1]:
            before_last[self.start[place] : self.start[place + 1]] = True
        return before_last & ~self.goes_on

    @cached_property
    def residual(self) -> tuple[int, ...]:
        """The places in `sites` of the residual stream after each layer."""
        return tuple(i for i, site in enumerate(self.sites) if site.kind == "resid_post")

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
        """The `n` longest trunks (flow/trunks.py); no two share a feature."""
        trunks = trunks_of(self)
        return [
            Trunk(
                features=tuple(self.feature(int(number)) for number in trunks.feature[a:b]),
                mean_cosine=float(trunks.cosine[a + 1 : b].mean()),
                weakest=float(trunks.cosine[a + 1 : b].min()),
            )
            for a, b in pairwise(trunks.offset[: 1 + (trunks.length >= max(2, min_length)).sum()])
        ][:n]

    def communities(self, *, min_size: int = 2) -> dict[int, list[FeatureId]]:
        """Members of every community of at least `min_size` features, largest community first."""
        linked = self.nodes["community"][self.nodes["community"] >= 0]
        sizes = linked.value_counts()
        members = linked.groupby(linked).groups
        wanted = sorted(int(name) for name, size in sizes.items() if size >= min_size)
        return {name: [self.feature(int(number)) for number in members[name]] for name in wanted}

    def links_between(self, numbers: Collection[int]) -> pd.DataFrame:
        """The part of `links` whose both ends are among these features."""
        among = self.links["source"].isin(numbers) & self.links["target"].isin(numbers)
        return self.links[among]

    def life(self, feature: FeatureId | str) -> tuple[int, int]:
        """Birth and death layer of a feature: how far back and forward its residual chain
        reaches."""
        steps = self.chain(feature)
        return steps[0].feature.site.layer, steps[-1].feature.site.layer

    @cached_property
    def _source(self) -> np.ndarray:
        return self._numbers("source")

    @cached_property
    def _target(self) -> np.ndarray:
        return self._numbers("target")

    def _numbers(self, end: str) -> np.ndarray:
        start = {site.short: int(a) for site, a in zip(self.sites, self.start, strict=False)}
        return node_numbers(start, self.edges[f"{end}_site"], self.edges[f"{end}_latent"])

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
