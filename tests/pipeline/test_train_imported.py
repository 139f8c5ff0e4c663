"""Dictionaries that others trained take the place of training: found by pattern or by the name of
a release, held against what their files say, written as ours."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from data.model.spec import Random
from data.store import ActivationStore
from data.text.corpus import BundledText
from data.tokens import RowFilters
from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.lenses import reconstruction
from pipeline.run import Run
from pipeline.saes import Saes
from pipeline.stages import collect, train
from pipeline.training.imported import (
    Imported,
    find_imported,
    identity_of_imported,
    import_dictionaries,
    warnings_of,
)
from sae import Relu, load_sae
from sae.cross_layer import CrossLayer, CrossLayerPart
from sae.formats import layers_of, read_cross_layer, save_cross_layer

SITES = (Site(0, "resid_post"), Site(1, "resid_mid"), Site(1, "mlp_out"), Site(1, "resid_post"))
WEIGHTS = "sae_weights.safetensors"
EVERY = RowFilters(drop_bos=False, drop_special=False, drop_sinks=False)
RESIDUAL = (SITES[0], SITES[3])


class StandInStore:
    """What importing asks of a store: its sites, their widths and its model."""

    sites = SITES
    provenance = {"model": "openai-community/gpt2"}  # noqa: RUF012

    def width(self, site: Site) -> int:
        return 6


def write_gemma_scope(path: Path, seed: int, width: int = 6) -> None:
    """A file of Gemma Scope's form: rows of the encoder are inputs, thresholds are compared with
    pre-activations."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    decoder = rng.normal(size=(8, width)).astype(np.float32)
    np.savez(
        path,
        W_enc=rng.normal(size=(width, 8)).astype(np.float32),
        W_dec=decoder / np.linalg.norm(decoder, axis=1, keepdims=True),
        b_enc=rng.normal(size=8).astype(np.float32),
        b_dec=rng.normal(size=width).astype(np.float32),
        threshold=np.full(8, 0.5, dtype=np.float32),
    )


@pytest.fixture
def choice(tmp_path: Path) -> Imported:
    for layer in (0, 1):
        write_gemma_scope(
            tmp_path
            / "scope"
            / f"layer_{layer}"
            / "width_8"
            / f"average_l0_{layer + 3}"
            / "params.npz",
            layer,
        )
    return Imported(
        paths={
            "resid_post": str(tmp_path / "scope" / "layer_{layer}" / "width_8" / "*" / "params.npz")
        }
    )


def store() -> ActivationStore:
    return StandInStore()  # type: ignore[return-value]


def test_a_cross_layer_dictionary_is_kept_whole_beside_them(
    choice: Imported, tmp_path: Path
) -> None:
    """It is refused where its sites are not stored, and its files are in the digest."""
    g = torch.Generator().manual_seed(0)
    part = CrossLayerPart(
        W_enc=torch.randn(9, 6, generator=g),
        b_enc=torch.zeros(9),
        W_dec=torch.randn(9, 1, 6, generator=g),
        activation=Relu(),
    )
    for name, reads in (("clt", Site(1, "resid_mid")), ("bad", Site(1, "mlp_in"))):
        whole = CrossLayer(
            reads=(reads,),
            writes=(Site(1, "mlp_out"),),
            parts=(part,),
            b_dec=(torch.zeros(6),),
            W_skip=(None,),
            metadata={"model": "gpt2"},
        )
        save_cross_layer(whole, tmp_path / name)
    kept = choice.replace(cross_layer=tmp_path / "clt")
    assert identity_of_imported(kept) != identity_of_imported(choice)
    import_dictionaries(kept, store(), tmp_path / "out", sites=RESIDUAL)
    torch.testing.assert_close(
        read_cross_layer(tmp_path / "out" / "cross_layer").parts[0].W_dec, part.W_dec
    )
    with pytest.raises(UserError, match="no such site"):
        wrong = choice.replace(cross_layer=tmp_path / "bad")
        import_dictionaries(wrong, store(), tmp_path / "out2", sites=RESIDUAL)


def test_a_crosscoder_alone_becomes_the_dictionaries_of_its_layers(tmp_path: Path) -> None:
    """What each layer encodes and adds to its own site, by hand; a transcoder stays whole only."""
    g = torch.Generator().manual_seed(1)
    E, D = torch.randn(2, 9, 6, generator=g), torch.randn(2, 9, 2, 6, generator=g)
    parts = tuple(
        CrossLayerPart(W_enc=E[i], b_enc=torch.zeros(9), W_dec=D[i], activation=Relu())
        for i in range(2)
    )
    whole = CrossLayer(
        reads=RESIDUAL,
        writes=RESIDUAL,
        parts=parts,
        b_dec=(torch.ones(6), torch.zeros(6)),
        W_skip=(None, None),
        metadata={"model": "gpt2"},
    )
    save_cross_layer(whole, tmp_path / "cc")
    choice = Imported(cross_layer=tmp_path / "cc")
    described = import_dictionaries(choice, store(), tmp_path / "out")
    assert list(described["dictionaries"]) == list(RESIDUAL)
    x = torch.randn(5, 6, generator=g)
    for i, site in enumerate(RESIDUAL):
        sae = load_sae(tmp_path / "out" / "dictionaries" / site.short)
        assert (sae.metadata["site"], sae.metadata["cross_layer"]) == (site.name, i)
        expected = (x @ E[i].T).relu() @ D[i][:, i] + whole.b_dec[i]
        torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-4)
    assert any("left out" in text for text in warnings_of(described))

    clt = CrossLayer(**{**vars(whole), "writes": (Site(0, "mlp_out"), Site(1, "mlp_out"))})
    assert layers_of(clt) == {}
    save_cross_layer(clt, tmp_path / "whole" / "cross_layer")
    with pytest.raises(UserError, match=r"kept whole[\s\S]*lens cross-layer"):
        Saes(tmp_path / "whole" / "dictionaries")


def test_imported_dictionaries_compute_what_their_files_say(
    choice: Imported, tmp_path: Path
) -> None:
    described = import_dictionaries(choice, store(), tmp_path)
    assert set(described["dictionaries"]) == set(RESIDUAL), "a kind without a pattern is left out"
    ours = Saes(tmp_path / "dictionaries")
    for (_, site), path in find_imported(choice, SITES).items():
        file = np.load(path)
        x = np.random.default_rng(9).normal(size=(20, 6)).astype(np.float32)
        pre = x @ file["W_enc"] + file["b_enc"]
        expected = np.where(pre > file["threshold"], pre, 0) @ file["W_dec"] + file["b_dec"]
        np.testing.assert_allclose(ours[site](torch.from_numpy(x)).numpy(), expected, atol=1e-5)


def test_missing_and_ambiguous_files_are_all_named(choice: Imported, tmp_path: Path) -> None:
    write_gemma_scope(
        tmp_path / "scope" / "layer_0" / "width_8" / "average_l0_99" / "params.npz", 5
    )
    (tmp_path / "scope" / "layer_1" / "width_8" / "average_l0_4" / "params.npz").unlink()
    with pytest.raises(UserError) as caught:
        find_imported(choice, SITES)
    assert "L0: " in str(caught.value)
    assert "several dictionaries fit" in str(caught.value)
    assert "L1: " in str(caught.value)
    with pytest.raises(UserError, match=r"train\.imported\.paths\.attn_out"):
        find_imported(Imported(paths={**choice.paths, "attn_out": "x"}), SITES)


def test_only_the_sites_asked_for_are_imported(choice: Imported, tmp_path: Path) -> None:
    """A store may hold more layers than there are dictionaries."""
    (tmp_path / "scope" / "layer_1" / "width_8" / "average_l0_4" / "params.npz").unlink()
    described = import_dictionaries(choice, store(), tmp_path, sites=SITES[:1])
    assert set(described["dictionaries"]) == {SITES[0]}


def test_a_dictionary_of_another_width_is_refused(choice: Imported, tmp_path: Path) -> None:
    write_gemma_scope(
        tmp_path / "scope" / "layer_1" / "width_8" / "average_l0_4" / "params.npz", 1, width=5
    )
    with pytest.raises(UserError, match="does not fit the site"):
        import_dictionaries(choice, store(), tmp_path)


def test_the_identity_follows_the_bytes(choice: Imported, tmp_path: Path) -> None:
    before = identity_of_imported(choice)
    assert identity_of_imported(choice) == before
    write_gemma_scope(tmp_path / "scope" / "layer_1" / "width_8" / "average_l0_4" / "params.npz", 7)
    assert identity_of_imported(choice) != before


def saelens(folder: Path, *, seed: int = 0, **config: object) -> Path:
    """A SAELens folder of version 6, where `config` goes into its metadata."""
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "W_enc": torch.randn(6, 8, generator=g),
        "W_dec": torch.nn.functional.normalize(torch.randn(8, 6, generator=g), dim=1),
        "b_enc": torch.randn(8, generator=g),
        "b_dec": torch.randn(6, generator=g),
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    architecture = config.pop("architecture", "standard")
    described = {"architecture": architecture, "d_in": 6, "d_sae": 8, "metadata": config}
    (folder / "cfg.json").write_text(json.dumps(described))
    return folder


def one(folder: Path, **more: object) -> Imported:
    return Imported(paths={"resid_post": str(folder / "L{layer}")}, **more)


@pytest.mark.parametrize(
    ("says", "what"),
    [
        ({"hook_name": "blocks.1.hook_resid_pre"}, "another site"),
        ({"hook_name": "blocks.0.hook_resid_post"}, "another site"),
        ({"hook_name": "blocks.1.hook_mlp_out"}, "another site"),
        ({"hook_name": "blocks.1.hook_embed"}, "another site"),
        ({"hook_name": "blocks.1.hook_resid_post", "model_name": "gemma-2-2b"}, "another model"),
        (
            {
                "architecture": "transcoder",
                "hook_name": "blocks.1.hook_resid_post",
                "hook_name_out": "blocks.1.hook_mlp_out",
            },
            "a transcoder is not an SAE",
        ),
        (
            {"hook_name": "blocks.1.hook_resid_mid", "hook_name_out": "blocks.1.hook_resid_post"},
            "a transcoder is not an SAE",
        ),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path: Path, says: dict, what: str) -> None:
    saelens(tmp_path / "L1", **says)
    with pytest.raises(UserError) as caught:
        import_dictionaries(one(tmp_path), store(), tmp_path / "out", sites=SITES[3:])
    assert what in str(caught.value)
    assert str(tmp_path / "L1") in str(caught.value)


def test_all_files_that_contradict_are_named_at_once(tmp_path: Path) -> None:
    saelens(tmp_path / "L0", hook_name="blocks.0.hook_resid_pre", model_name="pythia-70m")
    saelens(tmp_path / "L1", architecture="gelu")
    with pytest.raises(UserError) as caught:
        import_dictionaries(one(tmp_path), store(), tmp_path / "out", sites=RESIDUAL)
    assert [problem.what for problem in caught.value.problems] == [
        "another site",
        "another model",
        "architecture not supported",
    ]


@pytest.mark.parametrize("name", ["gpt2-small", "gpt2", "openai-community/gpt2", "GPT2"])
def test_names_of_one_model_are_the_same(tmp_path: Path, name: str) -> None:
    saelens(tmp_path / "L1", hook_name="blocks.1.hook_resid_post", model_name=name)
    described = import_dictionaries(one(tmp_path), store(), tmp_path / "out", sites=SITES[3:])
    assert not warnings_of(described)


def test_a_relative_of_the_model_is_taken_when_the_recipe_says_so(tmp_path: Path) -> None:
    saelens(tmp_path / "L1", hook_name="blocks.1.hook_resid_post", model_name="gpt2-medium")
    choice = one(tmp_path, model="gpt2-medium")
    described = import_dictionaries(choice, store(), tmp_path / "out", sites=SITES[3:])
    assert warnings_of(described) == ["L1: made for gpt2-medium, used with openai-community/gpt2"]


def test_what_a_file_does_not_say_is_noted(tmp_path: Path) -> None:
    for layer in (0, 1):
        saelens(tmp_path / f"L{layer}")
    described = import_dictionaries(one(tmp_path), store(), tmp_path / "out", sites=RESIDUAL)
    warnings = warnings_of(described)
    assert len(warnings) == 2
    assert all(warning.startswith("L0, L1: the file does not say its ") for warning in warnings)
    assert load_sae(tmp_path / "out" / "dictionaries" / "L1").metadata["notes"]


def test_a_gpt2_file_that_leaves_centring_open_asks_for_it(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "L1")
    config = json.loads((folder / "cfg.json").read_text())
    del config["metadata"]
    config |= {"hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2-small"}
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"train\.imported\.centred"):
        import_dictionaries(one(tmp_path), store(), tmp_path / "out", sites=SITES[3:])
    for centred in (True, False):
        choice = one(tmp_path, centred=centred)
        import_dictionaries(choice, store(), tmp_path / str(centred), sites=SITES[3:])
    x = torch.randn(5, 6)
    mean = x.mean(1, keepdim=True)
    plain, moved = (load_sae(tmp_path / name / "dictionaries" / "L1") for name in ("False", "True"))
    torch.testing.assert_close(moved(x), plain(x - mean) + mean)


def test_a_scale_that_is_in_no_file_comes_from_the_recipe(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "L1", hook_name="blocks.1.hook_resid_post")
    plain = tmp_path / "plain"
    import_dictionaries(one(tmp_path), store(), plain, sites=SITES[3:])
    config = json.loads((folder / "cfg.json").read_text())
    config["normalize_activations"] = "expected_average_only_in"
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"train\.imported\.input_scale"):
        import_dictionaries(one(tmp_path), store(), tmp_path / "out", sites=SITES[3:])
    choice = one(tmp_path, input_scale={"L1": 0.25})
    import_dictionaries(choice, store(), tmp_path / "out", sites=SITES[3:])
    x = torch.randn(5, 6)
    scaled, unscaled = (
        load_sae(root / "dictionaries" / "L1") for root in (tmp_path / "out", plain)
    )
    torch.testing.assert_close(scaled(x), unscaled(0.25 * x) / 0.25)


def test_a_dictionary_of_normalised_tokens_keeps_its_normalisation_in_a_run(tmp_path: Path) -> None:
    folder = saelens(tmp_path / "L1", hook_name="blocks.1.hook_resid_post")
    config = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config | {"normalize_activations": "layer_norm"}))
    import_dictionaries(one(tmp_path), store(), tmp_path / "out", sites=SITES[3:])
    t = {name: value.double() for name, value in load_file(folder / WEIGHTS).items()}
    x = torch.randn(5, 6).double()
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    z = (((x - mean) / (deviation + 1e-5) - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    expected = (z @ t["W_dec"] + t["b_dec"]) * deviation + mean
    found = Saes(tmp_path / "out" / "dictionaries")[SITES[3]]
    torch.testing.assert_close(found(x.float()).double(), expected, rtol=1e-4, atol=1e-4)


def write_transcoders(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for layer in (0, 1):
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / f"layer_{layer}.safetensors",
        )
    described = {"model_kind": "transcoder_set", "feature_output_hook": "hook_mlp_out"}
    described |= {"feature_input_hook": "hook_resid_mid", "model_name": "gpt2"}
    (folder / "config.yaml").write_text(yaml.safe_dump(described | config))


def a_transcoder(d: int = 6, n: int = 8) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (n, d), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,)}
    return {name: torch.randn(*shape, generator=g) for name, shape in shapes.items()}


def test_transcoders_go_to_their_own_place_with_what_they_read(tmp_path: Path) -> None:
    write_transcoders(tmp_path / "set", a_transcoder())
    choice = Imported(paths={"transcoder": str(tmp_path / "set" / "layer_{layer}.safetensors")})
    described = import_dictionaries(choice, store(), tmp_path / "out")
    assert {folder: list(sites) for folder, sites in described.items()} == {
        "transcoders": [Site(1, "mlp_out")]
    }
    metadata = load_sae(tmp_path / "out" / "transcoders" / "L1.mlp").metadata
    assert metadata["reads"] == "blocks.1.hook_resid_mid"
    assert metadata["skip"] is False


@pytest.mark.parametrize(
    ("config", "key", "what"),
    [
        ({}, "mlp_out", "a transcoder is not an SAE"),
        ({"feature_input_hook": "mlp.hook_in"}, "transcoder", "what it reads is not stored"),
        ({"feature_input_hook": "hook_nowhere"}, "transcoder", "reads what is no site here"),
        ({"feature_output_hook": "hook_attn_out"}, "transcoder", "another site"),
        ({"model_name": "gpt2-xl"}, "transcoder", "another model"),
    ],
)
def test_transcoders_that_say_something_else_are_refused(
    tmp_path: Path, config: dict, key: str, what: str
) -> None:
    write_transcoders(tmp_path / "set", a_transcoder(), **config)
    choice = Imported(paths={key: str(tmp_path / "set" / "layer_{layer}.safetensors")})
    with pytest.raises(UserError, match=what):
        import_dictionaries(choice, store(), tmp_path / "out")


def test_a_transcoder_that_does_not_say_what_it_reads_asks_for_it(tmp_path: Path) -> None:
    write_transcoders(tmp_path / "set", a_transcoder())
    (tmp_path / "set" / "config.yaml").unlink()
    paths = {"transcoder": str(tmp_path / "set" / "layer_{layer}.safetensors")}
    with pytest.raises(UserError, match="does not say what it reads"):
        import_dictionaries(Imported(paths=paths), store(), tmp_path / "out")
    choice = Imported(paths=paths, reads="resid_mid")
    described = import_dictionaries(choice, store(), tmp_path / "out")
    assert described["transcoders"][Site(1, "mlp_out")]["reads"] == "blocks.1.hook_resid_mid"


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    config = collect.Config(
        model=Random(n_layers=2, d_model=8, n_heads=2, d_mlp=16),
        corpus=BundledText(),
        sites=("resid_mid:1", "mlp_out:1"),
        n_context=32,
        n_tokens=16384,
        validation_fraction=0.25,
        shard_rows=4096,
    )
    out = tmp_path_factory.mktemp("collected") / "collect"
    return collect.run(config, collect.Inputs(), out, RunContext(n_threads=1))


def test_an_imported_transcoder_is_evaluated_from_its_input_to_its_output(
    collected: Artifact, tmp_path: Path
) -> None:
    """The oracle is a regression of the MLP's output on its input, and the transcoder is written to
    compute exactly that: a pair of ReLUs for each direction and sign."""
    data = ActivationStore.open(collected.path / "store.zarr")
    reads, writes = (
        torch.from_numpy(np.asarray(data.read(site, 0, data.n_rows))).double()
        for site in (Site(1, "resid_mid"), Site(1, "mlp_out"))
    )
    held_out = slice(data.validation_start, None)
    fitted = torch.linalg.lstsq(
        torch.cat([reads, torch.ones(len(reads), 1)], dim=1)[: data.validation_start],
        writes[: data.validation_start],
    ).solution
    eye = torch.eye(8, dtype=torch.float64)
    write_transcoders(
        tmp_path / "set",
        {
            "W_enc": torch.cat([eye, -eye]).float(),
            "b_enc": torch.zeros(16),
            "W_dec": torch.cat([fitted[:8], -fitted[:8]]).float(),
            "b_dec": fitted[8].float(),
        },
        model_name=data.provenance["model"],
    )
    paths = {"transcoder": str(tmp_path / "set" / "layer_{layer}.safetensors")}
    context = RunContext(n_threads=1)
    imported = train.run(
        train.Config(imported=Imported(paths=paths)),
        train.Inputs(collect=collected),
        tmp_path / "train",
        context,
    )
    assert imported.summary["n_transcoders"] == 1
    config = reconstruction.Config(n_tokens=4096, n_pca_tokens=0, filters=EVERY)
    run = Run.of({"collect": collected, "train": imported})
    [row] = reconstruction.look(run, config).tables["metrics"].to_dict("records")
    error = writes[held_out] - reads[held_out] @ fitted[:8] - fitted[8]
    centred = writes[held_out] - writes[held_out].mean(0)
    expected = float(error.square().sum() / centred.square().sum())
    assert row["reads"] == "L1.mid"
    assert row["fvu"] == pytest.approx(expected, rel=0.05)
    assert row["fvu"] < 0.9, "as an autoencoder of its input it would be far above 1"
