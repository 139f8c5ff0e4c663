"""Nodes of one prompt into supernodes: members of one flow that are active on one token.

1. `strongest` keeps, per cut, the smallest set of features that holds a share of Σ|score|.
2. A supernode is (flow, token). A flow is a stretch of a trunk of the flow graph (links that are
   first choice both ways) on which each cut's feature agrees directly, on held-out tokens, with
   that of the cut before (pipeline/flow/lives.py); a feature on no trunk stands alone.
3. Its weight is the largest |Σ score| of its members over the cuts, which is also its prediction
   (with its sign): adding up cuts would count the same information several times.
4. `random_like` draws, for a supernode, as many features that are active at the same cuts: the null
   of a removal.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pandas as pd

from featureflow.sites import Site
from pipeline.flow.graph import FlowGraph
from pipeline.flow.trunks import trunks_of
from pipeline.trace.stream import FEATURE


def strongest(nodes: pd.DataFrame, share: float, *, by: str = "score") -> pd.DataFrame:
    """The features that hold `share` of Σ|by| at their cut, as few as possible; all for 1, since a
    saturated gate or attention gives its true cause a gradient of 0."""
    features = nodes[nodes["kind"] == FEATURE]
    size = features[by].abs()
    order = size.sort_values(ascending=False, kind="stable").index
    ordered = size.loc[order].groupby(features.loc[order, "cut"], sort=False)
    before = ordered.cumsum() - size.loc[order]
    total = size.groupby(features["cut"]).transform("sum").loc[order]
    kept = (before < share * total) & (size.loc[order] > 0) | (share >= 1)
    return features.loc[np.sort(order[kept])]


@lru_cache(maxsize=4)
def flows_of(graph: FlowGraph, cuts: tuple[Site, ...]) -> dict[str, int]:
    """Feature id at one of the cuts → number of its flow; features on no trunk are left out."""
    trunks = trunks_of(graph)
    birth = graph.nodes["birth_layer"].to_numpy()
    at_cut = np.array([site in cuts for site in graph.sites])[graph.site_of(trunks.feature)]
    layer = np.array([site.layer for site in graph.sites])[graph.site_of(trunks.feature)]
    flows: dict[str, int] = {}
    number = 0
    for start, stop in pairwise(trunks.offset[: 1 + (trunks.length > 1).sum()]):
        before = None
        for place in start + np.flatnonzero(at_cut[start:stop]):
            member = int(trunks.feature[place])
            number += int(before is not None and birth[member] > before)
            flows[str(graph.feature(member))] = number
            before = layer[place]
        number += 1
    return flows


def grouped(nodes: pd.DataFrame, flows: Mapping[str, int]) -> pd.DataFrame:
    """The nodes with the number of their supernode, `group`, heaviest supernode first, and the
    `flow` (−1 for none)."""
    feature = nodes["cut"] + "/" + nodes["latent"].astype(str)
    flow = feature.map(flows).fillna(-1).astype(int)
    alone = feature.where(flow < 0, flow.astype(str)) + "@" + nodes["token"].astype(str)
    weight = prediction(nodes.assign(group=alone)).abs().sort_values(ascending=False, kind="stable")
    number = pd.Series(np.arange(len(weight)), index=weight.index)
    return nodes.assign(feature=feature, flow=flow, group=alone.map(number).astype(int))


def prediction(nodes: pd.DataFrame) -> pd.Series:
    """Σ score of every group at the cut where it is largest."""
    sums = nodes.groupby(["group", "cut"], sort=False)["score"].sum().reset_index()
    peak = sums.loc[sums["score"].abs().groupby(sums["group"], sort=False).idxmax()]
    return peak.set_index("group")["score"]


def peak_cut(members: pd.DataFrame) -> str:
    """The cut where a group's Σ score is largest."""
    return str(members.groupby("cut", sort=False)["score"].sum().abs().idxmax())


def random_like(
    members: pd.DataFrame, nodes: pd.DataFrame, generator: np.random.Generator
) -> pd.DataFrame:
    """As many active features at the same cuts, on any token, none of them a member."""
    others = nodes[(nodes["kind"] == FEATURE) & ~nodes.index.isin(members.index)]
    drawn = []
    for cut, n in members["cut"].value_counts(sort=False).items():
        pool = others.index[others["cut"] == cut]
        drawn += list(generator.choice(pool, size=min(int(n), len(pool)), replace=False))
    return nodes.loc[drawn]
