"""Queries on a graph drawn by hand, networkx as the oracle for walks, and other programs' readers
for the exports.

L0/0 ──.9──▶ L1/0 ──.8──▶ L2/0        L0/1 ──.7──▶ L1/1      L1.mlp/0 ──.6──▶ L1/1
               └───.5──▶ L2/1 (also L2/1's best)              L1/1 ──.4──▶ L2/1 (second)
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from importlib import resources

import jsonschema
import networkx as nx
import numpy as np
import pandas as pd
import pytest
from pyarrow import parquet

from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.artifact import Artifact
from pipeline.flow.attribution import cantor
from pipeline.flow.describe import describe_flow
from pipeline.flow.exports import attribution_document, export_graph, to_networkx
from pipeline.flow.figures import draw_flow
from pipeline.flow.graph import FlowGraph
from pipeline.flow.nodes import Side, communities_of, node_table
from pipeline.flow.options import Calibrated, Fixed
from pipeline.flow.tables import EDGES, KIND, PAIRS, SCHEMA, FlowTables, read_tables, write_tables

# source, target, relation, rank, forward_rank, cosine, q, kept
ROWS = [
    ("L0/0", "L1/0", "residual", 0, 0, 0.9, 0.001, True),
    ("L0/1", "L1/1", "residual", 0, 0, 0.7, 0.002, True),
    ("L0/1", "L1/0", "residual", 1, 1, 0.2, 0.9, False),
    ("L1.mlp/0", "L1/1", "mlp", 0, 0, 0.6, 0.003, True),
    ("L1/0", "L2/0", "residual", 0, 0, 0.8, 0.001, True),
    ("L1/0", "L2/1", "residual", 0, 1, 0.5, 0.01, True),
    ("L1/1", "L2/1", "residual", 1, 0, 0.4, 0.03, True),
]


def whole_side(site: Site, n: int) -> Side:
    fired = np.full(n, 5)
    return Side(
        site=site,
        alive=np.ones(n, dtype=bool),
        n_fired=fired,
        n_tokens=100,
        mean_share=0.0,
        n_duplicates=0,
    )


@pytest.fixture
def tables() -> FlowTables:
    columns = ["source", "target", "relation", "rank", "forward_rank", "cosine", "q_value", "kept"]
    edges = pd.DataFrame(ROWS, columns=columns)
    for end in ("source", "target"):
        split = edges.pop(end).str.split("/", expand=True)
        edges[f"{end}_site"], edges[f"{end}_latent"] = split[0], split[1].astype(int)
    edges["mutual"] = (edges["rank"] == 0) & (edges["forward_rank"] == 0)
    edges = edges.assign(
        margin=0.1,
        p_cosine=0.001,
        p_value=0.001,
        p_active=None,
        p_rival=None,
        p_partner=0.001,
        related=edges["kept"],
        pearson=None,
        jaccard=None,
    )
    widths = {
        Site(0, "resid_post"): 2,
        Site(1, "mlp_out"): 1,
        Site(1, "resid_post"): 2,
        Site(2, "resid_post"): 3,
    }
    sides = {site: whole_side(site, n) for site, n in widths.items()}
    return FlowTables(
        nodes=node_table(sides, edges, seed=0, least_agreement=0.3),
        edges=edges,
        pairs=pd.DataFrame(),
        warnings=("a",),
    )


@pytest.fixture
def graph(tables) -> FlowGraph:
    return FlowGraph(tables)


def names(features) -> list[str]:
    return [str(feature) for feature in features]


def test_chain_leaves_and_life(graph):
    chain = graph.chain("L2/1")
    assert names(step.feature for step in chain) == ["L0/0", "L1/0", "L2/1"]
    assert [step.cosine for step in chain] == [None, pytest.approx(0.9), pytest.approx(0.5)]
    assert names(step.feature for step in graph.chain("L1/0")) == ["L0/0", "L1/0", "L2/0"]
    assert names(step.feature for step in graph.chain("L1/1", backward=False)) == ["L1/1", "L2/1"]
    assert [(str(leaf.feature), leaf.relation) for leaf in graph.leaves("L1/1")] == [
        ("L1.mlp/0", "mlp")
    ]
    assert graph.life("L2/1") == (0, 2)


def test_classes_and_life_spans_in_the_node_table(graph):
    table = graph.nodes.assign(
        name=graph.nodes["site"] + "/" + graph.nodes["latent"].astype(str)
    ).set_index("name")
    assert len(table) == 8
    assert table["class"].dropna().to_dict() == {
        "L1/0": "translated",
        "L1/1": "processed",
        "L2/0": "translated",
        "L2/1": "translated",
        "L2/2": "unexplained",
    }
    assert table.loc["L2/1", ["birth_layer", "death_layer", "persistence"]].tolist() == [0, 2, 3]
    assert table.loc["L0/1", ["birth_layer", "death_layer"]].tolist() == [0, 2]
    assert table.loc["L2/2", ["birth_layer", "death_layer", "community"]].tolist() == [2, 2, -1]
    assert table.loc["L2/1", "class_fixed"] == "translated"
    assert table.loc["L2/1", "n_predecessors"] == 2


def test_ancestors_and_descendants_are_networkx(graph):
    oracle = to_networkx(graph)
    for feature in oracle:
        assert set(names(r.feature for r in graph.ancestors(feature))) == nx.ancestors(
            oracle, feature
        )
        assert set(names(r.feature for r in graph.descendants(feature))) == nx.descendants(
            oracle, feature
        )
    first = graph.ancestors("L2/1", max_hops=1)
    assert [(str(r.feature), r.hops, pytest.approx(r.strength)) for r in first] == [
        ("L1/0", 1, 0.5),
        ("L1/1", 1, 0.4),
    ]


def test_best_path_has_the_largest_product(graph):
    assert names(step.feature for step in graph.best_path("L1.mlp/0", "L2/1")) == [
        "L1.mlp/0",
        "L1/1",
        "L2/1",
    ]
    assert graph.best_path("L2/1", "L0/0") == []
    assert names(step.feature for step in graph.best_path("L0/0", "L0/0")) == ["L0/0"]


def test_best_path_equals_dijkstra_on_random_graphs():
    rng = np.random.default_rng(3)
    from pipeline.flow.queries import Adjacency, strongest_path

    source, target = rng.integers(0, 30, 200), rng.integers(0, 30, 200)
    source, target = np.minimum(source, target), np.maximum(source, target) + 1
    cosine = rng.uniform(0.1, 1.0, 200)
    oracle = nx.DiGraph()
    for s, t, c in zip(source, target, cosine, strict=True):
        cost = min(-np.log(c), oracle.edges[s, t]["cost"] if oracle.has_edge(s, t) else np.inf)
        oracle.add_edge(s, t, cost=cost)
    out = Adjacency.of(source, np.ones(200, dtype=bool), 40)
    for end in range(1, 31):
        path = strongest_path(0, end, out, target, cosine)
        if path is None:
            assert end not in oracle or not nx.has_path(oracle, 0, end)
        else:
            product = np.prod([cosine[edge] for edge, _ in path if edge is not None])
            assert -np.log(product) == pytest.approx(
                nx.dijkstra_path_length(oracle, 0, end, "cost")
            )


def test_trunks_are_links_of_first_choice_both_ways(graph):
    (trunk,) = graph.trunks()
    assert names(trunk.features) == ["L0/0", "L1/0", "L2/0"]
    assert (trunk.length, trunk.weakest) == (3, pytest.approx(0.8))


def test_other_thresholds_change_what_queries_follow(tables):
    strict = FlowGraph(tables, thresholds=Calibrated(fdr=0.005))
    assert names(step.feature for step in strict.chain("L2/1")) == ["L2/1"]
    paper = FlowGraph(tables, thresholds=Fixed())
    assert names(r.feature for r in paper.ancestors("L2/1")) == ["L1/0", "L0/0"], (
        "0.4 is below the paper's 0.5"
    )


def test_planted_communities_are_found_and_do_not_depend_on_the_run():
    rng = np.random.default_rng(0)
    source, target = (rng.integers(0, 40, 900) for _ in range(2))
    block = rng.integers(0, 3, 900) * 40
    bridges = np.array([5, 45, 85])
    source, target = (
        np.concatenate([source + block, bridges]),
        np.concatenate([target + block, np.roll(bridges, 1)]),
    )
    found = communities_of(125, source, target, np.ones(len(source)), seed=1)
    assert len(set(found[:40])) == len(set(found[40:80])) == len(set(found[80:120])) == 1
    assert len(set(found[:120])) == 3
    assert (found[120:] == -1).all()
    np.testing.assert_array_equal(
        found, communities_of(125, source, target, np.ones(len(source)), seed=1)
    )


def test_unknown_features_are_explained(graph):
    with pytest.raises(UserError, match="no site L9") as caught:
        graph.node("L9/0")
    assert "L0, L1.mlp, L1, L2" in str(caught.value)
    with pytest.raises(UserError, match="no latent 7"):
        graph.chain("L2/7")


def test_describe_says_what_a_reader_needs(graph):
    text = describe_flow(graph, "L1/1", label_of=lambda feature: f"label of {feature}")
    assert "processed" in text
    assert "lives L0 … L2" in text
    assert "L1.mlp/0 (0.60)" in text
    assert "▶ L1/1" in text
    assert "“label of L1/1”" in text
    assert "No link of this feature" in describe_flow(graph, "L2/2")


def test_a_graph_of_an_older_schema_is_refused(tables, tmp_path):
    pairs = pd.DataFrame([dict.fromkeys(PAIRS.names)])
    for schema in (SCHEMA, SCHEMA - 1):
        with Artifact.create(
            tmp_path / f"link{schema}", kind=KIND, schema=schema, config={}, inputs={}
        ) as draft:
            write_tables(
                draft.path, {"nodes": tables.nodes, "edges": tables.edges, "pairs": pairs}, ()
            )
    assert FlowGraph.open(tmp_path / f"link{SCHEMA}").chain("L2/1")
    with pytest.raises(UserError, match=f"expected: schema {SCHEMA}"):
        FlowGraph.open(tmp_path / f"link{SCHEMA - 1}")


def test_tables_survive_the_disk_and_damage_is_named(tables, tmp_path):
    pairs = pd.DataFrame([dict.fromkeys(PAIRS.names)])
    write_tables(
        tmp_path, {"nodes": tables.nodes, "edges": tables.edges, "pairs": pairs}, tables.warnings
    )
    again = read_tables(tmp_path)
    assert again.warnings == ("a",)
    assert again.edges["cosine"].tolist() == pytest.approx(tables.edges["cosine"].tolist())
    assert FlowGraph.open(tmp_path).chain("L2/1")[0].feature.latent == 0
    edges = parquet.read_table(tmp_path / "edges.parquet")
    old = ["p_firing" if name == "p_active" else name for name in edges.column_names]
    parquet.write_table(edges.rename_columns(old), tmp_path / "edges.parquet")  # as before
    assert "p_active" in read_tables(tmp_path).edges.columns
    tables.edges.drop(columns=["q_value", "rank"]).to_parquet(tmp_path / "edges.parquet")
    (tmp_path / "pairs.parquet").write_bytes(b"not parquet")
    with pytest.raises(UserError) as caught:
        FlowGraph.open(tmp_path)
    message = str(caught.value)
    assert all(name in message for name in ("q_value", "rank", "pairs.parquet"))
    assert set(EDGES.names) >= {"source_site", "target_latent", "kept"}


def test_exports_are_read_back_by_other_programs(graph, tmp_path):
    igraph = pytest.importorskip("igraph")
    written = igraph.Graph.Read_GraphML(str(export_graph(graph, tmp_path / "flow.graphml")))
    assert (written.vcount(), written.ecount(), written.is_directed()) == (7, 6, True)
    by_name = {vertex["id"]: vertex for vertex in written.vs}
    assert by_name["L1/1"]["class"] == "processed"
    assert sorted(written.es["weight"]) == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    gexf = nx.read_gexf(export_graph(graph, tmp_path / "flow.gexf"))
    assert gexf.edges["L0/0", "L1/0"]["weight"] == pytest.approx(0.9)
    cytoscape = nx.cytoscape_graph(
        json.loads(export_graph(graph, tmp_path / "flow.cyjs").read_text())
    )
    assert set(cytoscape) == set(gexf) == set(by_name)
    around = nx.read_graphml(
        export_graph(graph, tmp_path / "one.graphml", around="L2/1", labels={"L2/1": "a <label>"})
    )
    assert set(around) == {"L0/0", "L0/1", "L1/0", "L1/1", "L1.mlp/0", "L2/1"}
    assert around.nodes["L2/1"]["label"] == "a <label>"


def shown_by_the_viewer(document: dict) -> list[dict]:
    """The nodes that circuit-tracer's viewer keeps (`formatData` in its util-cg.js): not those of a
    feature that is active on more than two thirds of the prompt's tokens."""
    n_tokens = len(document["metadata"]["prompt_tokens"])
    of = [(node["layer"], node["feature"], node["ctx_idx"]) for node in document["nodes"]]
    often = {feature for feature, n in Counter(of).items() if n > n_tokens * 2 / 3}
    return [
        node for node, feature in zip(document["nodes"], of, strict=True) if feature not in often
    ]


def attribution_schema() -> dict:
    path = resources.files("pipeline.site") / "schemas" / "attribution-graph.schema.json"
    return json.loads(path.read_text())


def test_the_attribution_graph_shows_all_its_nodes_in_the_viewer(graph, tmp_path):
    path = export_graph(graph, tmp_path / "flow.json", around="L1/1", labels={"L1/1": "a label"})
    document = json.loads(path.read_text())
    jsonschema.validate(document, attribution_schema())
    assert len(shown_by_the_viewer(document)) == len(document["nodes"]) == 4
    ids = [node["node_id"] for node in document["nodes"]]
    assert len(set(ids)) == len(ids)
    assert all({link["source"], link["target"]} <= set(ids) for link in document["links"])
    alone = attribution_document(to_networkx(graph, around="L0/0"))
    assert len(shown_by_the_viewer(alone)) == len(alone["nodes"]) == 4, "the stream alone"
    here = next(node for node in document["nodes"] if node["clerp"] == "L1/1 a label")
    assert here["feature"] == 2 * 3 // 2 + 1  # Cantor pairing of 1 and 1
    assert document["qParams"]["clickedId"] == here["node_id"]
    assert document["qParams"]["pinnedIds"] == [here["node_id"]]


def test_the_nearest_features_are_kept_when_there_are_too_many(graph):
    assert set(to_networkx(graph, around="L2/1", max_nodes=3)) == {"L2/1", "L1/0", "L1/1"}


def test_sites_of_one_layer_share_neither_nodes_nor_features_of_the_attribution_graph(tables):
    """Latent 0 of each is another feature; people's labels in the viewer are kept by layer and
    feature."""
    kinds = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
    sites = [Site(1, kind) for kind in kinds]
    pairs = list(itertools.pairwise(site.short for site in sites))
    rows = pd.DataFrame(pairs, columns=["source_site", "target_site"])
    rows = rows.assign(source_latent=0, target_latent=0)
    like = tables.edges.drop(columns=list(rows)).iloc[[0] * len(rows)].reset_index(drop=True)
    edges = pd.concat([rows, like], axis=1)
    nodes = node_table(
        {site: whole_side(site, 1) for site in sites}, edges, seed=0, least_agreement=0.3
    )
    graph = FlowGraph(FlowTables(nodes=nodes, edges=edges, pairs=pd.DataFrame(), warnings=()))
    document = attribution_document(to_networkx(graph))
    assert len({node["node_id"] for node in document["nodes"]}) == len(sites)
    assert len({(n["layer"], n["feature"]) for n in document["nodes"]}) == len(sites)
    assert shown_by_the_viewer(document) == document["nodes"]
    assert all(link["source"] != link["target"] for link in document["links"])
    n_places = len(document["metadata"]["prompt_tokens"])
    assert all(
        node["ctx_idx"] + node["reverse_ctx_idx"] == n_places - 1 for node in document["nodes"]
    )


def test_labels_with_control_characters_are_read_back_and_legal_characters_stay(graph, tmp_path):
    label = "a\x00\x1b\ud800\uffff b\u00a0\u200d\u200f😀"
    expected = "a" + 4 * "\ufffd" + " b\u00a0\u200d\u200f😀"
    for ending, read in ((".graphml", nx.read_graphml), (".gexf", nx.read_gexf)):
        path = export_graph(graph, tmp_path / f"flow{ending}", labels={"L1/1": label})
        assert read(path).nodes["L1/1"]["label"] == expected
    document = json.loads(
        export_graph(graph, tmp_path / "f.json", labels={"L1/1": label}).read_text()
    )
    assert any(node["clerp"].startswith("L1/1 a") for node in document["nodes"])


def test_cantor_pairing_by_hand():
    assert [cantor(0, 0), cantor(1, 0), cantor(0, 1), cantor(2, 3)] == [0, 1, 2, 18]


def test_bad_exports_are_refused(graph, tmp_path):
    with pytest.raises(UserError, match="no such export"):
        export_graph(graph, tmp_path / "flow.xlsx")
    assert list(tmp_path.iterdir()) == []


def test_the_figure_of_a_feature_has_its_chain_on_the_middle_line(graph):
    (axis,) = draw_flow(graph, "L1/1", label_of=lambda feature: f"label of {feature}").axes
    assert axis.get_title("left") == "Flow through L1/1"
    chain = [str(step.feature) for step in graph.chain("L1/1")]
    drawn = {text.get_text().split("\n")[0]: text.xy for text in axis.texts}
    assert set(chain) <= set(drawn)
    assert [drawn[name] for name in chain] == [(i, 0.0) for i in range(len(chain))]
    assert any(text.get_text().endswith("label of L1/1") for text in axis.texts)
