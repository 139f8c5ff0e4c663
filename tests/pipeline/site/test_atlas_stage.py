"""The atlas stage on a small real run: what is on the pages is what the model and the dictionaries
do."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from types import SimpleNamespace

import jsonschema
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from data.store import ActivationStore
from featureflow.errors import UserError
from featureflow.sites import parse_site
from pipeline.artifact import SCHEMAS, Artifact
from pipeline.context import RunContext
from pipeline.describe.features import Features
from pipeline.describe.labels import METHODS
from pipeline.findings import Finding, write_finding
from pipeline.run import Run
from pipeline.site.pages import label_json
from pipeline.site.shards import Shard, read_shard, write_shard
from pipeline.site.validate import validate_atlas
from pipeline.stages import atlas as stage
from pipeline.stages import describe
from pipeline.trace.document import document_of
from pipeline.trace.kept import write_trace
from pipeline.trace.trace import TraceOptions
from sae import load_sae
from tests.pipeline.site.site_cards import Cards
from tests.pipeline.small_run import DESCRIBE

SITES = ("L0", "L1.mlp", "L1", "L2")


def schema(name: str) -> dict:
    return json.loads(
        (resources.files("pipeline.site") / "schemas" / f"{name}.schema.json").read_text()
    )


@pytest.fixture(scope="module")
def cards(small_run) -> Cards:
    return Cards.open(small_run.atlas.path / "site")


@pytest.fixture
def site_copy(small_run, tmp_path):
    return shutil.copytree(small_run.atlas.path / "site", tmp_path / "site")


@pytest.fixture(scope="module")
def features(small_run) -> Features:
    return Features.open(small_run.describe.path)


def edges_of(small_run) -> pd.DataFrame:
    """Kept links with the ids of both ends."""
    edges = pd.read_parquet(small_run.link.path / "edges.parquet").query("kept")
    ends = {
        end: edges[f"{end}_site"].astype(str) + "/" + edges[f"{end}_latent"].astype(str)
        for end in ("source", "target")
    }
    return edges.assign(**ends)


def test_the_stage_leaves_a_valid_site_and_tables(small_run):
    assert validate_atlas(small_run.atlas.path)["n_sites"] == len(SITES)
    names = ("features", "labels", "examples", "tokens", "documents", "vocabulary")
    assert {f"tables/{name}.parquet" for name in names} <= set(small_run.describe.files)
    assert not any(".work" in name for name in small_run.describe.files)
    jsonschema.validate(
        json.loads((small_run.atlas.path / "site/manifest.json").read_text()), schema("manifest")
    )


def test_examples_on_the_cards_are_what_the_dictionary_does_on_that_text(small_run, cards):
    store = ActivationStore.open(small_run.collect.path / "store.zarr")
    tokens = store.tokens()
    for short in SITES:
        sae = load_sae(small_run.train.path / "dictionaries" / short)
        z = sae.encode(torch.from_numpy(store.read(parse_site(short), 0, store.n_rows))).numpy()
        for card in cards.iter_site(short):
            latent = int(card.feature.split("/")[1])
            for example in card.examples:
                low = example.row - example.peak
                window = slice(low, low + len(example.tokens))
                assert list(example.tokens) == tokens.id[window].tolist()
                expected = np.where(tokens.flags[window] == 0, z[window, latent], 0)
                tolerance = float(card.numbers["max"]) / 250  # 8 bits on the page
                assert np.allclose(example.values, expected, atol=tolerance)
                if example.tab != "near_miss":
                    assert z[example.row, latent] == pytest.approx(example.value, rel=2e-4)


def test_no_example_is_empty_and_intervals_hold_firings_only(cards):
    """The trap of intervals that include zero: there more than half of the stored examples were
    empty."""
    for card in cards.iter_site("L2"):
        for example in card.examples:
            if example.tab != "near_miss":
                assert example.values[example.peak] > 0
            if example.tab == "decile":
                assert card.numbers["decile"][example.decile] > 0


def test_density_is_a_number_and_not_a_formatted_text(features, cards):
    """The trap of densities parsed from titles with three decimals: a single firing keeps its
    density."""
    n = cards.manifest["corpus"]["n_tokens_seen"]
    counts = np.concatenate(
        [[c.numbers["count"] for c in cards.iter_site(short)] for short in SITES]
    )
    assert features.table["density"].to_numpy() == pytest.approx(counts / n, rel=1e-6)


def test_similar_and_co_firing_features_are_searched_in_the_whole_dictionary(small_run, cards):
    """The trap of correlations inside one batch of features."""
    sae = load_sae(small_run.train.path / "dictionaries" / "L2")
    cosine = (sae.W_dec @ sae.W_dec.T).numpy() - 2 * np.eye(sae.n_latents)
    for card in cards.iter_site("L2"):
        latent = int(card.feature.split("/")[1])
        assert card.ids("similar")[0] == int(cosine[latent].argmax())
        assert card.numbers["similar_cosine"][0] == pytest.approx(cosine[latent].max(), rel=2**-10)


def test_promoted_tokens_are_the_largest_of_the_centred_unembedding(small_run, cards):
    from pydantic import TypeAdapter

    from data.model.language_model import LanguageModel
    from data.model.spec import ModelSpec

    model = LanguageModel.open(
        TypeAdapter(ModelSpec).validate_python(small_run.collect.config["model"])
    )
    W_U, gain = model.unembedding()
    sae = load_sae(small_run.train.path / "dictionaries" / "L2")
    logits = ((W_U - W_U.mean(dim=0)) * gain) @ sae.W_dec[3]
    special = list(model.tokenizer.special_ids)
    logits[special] = -torch.inf
    logits[model.tokenizer.n_tokens :] = -torch.inf
    card = cards.card("L2/3")
    assert card.ids("promotes")[:5] == logits.topk(5).indices.tolist()
    std = ((W_U - W_U.mean(dim=0)) * gain @ sae.W_dec[3]).square().mean().sqrt()
    assert card.numbers["promotes_score"][0] == pytest.approx(float(logits.max() / std), rel=1e-3)


def test_a_latent_that_never_fires_is_an_honest_empty_card(cards):
    card = cards.card("L2/47")
    assert (int(card.numbers["count"]), card.labels, card.examples) == (0, (), ())
    assert card.ids("token") == []
    assert np.isnan(card.numbers["decile"]).all()


def test_inherited_labels_name_their_origin_and_are_scored_on_the_feature_itself(small_run, cards):
    inherited = METHODS.index(next(m for m in METHODS if m.name == "inherited"))
    found = [
        (c, label)
        for short in SITES
        for c in cards.iter_site(short)
        for label in c.labels
        if label["method"] == inherited
    ]
    assert found
    edges = edges_of(small_run)
    for card, label in found:
        assert ((edges["source"] == label["from"]) & (edges["target"] == card.feature)).any()
        parent = cards.card(label["from"]).labels[0]
        assert parent["accepted"]
        assert label["n"] <= int(card.numbers["count"])


def test_every_link_is_on_the_page_of_its_target_once(small_run):
    edges = edges_of(small_run)
    site = small_run.atlas.path / "site"
    shown = 0
    for i, short in enumerate(SITES):
        c = read_shard(site, f"sites/{short}/flow").columns
        for latent in range(48):
            for e in range(int(c["target_offset"][latent]), int(c["target_offset"][latent + 1])):
                source = f"{SITES[c['source_site'][e]]}/{c['source'][e]}"
                row = edges[
                    (edges["source"] == source) & (edges["target"] == f"{short}/{latent}")
                ].iloc[0]
                assert c["cosine"][e] / 10000 == pytest.approx(row["cosine"], abs=1e-4)
                assert SITES[c["source_site"][e]] != short
                shown += 1
        assert i == SITES.index(short)
    assert shown == len(edges) > 0


def test_token_search_leads_to_features_that_fire_on_the_token(small_run, cards):
    manifest = cards.manifest
    shard = manifest["search"]["shards"][0]
    c = read_shard(small_run.atlas.path / "site", f"search/tokens/{shard:03d}").columns
    token = int(np.flatnonzero(np.diff(c["offset"].astype(int)))[0])
    entries = range(int(c["offset"][token]), int(c["offset"][token + 1]))
    assert sorted(c["weight"][entries.start : entries.stop], reverse=True) == list(
        c["weight"][entries.start : entries.stop]
    )
    for e in entries:
        card = cards.card(f"{SITES[c['site'][e]]}/{c['latent'][e]}")
        listed = card.ids("token") if c["kind"][e] == 0 else card.ids("promotes")
        assert shard * manifest["search"]["tokens_per_shard"] + token in listed


def test_tables_and_python_cards_agree_with_the_pages(features, cards):
    assert list(features.table["feature"]) == [f"{short}/{f}" for short in SITES for f in range(48)]
    for feature in ("L0/0", "L1.mlp/7", "L2/46"):
        card = cards.card(feature)
        assert list(features.labels_of(feature)["text"]) == [label["text"] for label in card.labels]
        mine = features.card(feature)
        assert [label_json(label) for label in mine.labels] == list(card.labels)
        for here, there in zip(mine.examples, card.examples, strict=True):
            assert (here.tokens, here.values, here.tab) == (there.tokens, there.values, there.tab)
            assert here.value == pytest.approx(there.value, rel=2e-4)
        shown = [e for e in card.examples if e.tab == "top"]
        table = features.examples_of(feature, tab="top")
        assert [e.row for e in shown] == list(table["row"])
        assert table["token_text"][0] == features.vocabulary.text(shown[0].tokens[shown[0].peak])
    with pytest.raises(UserError, match="no latent 48"):
        features.label_of("L2/48")


@pytest.mark.parametrize("damage", ["flip", "missing", "extra", "column", "script"])
def test_validation_names_what_is_wrong(site_copy, damage):
    path = site_copy / "sites/L2/cards/000.js"
    if damage == "flip":
        content = bytearray(path.read_bytes())
        content[200] ^= 1
        path.write_bytes(bytes(content))
    elif damage == "missing":
        path.unlink()
    elif damage == "extra":
        (site_copy / "evil.js").write_text("alert(1)")
    elif damage == "script":
        path.write_text(path.read_text() + "alert(1)\n")
    else:
        shard = read_shard(site_copy, "sites/L2/cards/000")
        row = shard.columns["example_row"].copy()
        row[0] = 10**9
        write_shard(
            site_copy,
            "sites/L2/cards/000",
            Shard(json=shard.json, columns={**shard.columns, "example_row": row}),
        )
    with pytest.raises(UserError) as error:
        validate_atlas(site_copy)
    named = " ".join(f"{p.where} {p.what}" for p in error.value.problems)
    assert ("evil.js" if damage == "extra" else "sites/L2/cards/000") in named
    assert damage != "column" or "not below" in named


def inputs_of(small_run, **changed) -> stage.Inputs:
    given = {name: getattr(small_run, name) for name in ("train", "link", "describe")}
    return stage.Inputs(**given | changed)


def test_workers_of_a_cluster_make_the_same_atlas_byte_for_byte(small_run, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, protocol="tcp"
    ) as cluster:
        context = RunContext(n_threads=1, scheduler=cluster.scheduler_address)
        inputs = describe.Inputs(
            collect=small_run.collect, train=small_run.train, link=small_run.link
        )
        described = describe.run(DESCRIBE, inputs, tmp_path / "describe", context)
        given = inputs_of(small_run, describe=described)
        made = stage.run(stage.Config(), given, tmp_path / "atlas", context)
    for ours, theirs in ((made, small_run.atlas), (described, small_run.describe)):
        assert ours.files.keys() == theirs.files.keys()
        assert [n for n, e in ours.files.items() if e["sha256"] != theirs.files[n]["sha256"]] == []


def test_steering_is_shown_as_data_and_makes_another_atlas(small_run, tmp_path):
    """Hostile text in a sample stays text; the atlas is remade when steering changes."""
    hostile = "</script><script>alert(1)</script>\u2028"
    sample = dict.fromkeys(("arm", "nodes", "prompt", "unsteered"), "L2/3") | {"steered": hostile}
    numbers = dict.fromkeys(("target", "dose", "top_tokens_unsteered", "top_tokens_steered"), 0.2)
    effect = {"measure": "top_tokens", "difference": 1.0, "low": 0.5, "high": 1.5, "n": 8}
    with Artifact.create(
        tmp_path / "steer",
        kind="steer",
        schema=SCHEMAS["steer"],
        config={"schedule": {"kind": "constant"}, "seed": 0},
        inputs={"describe": small_run.describe.digest},
    ) as draft:
        samples = pd.DataFrame([{"feature": "L2/3", **sample, **numbers}])
        samples.to_parquet(draft.path / "samples.parquet")
        effects = pd.DataFrame([{"feature": "L2/3", "arm": "flow", **numbers, **effect}])
        found = Finding(tables={"effects": effects}, text="")
        write_finding(found, draft.path, name="steer", title="steering")
    steered = Artifact.open(tmp_path / "steer", kind="steer", schema=SCHEMAS["steer"])
    inputs = inputs_of(small_run, steer=steered)
    made = stage.run(stage.Config(), inputs, tmp_path / "atlas", RunContext(n_threads=1))
    assert made.digest != small_run.atlas.digest
    document = read_shard(made.path / "site", "attached/steering").json
    assert document["samples"][0]["steered"] == hostile
    assert "script" not in (made.path / "site/attached/steering.js").read_text()
    jsonschema.validate(document, schema("steering"))
    validate_atlas(made.path)


@pytest.fixture
def finding(small_run, tmp_path) -> Artifact:
    """What a lens found: a table, a figure, and a column for two features of L2 and an unknown."""
    table = pd.DataFrame(
        {
            "feature": ["L2/3", "L2/4"],
            "target_site": ["L2", "L1.mlp"],
            "depth": [0.25, np.nan],
            "said": ["</script>", None],
            "tokens": [["a", "b"], []],
        }
    )
    columns = pd.DataFrame(
        {"feature": ["L2/3", "L1/40", "L9/1"], "depth": [0.25, 0.5, 1.0], "kind": ["x", None, "z"]}
    )
    made = Finding(
        tables={"by_feature": table},
        text="One sentence.",
        headline={"median_depth": np.float32(0.5), "of": None},
        figure=lambda: Figure(figsize=(1, 1)),
        columns=columns,
    )
    inputs = {"link": small_run.link.digest}
    path = tmp_path / "lenses" / "planted"
    with Artifact.create(path, kind="lens", schema=1, config={}, inputs=inputs) as draft:
        write_finding(made, draft.path, name="planted", title="A planted lens")
    return Artifact.open(path, kind="lens", schema=1)


def test_a_finding_gets_a_page_and_its_columns_reach_the_cards(small_run, finding, tmp_path):
    inputs = inputs_of(small_run, lenses={"planted": finding})
    made = stage.run(stage.Config(), inputs, tmp_path / "atlas", RunContext(n_threads=1))
    assert made.inputs["lenses/planted"] == finding.digest
    assert validate_atlas(made.path)["n_sites"] == len(SITES)
    site = made.path / "site"
    manifest = read_shard(site, "manifest").json
    assert manifest["lenses"] == [{"name": "planted", "title": "A planted lens"}]
    assert {s["short"] for s in manifest["sites"] if s["lenses"]} == {"L2", "L1"}
    page = read_shard(site, "lenses/planted").json
    assert (page["title"], page["text"].strip()) == ("A planted lens", "One sentence.")
    assert page["headline"] == {"median_depth": 0.5, "of": None}
    assert page["figure"].lstrip().startswith("<?xml")
    [table] = page["tables"]
    kinds = {column["name"]: column["kind"] for column in table["columns"]}
    assert [kinds[n] for n in ("feature", "target_site", "depth")] == ["feature", "site", "number"]
    assert table["rows"] == [
        ["L2/3", "L2", 0.25, "</script>", "a, b"],
        ["L2/4", "L1.mlp", None, None, ""],
    ]
    assert "script" not in (site / "lenses/planted.js").read_text()
    columns = read_shard(site, "sites/L2/lenses")
    assert [column["name"] for column in columns.json["columns"]] == ["depth", "kind"]
    depth = columns.columns["0"]
    assert (len(depth), depth[3], int(np.isfinite(depth).sum())) == (48, 0.25, 1)
    assert columns.json["columns"][1]["texts"][3] == "x"


def test_a_trace_of_this_run_gets_a_page_and_one_of_another_does_not(small_run, tmp_path):
    run = Run.open(small_run.root)
    found = run.trace("The river runs.", options=TraceOptions(n_removed=3))
    document = document_of(found, run, "The river runs.")
    elsewhere = SimpleNamespace(root=tmp_path, has=run.has, artifact=run.artifact)
    kept = write_trace(found, document, elsewhere)
    made = stage.run(
        stage.Config(), inputs_of(small_run), tmp_path / "atlas", RunContext(n_threads=1)
    )
    assert made.inputs[f"traces/{kept.path.name}"] == kept.digest
    site = made.path / "site"
    [entry] = read_shard(site, "manifest").json["traces"]
    assert entry["prompt"] == "The river runs."
    page = read_shard(site, f"traces/{kept.path.name}").json
    assert page == json.loads(json.dumps(document))
    validate_atlas(site)
    page["supernodes"][0]["token"] = 99
    write_shard(site, f"traces/{kept.path.name}", Shard(json=page))
    with pytest.raises(UserError, match="lies on no token"):
        validate_atlas(site)
    manifest = json.loads((kept.path / "manifest.json").read_text())
    manifest["inputs"]["link"] = "0" * 64
    (kept.path / "manifest.json").write_text(json.dumps(manifest))
    again = stage.run(
        stage.Config(), inputs_of(small_run), tmp_path / "atlas", RunContext(n_threads=1)
    )
    assert read_shard(again.path / "site", "manifest").json["traces"] == []


@pytest.mark.parametrize("damage", ["row", "column", "missing"])
def test_a_damaged_lens_page_is_named(small_run, finding, tmp_path, damage):
    inputs = inputs_of(small_run, lenses={"planted": finding})
    made = stage.run(stage.Config(), inputs, tmp_path / "atlas", RunContext(n_threads=1))
    site, key = made.path / "site", "sites/L2/lenses" if damage == "column" else "lenses/planted"
    shard = read_shard(site, key)
    if damage == "missing":
        (site / f"{key}.js").unlink()
    elif damage == "row":
        shard.json["tables"][0]["rows"][1].pop()
        write_shard(site, key, shard)
    else:
        write_shard(site, key, Shard(json=shard.json, columns={"0": shard.columns["0"][:-1]}))
    with pytest.raises(UserError) as raised:
        validate_atlas(site)
    problems = {f"{p.where}: {p.what}" for p in raised.value.problems}
    expected = {
        "row": "lenses/planted: table by_feature: a row of 4 cells, not 5",
        "column": "sites/L2/lenses: planted depth: 47 entries instead of 48",
        "missing": "lenses/planted.js: shard missing",
    }
    assert expected[damage] in problems


def test_an_atlas_of_an_older_format_is_refused_with_what_to_do(site_copy):
    write_shard(site_copy, "manifest", Shard(json={"format": "featureflow-atlas", "version": 0}))
    for opened in (Cards.open, validate_atlas):
        with pytest.raises(UserError, match="version"):
            opened(site_copy)


def test_every_living_feature_of_the_stream_is_on_one_trunk_and_every_step_is_the_best_link(
    small_run, features
) -> None:
    shard = read_shard(small_run.atlas.path / "site", "flow/trunks")
    sites = [
        s["short"] for s in read_shard(small_run.atlas.path / "site", "manifest").json["sites"]
    ]
    site, latent = shard.columns["site"], shard.columns["latent"]
    members = [f"{sites[s]}/{f}" for s, f in zip(site, latent, strict=True)]
    table = features.table.set_index("feature")
    assert len(set(members)) == len(members)
    assert set(members) == set(table.index[table["alive"] & table["site"].isin(["L0", "L1", "L2"])])
    assert shard.columns["count"].tolist() == table.loc[members, "n_active"].tolist()
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


def test_a_feature_on_two_trunks_is_not_a_whole_atlas(small_run, tmp_path) -> None:
    site = shutil.copytree(small_run.atlas.path / "site", tmp_path / "site")
    shard = read_shard(site, "flow/trunks")
    columns = {name: column.copy() for name, column in shard.columns.items()}
    for name in ("site", "latent"):
        columns[name][-1] = columns[name][0]
    write_shard(site, "flow/trunks", Shard(json=shard.json, columns=columns))
    with pytest.raises(UserError, match="on two trunks"):
        validate_atlas(tmp_path)


def test_communities_hold_what_the_feature_table_says(small_run, features) -> None:
    shard = read_shard(small_run.atlas.path / "site", "flow/communities")
    table = features.table.query("community >= 0").groupby("community").size()
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
