"""Published releases are found by name: in a folder of copies and in the Hub's cache, offline."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.training.imported import Imported, find_imported, identity_of_imported
from pipeline.training.releases import patterns_of

POST, MLP = Site(3, "resid_post"), Site(3, "mlp_out")


@pytest.mark.parametrize(
    ("release", "words", "site", "key", "path"),
    [
        (
            "google/gemma-scope-2-1b-pt",
            {"width": "65k", "l0": "medium"},
            POST,
            "resid_post",
            "resid_post_all/layer_3_width_65k_l0_medium",
        ),
        (
            "google/gemma-scope-2-270m-it",
            {"set": "", "affine": "_affine"},
            MLP,
            "transcoder",
            "transcoder/layer_3_width_16k_l0_big_affine",
        ),
        (
            "google/gemma-scope-9b-pt-att",
            {},
            Site(3, "z"),
            "z",
            "layer_3/width_16k/average_l0_*/params.npz",
        ),
        ("Qwen/SAE-Res-Qwen3.5-27B-W80K-L0_50", {}, POST, "resid_post", "layer3.sae.pt"),
        ("fnlp/Llama3_1-8B-Base-LXR-8x", {}, POST, "resid_post", "Llama3_1-8B-Base-L3R-8x"),
        ("fnlp/Llama3_1-8B-Base-LXM-32x", {}, MLP, "mlp_out", "Llama3_1-8B-Base-L3M-32x"),
        ("mwhanna/qwen3-1.7b-transcoders-lowl0", {}, MLP, "transcoder", "layer_3.safetensors"),
        ("EleutherAI/sae-llama-3-8b-32x", {}, MLP, "mlp_out", "layers.3.mlp"),
        ("EleutherAI/skip-transcoder-Llama-3.2-1B-131k", {}, MLP, "transcoder", "layers.3.mlp"),
        (
            "andyrdt/saes-gpt-oss-20b",
            {"trainer": "0"},
            POST,
            "resid_post",
            "resid_post_layer_3/trainer_0",
        ),
        (
            "jbloom/GPT2-Small-OAI-v5-128k-resid-mid-SAEs",
            {},
            Site(3, "resid_mid"),
            "resid_mid",
            "v5_128k_layer_3",
        ),
        (
            "Goodfire/Llama-3.1-8B-Instruct-SAE-l19",
            {},
            Site(19, "resid_post"),
            "resid_post",
            "*-SAE-l19.p*",
        ),
    ],
)
def test_names_become_the_paths_that_sae_lens_lists(release, words, site, key, path):
    """The paths are those of SAELens' table of releases (6.54.12), read by hand."""
    assert patterns_of(release, words, [site], kinds=[key]) == {(key, site): path}


def test_what_a_release_does_not_have_is_said_with_what_it_has():
    with pytest.raises(UserError, match="no family") as caught:
        patterns_of("someone/saes", {}, [POST])
    assert "google/gemma-scope-2-" in str(caught.value)
    with pytest.raises(UserError, match="no such choice") as caught:
        patterns_of("google/gemma-scope-2-1b-pt", {"depth": "3"}, [POST])
    assert "width (now '16k')" in str(caught.value)
    with pytest.raises(UserError, match="no dictionaries of these sites"):
        patterns_of("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", {}, [MLP])


def copy_of(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


SCOPE = "google/gemma-scope-2b-pt-res"
FILES = tuple(
    f"layer_{layer}/width_16k/average_l0_{l0}/params.npz"
    for layer in (3, 13)
    for l0 in (22, 71, 140)
)


@pytest.mark.parametrize("name", [SCOPE, "gemma-scope-2b-pt-res"])
def test_a_folder_of_copies_is_searched_and_l0_chooses(tmp_path, name):
    copy_of(tmp_path / name, *FILES)
    choice = Imported(release=SCOPE, folder=tmp_path, l0=80)
    found = find_imported(choice, [POST])
    assert found == {("resid_post", POST): tmp_path / name / FILES[1]}
    with pytest.raises(UserError, match="several fit") as caught:
        find_imported(choice.replace(l0=None), [POST])
    assert "average_l0_140" in str(caught.value)
    assert "train.imported.l0" in str(caught.value)
    with pytest.raises(UserError, match="nothing fits") as caught:
        find_imported(choice, [POST, Site(4, "resid_post")])
    assert "L4: layer_4/width_16k" in str(caught.value)
    before = identity_of_imported(choice)
    (tmp_path / name / FILES[0]).write_text("other bytes")
    assert identity_of_imported(choice) != before
    with pytest.raises(UserError, match="no copy of the release"):
        find_imported(choice.replace(folder=tmp_path / "elsewhere"), [POST])


def test_the_cache_of_the_hub_is_used_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    choice = Imported(release=SCOPE, choose={"l0": "71"})
    with pytest.raises(UserError, match="not in the cache") as caught:
        find_imported(choice, [POST])
    assert "train.imported.folder" in str(caught.value)
    repository = tmp_path / "models--google--gemma-scope-2b-pt-res"
    snapshot = repository / "snapshots" / ("0" * 40)
    copy_of(snapshot, *FILES)
    copy_of(repository, "refs/main")
    (repository / "refs" / "main").write_text("0" * 40)
    assert find_imported(choice, [POST]) == {("resid_post", POST): snapshot / FILES[1]}
    with pytest.raises(UserError, match="nothing fits"):
        find_imported(choice, [Site(5, "resid_post")])


def test_paths_and_release_are_not_said_together(tmp_path):
    for choice in (Imported(), Imported(release=SCOPE, paths={"resid_post": "x"})):
        with pytest.raises(UserError, match="say either paths or release"):
            find_imported(choice, [POST])


def test_a_word_cannot_lead_out_of_the_copy(tmp_path):
    copy_of(tmp_path / "gemma-scope-2b-pt-res", *FILES)
    copy_of(tmp_path, "width_x/average_l0_1/params.npz")
    choice = Imported(release=SCOPE, folder=tmp_path, choose={"width": "x/../../../width_x"})
    with pytest.raises(UserError, match="nothing fits"):
        find_imported(choice, [POST])
