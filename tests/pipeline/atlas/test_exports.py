"""Exports open in other readers and say what the cards say; imports read what people wrote."""

from __future__ import annotations

import gzip
import json
from importlib import resources

import igraph
import jsonschema
import networkx as nx
import pyarrow.parquet as pq
import pytest

from data.sites import parse_site
from pipeline.atlas.cards import Cards
from pipeline.atlas.exports import (
    export_attribution_graph,
    export_bulk,
    export_embedding_atlas,
    export_gexf,
    export_graphml,
    export_upload_batches,
)
from pipeline.atlas.exports.graphs import cantor
from pipeline.atlas.imports import attach_labels, import_neuronpedia, import_notes
from pipeline.atlas.opened import Atlas
from sae import load_sae
from sae.errors import UserError


def schema(name: str) -> dict:
    return json.loads((resources.files("pipeline.atlas") / "schemas" / f"{name}.schema.json").read_text())


@pytest.fixture(scope="module")
def atlas(small_run) -> Atlas:
    return Atlas.open(small_run.atlas.path)


@pytest.fixture(scope="module")
def cards(small_run) -> Cards:
    return Cards.open(small_run.atlas.path / "site")


def test_upload_batches_are_what_neuronpedia_takes_and_carry_every_living_feature(cards, tmp_path):
    paths = export_upload_batches(cards, "L2", tmp_path, model_id="tiny", source="2-ff")
    features = []
    for path in paths:
        body = json.loads(path.read_text())
        jsonschema.validate(body, schema("neuronpedia-upload-batch"))
        features += body["features"]
    assert [f["index"] for f in features] == [f for f in range(48) if cards.card(f"L2/{f}").numbers["count"]]
    first, card = features[0], cards.card("L2/0")
    assert first["density"] == float(card.numbers["count"]) / cards.manifest["corpus"]["n_tokens_seen"]
    assert all(max(a["values"]) > 0 for f in features for a in f["activations"])
    assert all(len(a["tokens"]) == len(a["values"]) for f in features for a in f["activations"])


def test_bulk_files_hold_one_line_a_feature_and_come_back_as_labels(cards, tmp_path):
    paths = export_bulk(cards, "L2", tmp_path, model_id="tiny", source="2-ff")
    by_kind = {path.parent.name: path for path in paths}
    lines = [json.loads(line) for line in gzip.decompress(by_kind["features"].read_bytes()).splitlines()]
    assert [int(line["index"]) for line in lines] == [f for f in range(48) if cards.card(f"L2/{f}").numbers["count"]]
    back = import_neuronpedia([by_kind["explanations"]], parse_site("L2"))
    expected = [label["text"] for f in range(48) for label in cards.card(f"L2/{f}").labels]
    assert [label.text for label in back] == expected


def test_an_attribution_graph_is_the_neighbourhood_of_the_feature(atlas, tmp_path):
    edges = atlas.edges
    feature = edges["target"].iloc[0]
    document = json.loads(export_attribution_graph(atlas, feature, tmp_path / "g.json", hops=1).read_text())
    jsonschema.validate(document, schema("attribution-graph"))
    near = edges[(edges["source"] == feature) | (edges["target"] == feature)]
    assert len(document["nodes"]) == len({*near["source"], *near["target"]})
    ids = {node["node_id"] for node in document["nodes"]}
    assert all(link["source"] in ids and link["target"] in ids for link in document["links"])
    assert document["qParams"]["clickedId"] in ids


def test_cantor_pairing_by_hand():
    assert [cantor(0, 0), cantor(1, 0), cantor(0, 1), cantor(2, 3)] == [0, 1, 2, 18]


def test_graph_files_are_read_back_by_two_libraries(atlas, tmp_path):
    n_edges = len(atlas.edges.drop_duplicates(["source", "target"]))
    gexf = nx.read_gexf(export_gexf(atlas, tmp_path / "flow.gexf"))
    path = export_graphml(atlas, tmp_path / "flow.graphml")
    assert gexf.number_of_edges() == nx.read_graphml(path).number_of_edges() == n_edges
    assert igraph.Graph.Read_GraphML(str(path)).ecount() == n_edges
    feature = atlas.edges["source"].iloc[0]
    assert gexf.nodes[feature]["label"] in (feature, atlas.label_of(feature))


def test_the_embedding_atlas_table_has_its_columns(small_run, atlas, tmp_path):
    saes = {site: load_sae(small_run.train.path / "dictionaries" / site.short) for site in atlas.sites}
    frame = pq.read_table(export_embedding_atlas(atlas, saes, tmp_path / "points.parquet")).to_pandas()
    assert {"x", "y", "text", "neighbors"} <= set(frame.columns)
    assert list(frame["feature"]) == list(atlas.features["feature"])
    assert frame["neighbors"][50]["ids"].min() >= 48  # a neighbour is in the same dictionary


def test_notes_come_back_as_human_labels_behind_the_measured_ones(atlas, tmp_path):
    notes = tmp_path / "notes.json"
    document = {
        "kind": "featureflow-notes",
        "schema": 1,
        "notes": [{"feature": "L2/3", "label": "my label", "comment": ""}],
    }
    jsonschema.validate(document, schema("notes"))
    notes.write_text(json.dumps(document))
    table = pq.read_table(attach_labels(atlas, import_notes(notes), tmp_path / "labels.parquet")).to_pandas()
    mine = table[table["feature"] == "L2/3"].sort_values("rank")
    assert (mine["text"].iloc[-1], mine["method"].iloc[-1], mine["accepted"].iloc[-1]) == ("my label", "human", False)
    assert len(table) == len(atlas.labels) + 1


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "not JSON"),
        ('{"notes": []}', "not an export of notes"),
        ('{"kind": "featureflow-notes", "schema": 1, "notes": [{"feature": "x", "label": "a"}]}', "not a feature"),
        ('{"kind": "featureflow-notes", "schema": 1, "notes": [{"feature": "L1/1", "label": 5}]}', "not a text"),
    ],
)
def test_bad_notes_are_refused_with_what_is_wrong(tmp_path, document, message):
    path = tmp_path / "notes.json"
    path.write_text(document)
    with pytest.raises(UserError, match=message):
        import_notes(path)


def test_labels_of_unknown_features_are_refused(atlas, tmp_path):
    path = tmp_path / "n.json"
    path.write_text('{"kind": "featureflow-notes", "schema": 1, "notes": [{"feature": "L2/99", "label": "a"}]}')
    with pytest.raises(UserError, match="L2/99"):
        attach_labels(atlas, import_notes(path), tmp_path / "labels.parquet")
