"""The atlas stage on a small real run: what is on the pages is what the model and the dictionaries
do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import torch

from data.store import ActivationStore
from featureflow.errors import UserError
from featureflow.sites import parse_site
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.describe.labels import METHODS
from pipeline.describe.opened import Atlas, diff_atlases
from pipeline.describe.workshop import corpus_for
from pipeline.site.attach import attach_scores, attach_steering, carry_over, read_scores
from pipeline.site.build import prepare
from pipeline.site.cards import Cards
from pipeline.site.shards import Shard, read_shard, write_shard
from pipeline.site.validate import validate_atlas
from pipeline.stages import atlas as stage
from sae import load_sae, save_sae
from tests.pipeline.atlas.conftest import random_dictionary

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


def inputs_of(small_run) -> stage.Inputs:
    return stage.Inputs(collect=small_run.collect, train=small_run.train, link=small_run.link)


def test_the_stage_leaves_a_valid_site_and_tables(small_run):
    assert validate_atlas(small_run.atlas.path)["n_sites"] == len(SITES)
    files = set(small_run.atlas.files)
    assert {
        f"tables/{n}.parquet" for n in ("features", "labels", "examples", "edges", "tokens")
    } <= files
    assert not any(".work" in name for name in files)
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


def test_density_is_a_number_and_not_a_formatted_text(small_run, cards):
    """The trap of densities parsed from titles with three decimals: a single firing keeps its
    density."""
    atlas = Atlas.open(small_run.atlas.path)
    n = cards.manifest["corpus"]["n_tokens_seen"]
    counts = np.concatenate(
        [[c.numbers["count"] for c in cards.iter_site(short)] for short in SITES]
    )
    assert atlas.features["density"].to_numpy() == pytest.approx(counts / n, rel=1e-6)


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
    edges = Atlas.open(small_run.atlas.path).edges
    for card, label in found:
        assert ((edges["source"] == label["from"]) & (edges["target"] == card.feature)).any()
        parent = cards.card(label["from"]).labels[0]
        assert parent["accepted"]
        assert label["n"] <= int(card.numbers["count"])


def test_every_link_is_on_the_page_of_its_target_once(small_run):
    edges = Atlas.open(small_run.atlas.path).edges
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


def test_tables_open_in_one_line_and_agree_with_the_cards(small_run, cards):
    atlas = Atlas.open(small_run.atlas.path)
    assert list(atlas.features["feature"]) == [f"{short}/{f}" for short in SITES for f in range(48)]
    for feature in ("L0/0", "L1.mlp/7", "L2/46"):
        card = cards.card(feature)
        assert list(atlas.labels_of(feature)["text"]) == [label["text"] for label in card.labels]
        shown = [e for e in card.examples if e.tab == "top"]
        table = atlas.examples_of(feature, tab="top")
        assert [e.row for e in shown] == list(table["row"])
        assert table["token_text"][0] == atlas.vocabulary.text(shown[0].tokens[shown[0].peak])
    with pytest.raises(UserError, match="no latent 48"):
        atlas.label_of("L2/48")


class _Killed(Exception):
    pass


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(small_run, tmp_path):
    def kill(label: str, done: int, total: int) -> None:
        if (label, done) == ("survey", 2):
            raise _Killed

    config = stage.Config(precision="float32", min_f1=0.3)
    with pytest.raises(_Killed):
        stage.run(
            config, inputs_of(small_run), tmp_path / "atlas", RunContext(n_threads=1, progress=kill)
        )
    assert not (tmp_path / "atlas").exists()
    again = stage.run(config, inputs_of(small_run), tmp_path / "atlas", RunContext(n_threads=1))
    pages = {
        n: e["sha256"]
        for n, e in again.files.items()
        if n.startswith("site/") and n != "site/manifest.json"
    }
    assert pages == {n: small_run.atlas.files[n]["sha256"] for n in pages}


def test_store_and_dictionaries_that_do_not_belong_together_are_refused(small_run, tmp_path):
    train = shutil.copytree(small_run.train.path, tmp_path / "train")
    wrong = random_dictionary(0)
    narrow = wrong.replace(
        W_enc=wrong.W_enc[:, :8],
        W_dec=wrong.W_dec[:, :8],
        b_dec=wrong.b_dec[:8],
        b_in=wrong.b_in[:8],
    )
    save_sae(narrow, train / "dictionaries" / "L2")
    fake = Artifact(**{**small_run.train.__dict__, "path": train})
    inputs = stage.Inputs(collect=small_run.collect, train=fake)
    with pytest.raises(UserError, match="do not belong together at L2"):
        stage.run(stage.Config(), inputs, tmp_path / "atlas", RunContext(n_threads=1))


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


def test_steering_samples_are_attached_as_data_and_the_atlas_still_opens(small_run, tmp_path):
    folder = shutil.copytree(small_run.atlas.path, tmp_path / "atlas")
    hostile = "</script><script>alert(1)</script>\u2028"
    sample = {
        "feature": "L2/3",
        "arm": "flow",
        "dose": 0.2,
        "prompt": "A",
        "unsteered": "B",
        "steered": hostile,
    }
    document = {"version": 1, "samples": [sample], "effects": [], "commands": {}}
    for _ in range(2):
        attach_steering(folder, document)
    Artifact.open(folder, kind="atlas", schema=1).verify()
    assert read_shard(folder / "site", "attached/steering").json == document
    assert "script" not in (folder / "site/attached/steering.js").read_text()
    jsonschema.validate(document, schema("steering"))
    validate_atlas(folder)
    with pytest.raises(UserError, match=r"samples\[0\]\.steered"):
        attach_steering(folder, {"samples": [{**sample, "steered": None}]})
    with pytest.raises(UserError, match="no atlas here"):
        attach_steering(tmp_path / "nowhere", document)


def test_what_was_attached_stays_when_the_atlas_is_made_again_from_the_same_dictionaries(
    small_run, tmp_path
):
    out = Path(shutil.copytree(small_run.atlas.path, tmp_path / "atlas"))
    sample = {
        "feature": "L2/3",
        "arm": "flow",
        "dose": 0.2,
        "prompt": "A",
        "unsteered": "B",
        "steered": "C",
    }
    attach_steering(out, {"samples": [sample]})
    attach_scores(out, {"L2/3": {"examples_score": 0.9}})
    again = stage.run(
        stage.Config(precision="float32", seed=1),
        inputs_of(small_run),
        out,
        RunContext(n_threads=1),
    )
    again.verify()
    assert read_shard(out / "site", "attached/steering").json["samples"] == [sample]
    assert read_scores(out) == {"L2/3": {"examples_score": 0.9}}
    assert not carry_over(out, tmp_path / "other" / "site", train="another digest")
    assert not carry_over(
        tmp_path / "nowhere", tmp_path / "other" / "site", train=small_run.train.digest
    )
    assert not (tmp_path / "other").exists()


def test_a_process_forgets_a_corpus_when_the_store_was_made_anew_in_its_place(small_run, tmp_path):
    """Paths alone would give a worker that outlives an atlas the old text."""
    config = stage.Config()
    shop = stage.workshop_of(config, inputs_of(small_run), SimpleNamespace(path=tmp_path))
    store = ActivationStore.open(shop.store)
    prepare(shop, stage.model_facts(small_run.collect, store, RunContext(n_threads=1)))
    assert corpus_for(shop) is corpus_for(shop)
    assert corpus_for(replace(shop, made_from=(("collect", "new"),))) is not corpus_for(shop)


def test_workers_of_a_cluster_make_the_same_atlas_byte_for_byte(small_run, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, protocol="tcp"
    ) as cluster:
        context = RunContext(n_threads=1, scheduler=cluster.scheduler_address)
        config = stage.Config(precision="float32", min_f1=0.3)
        made = stage.run(config, inputs_of(small_run), tmp_path / "atlas", context)
    differ = [n for n, e in made.files.items() if e["sha256"] != small_run.atlas.files[n]["sha256"]]
    assert differ == []
    assert made.files.keys() == small_run.atlas.files.keys()


def test_an_atlas_of_an_older_format_is_refused_with_what_to_do(site_copy):
    write_shard(site_copy, "manifest", Shard(json={"format": "featureflow-atlas", "version": 0}))
    for opened in (Cards.open, validate_atlas):
        with pytest.raises(UserError, match="version"):
            opened(site_copy)


def test_two_atlases_of_the_same_dictionaries_match_feature_by_feature(small_run):
    atlas = Atlas.open(small_run.atlas.path)
    saes = {parse_site(s): load_sae(small_run.train.path / "dictionaries" / s) for s in SITES}
    same = diff_atlases(atlas, atlas, saes, saes)
    assert set(same["status"]) == {"match"}
    assert (same["feature_before"] == same["feature_after"]).all()
    shuffled = {s: sae.replace(W_dec=sae.W_dec.roll(1, dims=0)) for s, sae in saes.items()}
    moved = diff_atlases(atlas, atlas, saes, shuffled)
    pair = moved[moved["feature_before"] == "L2/5"].iloc[0]
    assert (pair["status"], pair["feature_after"]) == ("match", "L2/6")
