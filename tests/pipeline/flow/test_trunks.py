"""Trunks account for every living feature, by a worked graph and by the link stage's own tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from featureflow.sites import parse_site
from pipeline.flow.graph import FlowGraph
from pipeline.flow.nodes import Side, node_table
from pipeline.flow.tables import FlowTables
from pipeline.flow.trunks import BEGINS, ENDS, trunks_of
from pipeline.site.flow_pages import trunk_shard

SITES = ("L0", "L1.attn", "L1.mlp", "L1", "L2")
RESIDUAL, MLP, ATTENTION = "residual", "mlp", "attention"
#        source, latent, target, latent, relation, cosine, rank
EDGES = (
    ("L0", 0, "L1", 0, RESIDUAL, 0.9, 0),  # 0 goes on in 0, though
    (
        "L0",
        0,
        "L1",
        1,
        RESIDUAL,
        0.8,
        0,
    ),  # it is the best predecessor of 1 too, which therefore branches off
    (
        "L0",
        1,
        "L1",
        0,
        RESIDUAL,
        0.7,
        1,
    ),  # 1 has a link onward, to a feature with a closer predecessor
    ("L1.mlp", 0, "L1", 2, MLP, 0.9, 0),
    ("L1.mlp", 0, "L1", 3, MLP, 0.9, 0),
    ("L1.attn", 0, "L1", 3, ATTENTION, 0.9, 0),
    ("L1.attn", 1, "L1", 0, ATTENTION, 0.6, 0),  # written into on its way
    ("L1", 0, "L2", 3, RESIDUAL, 0.5, 0),
    ("L1", 1, "L2", 2, RESIDUAL, 0.95, 0),
)
N = 5  # latents; the last of each dictionary is dead


ALIVE = np.arange(N) < N - 1


@pytest.fixture
def graph() -> FlowGraph:
    columns = (
        *("source_site", "source_latent", "target_site", "target_latent"),
        *("relation", "cosine", "rank"),
    )
    edges = pd.DataFrame(EDGES, columns=columns)
    edges = edges.assign(q_value=0.0, mutual=False, kept=True, related=True, forward_rank=-1)
    sides = {
        (site := parse_site(short)): Side(
            site=site, alive=ALIVE, n_fired=None, n_tokens=0, mean_share=0.0, n_duplicates=0
        )
        for short in SITES
    }
    nodes = node_table(sides, edges, seed=0, least_agreement=0.3)
    return FlowGraph(FlowTables(nodes=nodes, edges=edges, pairs=pd.DataFrame(), warnings=()))


def test_a_worked_graph_falls_into_trunks_with_named_beginnings_and_ends(graph) -> None:
    trunks = trunks_of(graph)
    found = {}
    for i in range(len(trunks)):
        path = trunks.feature[trunks.offset[i] : trunks.offset[i + 1]]
        found[" ".join(str(graph.feature(int(f))) for f in path)] = (
            BEGINS[trunks.begin[i]],
            ENDS[trunks.end[i]],
        )
    assert found == {
        "L0/0 L1/0 L2/3": ("first", "last"),
        "L1/1 L2/2": ("branch", "last"),
        "L0/1": ("first", "joins"),
        "L0/2": ("first", "ends"),
        "L0/3": ("first", "ends"),
        "L1/2": ("mlp", "ends"),
        "L1/3": ("both", "ends"),
        "L2/0": ("unread", "last"),
        "L2/1": ("unread", "last"),
    }
    assert list(trunks.length)[:3] == [3, 2, 1]
    assert trunks.cosine[:5].tolist() == pytest.approx([0, 0.9, 0.5, 0, 0.95])


def test_what_writes_where_is_counted_by_site(graph) -> None:
    alive = np.tile(ALIVE, len(SITES))
    score = np.full(len(alive), np.nan)
    place = SITES.index("L1") * N
    score[place] = 0.5  # L1/0, in the middle of the longest trunk, which is named by it
    labels = [str(graph.feature(i)) for i in range(len(alive))]
    features = pd.DataFrame(
        {"n_active": np.where(alive, 7, 0), "label": labels, "label_score": score}
    )
    shard = trunk_shard(graph, features)
    assert shard.json["written"] == {"mlp": [0] * 5, "attention": [0, 0, 0, 1, 0], "both": [0] * 5}
    assert shard.json["modules"] == [
        {"site": 1, "n_alive": 4, "n_linked": 2},
        {"site": 2, "n_alive": 4, "n_linked": 1},
    ]
    assert shard.json["labels"][:2] == ["L1/0", "L1/1"]
    assert shard.columns["score"][:2].tolist() == [127, 255]
    assert shard.columns["site"][:5].tolist() == [0, 3, 4, 3, 4]
    assert shard.columns["latent"][:5].tolist() == [0, 0, 3, 1, 2]
