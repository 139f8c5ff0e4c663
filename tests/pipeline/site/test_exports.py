"""Exports open in other readers and say what the cards say; imports read what people wrote."""

from __future__ import annotations

import gzip
import json
from importlib import resources

import jsonschema
import pyarrow.parquet as pq
import pytest

from featureflow.errors import UserError
from featureflow.sites import parse_site
from pipeline.describe.features import Features
from pipeline.site.exports.embedding_atlas import export_embedding_atlas
from pipeline.site.exports.neuronpedia import export_bulk, export_upload_batches
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
def features(small_run) -> Features:
    return Features.open(small_run.describe.path)


def test_upload_batches_are_what_neuronpedia_takes_and_carry_every_living_feature(
    features, tmp_path
):
    paths = export_upload_batches(features, "L2", tmp_path, model_id="tiny", source="2-ff")
    made = []
    for path in paths:
        body = json.loads(path.read_text())
        jsonschema.validate(body, schema("neuronpedia-upload-batch"))
        made += body["features"]
    assert [f["index"] for f in made] == [
        f for f in range(48) if features.card(f"L2/{f}").numbers["count"]
    ]
    first, card = made[0], features.card("L2/0")
    assert first["density"] == float(card.numbers["count"]) / features.corpus.n_kept
    assert all(max(a["values"]) > 0 for f in made for a in f["activations"])
    assert all(len(a["tokens"]) == len(a["values"]) for f in made for a in f["activations"])


def test_bulk_files_hold_one_line_a_feature_and_come_back_as_labels(features, tmp_path):
    paths = export_bulk(features, "L2", tmp_path, model_id="tiny", source="2-ff")
    by_kind = {path.parent.name: path for path in paths}
    lines = [
        json.loads(line) for line in gzip.decompress(by_kind["features"].read_bytes()).splitlines()
    ]
    assert [int(line["index"]) for line in lines] == [
        f for f in range(48) if features.card(f"L2/{f}").numbers["count"]
    ]
    back = import_neuronpedia([by_kind["explanations"]], parse_site("L2"))
    expected = [label.text for f in range(48) for label in features.card(f"L2/{f}").labels]
    assert [label.text for label in back] == expected


@pytest.mark.parametrize("as_bulk", [True, False])
def test_examples_come_back_from_both_of_neuronpedias_forms(features, tmp_path, as_bulk):
    if as_bulk:
        paths = export_bulk(features, "L2", tmp_path, model_id="tiny", source="2-ff")
        paths = [path for path in paths if path.parent.name == "activations"]
    else:
        paths = export_upload_batches(features, "L2", tmp_path, model_id="tiny", source="2-ff")
    back = import_neuronpedia_examples(paths, parse_site("L2"))
    shown = [
        (f"L2/{f}", e)
        for f in range(48)
        for e in features.card(f"L2/{f}").examples
        if e.tab in ("top", "decile")
    ]
    assert len(back) == len(shown) > 100
    for mine, (feature, example) in zip(back, shown, strict=True):
        assert mine.feature == feature
        assert mine.tokens == tuple(
            features.vocabulary.text(token).replace("\0", " ") for token in example.tokens
        )
        assert mine.values == pytest.approx(example.values, abs=1e-5)
        assert (mine.low is None) == (example.tab == "top")
    table = pq.read_table(write_examples(back, tmp_path / "examples.parquet")).to_pandas()
    first = table[table["feature"] == "L2/0"].reset_index(drop=True)
    strongest = max(max(e.values) for e in features.card("L2/0").examples)
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


def test_the_embedding_atlas_table_has_its_columns(small_run, features, tmp_path):
    saes = {
        site: load_sae(small_run.train.path / "dictionaries" / site.short)
        for site in features.sites
    }
    frame = pq.read_table(
        export_embedding_atlas(features, saes, tmp_path / "points.parquet")
    ).to_pandas()
    assert {"x", "y", "text", "neighbors"} <= set(frame.columns)
    assert list(frame["feature"]) == list(features.table["feature"])
    assert frame["neighbors"][50]["ids"].min() >= 48  # a neighbour is in the same dictionary


def test_notes_come_back_as_human_labels_behind_the_measured_ones(features, tmp_path):
    notes = tmp_path / "notes.json"
    document = {
        "kind": "featureflow-notes",
        "schema": 1,
        "notes": [{"feature": "L2/3", "label": "my label", "comment": ""}],
    }
    jsonschema.validate(document, schema("notes"))
    notes.write_text(json.dumps(document))
    table = pq.read_table(
        attach_labels(features, import_notes(notes), tmp_path / "labels.parquet")
    ).to_pandas()
    mine = table[table["feature"] == "L2/3"].sort_values("rank")
    assert (mine["text"].iloc[-1], mine["method"].iloc[-1], mine["accepted"].iloc[-1]) == (
        "my label",
        "human",
        False,
    )
    assert len(table) == len(features.labels) + 1


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


def test_labels_of_unknown_features_are_refused(features, tmp_path):
    path = tmp_path / "n.json"
    path.write_text(
        '{"kind": "featureflow-notes", "schema": 1, "notes": [{"feature": "L2/99", "label": "a"}]}'
    )
    with pytest.raises(UserError, match="L2/99"):
        attach_labels(features, import_notes(path), tmp_path / "labels.parquet")
