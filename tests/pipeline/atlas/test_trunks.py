"""Trunks account for every living feature, by a worked graph and by the link stage's own tables."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from featureflow.errors import UserError
from featureflow.sites import parse_site
from pipeline.describe.opened import Atlas
from pipeline.site.graph import read_graph
from pipeline.site.shards import Shard, read_shard, write_shard
from pipeline.site.trunks import BEGINS, ENDS, trunk_shard, trunks_of
from pipeline.site.validate import validate_atlas

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


@pytest.fixture
def graph(tmp_path: Path):
    columns = (
        "source_site",
        "source_latent",
        "target_site",
        "target_latent",
        "relation",
        "cosine",
        "rank",
    )
    edges = pd.DataFrame(EDGES, columns=columns).assign(q_value=0.0, mutual=False, kept=True)
    edges.to_parquet(tmp_path / "edges.parquet")
    nodes = [(site, f, None, 0, 0, 0) for site in SITES for f in range(N)]
    names = ["site", "latent", "class", "birth_layer", "death_layer", "community"]
    pd.DataFrame(nodes, columns=names).to_parquet(tmp_path / "nodes.parquet")
    pairs = edges[["source_site", "target_site", "relation"]].drop_duplicates().assign(n_links=1)
    pairs.to_parquet(tmp_path / "pairs.parquet")
    return read_graph(tmp_path, [parse_site(s) for s in SITES], [N] * len(SITES))


def test_a_worked_graph_falls_into_trunks_with_named_beginnings_and_ends(graph) -> None:
    alive = np.tile(np.arange(N) < N - 1, len(SITES))
    trunks = trunks_of(graph, alive)
    found = {}
    for i in range(len(trunks)):
        path = trunks.feature[trunks.offset[i] : trunks.offset[i + 1]]
        found[" ".join(graph.feature(int(f)) for f in path)] = (
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
    alive = np.tile(np.arange(N) < N - 1, len(SITES))
    n_firings = np.where(alive, 7, 0)
    score = np.full(len(alive), np.nan)
    score[int(graph.start[3])] = (
        0.5  # L1/0, in the middle of the longest trunk, which is named by it
    )
    labels = [graph.feature(i) for i in range(len(alive))]
    shard = trunk_shard(graph, trunks_of(graph, alive), n_firings, labels, score)
    assert shard.json["written"] == {"mlp": [0] * 5, "attention": [0, 0, 0, 1, 0], "both": [0] * 5}
    assert shard.json["modules"] == [
        {"site": 1, "n_alive": 4, "n_linked": 2},
        {"site": 2, "n_alive": 4, "n_linked": 1},
    ]
    assert shard.json["labels"][:2] == ["L1/0", "L1/1"]
    assert shard.columns["score"][:2].tolist() == [127, 255]
    assert shard.columns["site"][:5].tolist() == [0, 3, 4, 3, 4]
    assert shard.columns["latent"][:5].tolist() == [0, 0, 3, 1, 2]


def test_every_living_feature_of_the_stream_is_on_one_trunk_and_every_step_is_the_best_link(
    small_run,
) -> None:
    atlas = Atlas.open(small_run.atlas.path)
    shard = read_shard(small_run.atlas.path / "site", "flow/trunks")
    sites = [
        s["short"] for s in read_shard(small_run.atlas.path / "site", "manifest").json["sites"]
    ]
    site, latent = shard.columns["site"], shard.columns["latent"]
    members = [f"{sites[s]}/{f}" for s, f in zip(site, latent, strict=True)]
    features = atlas.features.set_index("feature")
    assert len(set(members)) == len(members)
    assert set(members) == set(
        features.index[features["alive"] & features["site"].isin(["L0", "L1", "L2"])]
    )
    assert shard.columns["count"].tolist() == features.loc[members, "n_firings"].tolist()
    edges = pd.read_parquet(small_run.link.path / "edges.parquet").query(
        "kept and relation == 'residual' and rank == 0"
    )
    best: dict[
        str, tuple[float, str]
    ] = {}  # of the features that name one as best predecessor, the closest
    for row in edges.itertuples():
        source, target = (
            f"{row.source_site}/{row.source_latent}",
            f"{row.target_site}/{row.target_latent}",
        )
        best[source] = max(best.get(source, (-1.0, "")), (row.cosine, target))
    start = np.concatenate([[0], np.cumsum(shard.columns["length"])])
    goes_on = {
        members[i]: members[i + 1]
        for i in range(len(members) - 1)
        if i + 1 not in set(start.tolist())
    }
    assert goes_on
    assert goes_on == {source: target for source, (_, target) in best.items()}
    n_long = int((shard.columns["length"] >= 3).sum())
    assert small_run.atlas.summary["n_trunks"] == n_long


def test_a_feature_on_two_trunks_is_not_a_whole_atlas(small_run, tmp_path: Path) -> None:
    site = shutil.copytree(small_run.atlas.path / "site", tmp_path / "site")
    shard = read_shard(site, "flow/trunks")
    columns = {name: column.copy() for name, column in shard.columns.items()}
    for name in ("site", "latent"):
        columns[name][-1] = columns[name][0]
    write_shard(site, "flow/trunks", Shard(json=shard.json, columns=columns))
    with pytest.raises(UserError, match="on two trunks"):
        validate_atlas(tmp_path)


def test_communities_hold_what_the_feature_table_says(small_run) -> None:
    atlas = Atlas.open(small_run.atlas.path)
    shard = read_shard(small_run.atlas.path / "site", "flow/communities")
    table = atlas.features.query("community >= 0").groupby("community").size()
    expected = table[table >= 2]
    sizes = dict(
        zip(
            shard.columns["id"].tolist(),
            shard.columns["n_by_site"].sum(axis=1).tolist(),
            strict=True,
        )
    )
    assert sizes == expected.to_dict()
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    assert len(shard.json["labels"]) == len(sizes)
