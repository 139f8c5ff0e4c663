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

from featureflow.errors import UserError
from featureflow.sites import parse_site
from pipeline.describe.opened import Atlas
from pipeline.site.cards import Cards
from pipeline.site.exports import (
    export_attribution_graph,
    export_bulk,
    export_embedding_atlas,
    export_gexf,
    export_graphml,
    export_upload_batches,
)
from pipeline.site.exports.graphs import cantor
from pipeline.site.imports import (
    attach_labels,
    import_neuronpedia,
    import_neuronpedia_examples,
    import_notes,
    write_examples,
)
from sae import load_sae


def schema(name: str) -> dict:
    return json.loads(
        (resources.files("pipeline.site") / "schemas" / f"{name}.schema.json").read_text()
    )


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
    assert [f["index"] for f in features] == [
        f for f in range(48) if cards.card(f"L2/{f}").numbers["count"]
    ]
    first, card = features[0], cards.card("L2/0")
    assert (
        first["density"] == float(card.numbers["count"]) / cards.manifest["corpus"]["n_tokens_seen"]
    )
    assert all(max(a["values"]) > 0 for f in features for a in f["activations"])
    assert all(len(a["tokens"]) == len(a["values"]) for f in features for a in f["activations"])


def test_bulk_files_hold_one_line_a_feature_and_come_back_as_labels(cards, tmp_path):
    paths = export_bulk(cards, "L2", tmp_path, model_id="tiny", source="2-ff")
    by_kind = {path.parent.name: path for path in paths}
    lines = [
        json.loads(line) for line in gzip.decompress(by_kind["features"].read_bytes()).splitlines()
    ]
    assert [int(line["index"]) for line in lines] == [
        f for f in range(48) if cards.card(f"L2/{f}").numbers["count"]
    ]
    back = import_neuronpedia([by_kind["explanations"]], parse_site("L2"))
    expected = [label["text"] for f in range(48) for label in cards.card(f"L2/{f}").labels]
    assert [label.text for label in back] == expected


@pytest.mark.parametrize("as_bulk", [True, False])
def test_examples_come_back_from_both_of_neuronpedias_forms(cards, tmp_path, as_bulk):
    if as_bulk:
        paths = export_bulk(cards, "L2", tmp_path, model_id="tiny", source="2-ff")
        paths = [path for path in paths if path.parent.name == "activations"]
    else:
        paths = export_upload_batches(cards, "L2", tmp_path, model_id="tiny", source="2-ff")
    back = import_neuronpedia_examples(paths, parse_site("L2"))
    shown = [
        (f"L2/{f}", e)
        for f in range(48)
        for e in cards.card(f"L2/{f}").examples
        if e.tab in ("top", "decile")
    ]
    assert len(back) == len(shown) > 100
    for mine, (feature, example) in zip(back, shown, strict=True):
        assert mine.feature == feature
        assert mine.tokens == tuple(
            cards.vocabulary.text(token).replace("\0", " ") for token in example.tokens
        )
        assert mine.values == pytest.approx(example.values, abs=1e-5)
        assert (mine.low is None) == (example.tab == "top")
    table = pq.read_table(write_examples(back, tmp_path / "examples.parquet")).to_pandas()
    first = table[table["feature"] == "L2/0"].reset_index(drop=True)
    strongest = max(max(e.values) for e in cards.card("L2/0").examples)
    assert first["value"].is_monotonic_decreasing
    assert first["value"][0] == pytest.approx(strongest, abs=1e-4)
    assert first["before"][0] + first["token_text"][0] + first["after"][0] == "".join(
        first["tokens"][0]
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"index": "0", "tokens": ["a", "b"], "values": [1.0]}, "one value a token"),
        ({"index": "0", "tokens": "ab", "values": [1.0, 2.0]}, "list of texts"),
        ({"index": "0", "tokens": ["a"], "values": ["b"]}, "list of numbers"),
        ({"index": "x", "tokens": ["a"], "values": [1.0]}, "not a feature"),
        ([], "not an object"),
    ],
)
def test_bad_examples_are_refused_with_their_line(tmp_path, line, message):
    path = tmp_path / "batch-0.jsonl"
    path.write_text("\n" + json.dumps(line) + "\n")
    with pytest.raises(UserError, match=message) as raised:
        import_neuronpedia_examples([path], parse_site("L2"))
    assert "batch-0.jsonl:2" in str(raised.value)


def test_a_cut_gzip_file_is_refused(tmp_path):
    path = tmp_path / "batch-0.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"index": "0"}\n')[:-6])
    with pytest.raises(UserError, match="cannot be read"):
        import_neuronpedia_examples([path], parse_site("L2"))


def test_an_attribution_graph_is_the_neighbourhood_of_the_feature(atlas, tmp_path):
    edges = atlas.edges
    feature = edges["target"].iloc[0]
    document = json.loads(
        export_attribution_graph(atlas, feature, tmp_path / "g.json", hops=1).read_text()
    )
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
    saes = {
        site: load_sae(small_run.train.path / "dictionaries" / site.short) for site in atlas.sites
    }
    frame = pq.read_table(
        export_embedding_atlas(atlas, saes, tmp_path / "points.parquet")
    ).to_pandas()
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
    table = pq.read_table(
        attach_labels(atlas, import_notes(notes), tmp_path / "labels.parquet")
    ).to_pandas()
    mine = table[table["feature"] == "L2/3"].sort_values("rank")
    assert (mine["text"].iloc[-1], mine["method"].iloc[-1], mine["accepted"].iloc[-1]) == (
        "my label",
        "human",
        False,
    )
    assert len(table) == len(atlas.labels) + 1


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "not JSON"),
        ('{"notes": []}', "not an export of notes"),
        (
            '{"kind": "featureflow-notes", "schema": 1, "notes": [{"feature": "x", "label": "a"}]}',
            "not a feature",
        ),
        (
            '{"kind": "featureflow-notes", "schema": 1,'
            ' "notes": [{"feature": "L1/1", "label": 5}]}',
            "not a text",
        ),
    ],
)
def test_bad_notes_are_refused_with_what_is_wrong(tmp_path, document, message):
    path = tmp_path / "notes.json"
    path.write_text(document)
    with pytest.raises(UserError, match=message):
        import_notes(path)


def test_labels_of_unknown_features_are_refused(atlas, tmp_path):
    path = tmp_path / "n.json"
    path.write_text(
        '{"kind": "featureflow-notes", "schema": 1, "notes": [{"feature": "L2/99", "label": "a"}]}'
    )
    with pytest.raises(UserError, match="L2/99"):
        attach_labels(atlas, import_notes(path), tmp_path / "labels.parquet")
