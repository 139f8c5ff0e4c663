"""`featureflow sae check` says what a dictionary is and measures it on a model; `sae convert`
writes what other tools open."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file

from data.model.language_model import LanguageModel
from data.model.spec import Random
from data.text.corpus import BundledText
from data.text.packing import pack_corpus
from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.cli.dictionaries import sae_commands
from pipeline.run import Run
from pipeline.training.checking import check_dictionary
from sae import Sae, TopKActivation, save_sae
from sae.formats import read, read_cross_layer

D, N = 8, 24


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    spec = Random(n_layers=2, d_model=D, n_heads=2, d_mlp=16)
    return LanguageModel.open(spec, dtype="float32")


def activations(model: LanguageModel, *sites: Site) -> list[torch.Tensor]:
    packed = pack_corpus(BundledText(), model.tokenizer, n_context=128, n_tokens=1024, seed=0)
    seen = model.activations(torch.from_numpy(packed.contexts()), sites)
    return [seen[site][:, 1:].reshape(-1, D).double() for site in sites]


def write(folder: Path, *, d_out: int = D, **config: object) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    tensors = {
        "W_enc": torch.randn(D, N, generator=g),
        "W_dec": torch.randn(N, d_out, generator=g) * 0.2,
        "b_enc": torch.randn(N, generator=g),
        "b_dec": torch.randn(d_out, generator=g) * 0.1,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    described = {"architecture": "standard", "d_in": D, "d_sae": N} | config
    (folder / "cfg.json").write_text(json.dumps(described))
    return {name: tensor.double() for name, tensor in tensors.items()}


def fvu(out: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((out - wanted).square().sum() / (wanted - wanted.mean(0)).square().sum())


def test_l0_and_fvu_are_those_of_a_forward_pass_by_hand(tmp_path: Path, model) -> None:
    t = write(tmp_path, metadata={"hook_name": "blocks.1.hook_resid_post", "model_name": "other"})
    (x,) = activations(model, Site(1, "resid_post"))
    z = ((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
    found = check_dictionary(tmp_path, model=model, n_tokens=1024)
    (row,) = found.measured
    assert row["L0"] == pytest.approx(float((z > 0).sum(1).double().mean()), abs=1e-3)
    assert row["FVU"] == pytest.approx(fvu(z @ t["W_dec"] + t["b_dec"], x), rel=1e-4)
    assert found.described["site"] == "blocks.1.hook_resid_post"
    assert found.notes == (f"made for other, measured on {model.name}",)


def test_a_transcoder_is_measured_from_its_input_to_its_output(tmp_path: Path, model) -> None:
    metadata = {"hook_name": "blocks.1.hook_resid_mid", "hook_name_out": "blocks.1.hook_mlp_out"}
    t = write(tmp_path, architecture="transcoder", metadata=metadata)
    x, y = activations(model, Site(1, "resid_mid"), Site(1, "mlp_out"))
    out = (x @ t["W_enc"] + t["b_enc"]).relu() @ t["W_dec"] + t["b_dec"]
    (row,) = check_dictionary(tmp_path, model=model, n_tokens=1024).measured
    assert row["FVU"] == pytest.approx(fvu(out, y), rel=1e-4)


def test_both_readings_of_an_open_convention_are_measured(tmp_path: Path, model) -> None:
    t = write(tmp_path, hook_name="blocks.1.hook_resid_post", model_name="gpt2-small")
    (x,) = activations(model, Site(1, "resid_post"))
    mean = x.mean(1, keepdim=True)
    expected = {}
    for name, shift in (("not centred", 0.0 * mean), ("centred", mean)):
        z = ((x - shift - t["b_dec"]) @ t["W_enc"] + t["b_enc"]).relu()
        expected[name] = fvu(z @ t["W_dec"] + t["b_dec"] + shift, x)
    found = check_dictionary(tmp_path, model=model, n_tokens=1024)
    assert {row["reading"]: row["FVU"] for row in found.measured} == pytest.approx(
        expected, rel=1e-4
    )


def test_a_cross_layer_transcoder_is_measured_with_all_that_writes_into_a_site(
    tmp_path: Path, model
) -> None:
    g = torch.Generator().manual_seed(2)
    W_enc, W_dec = torch.randn(2, 4, D, generator=g), torch.randn(2, 4, 2, D, generator=g)
    b_enc, b_dec = torch.randn(2, 4, generator=g), torch.randn(2, D, generator=g)
    for i in (0, 1):
        tensors = {f"W_enc_{i}": W_enc[i], f"b_enc_{i}": b_enc[i], f"b_dec_{i}": b_dec[i]}
        save_file(tensors, tmp_path / f"W_enc_{i}.safetensors")
        written = {f"W_dec_{i}": W_dec[i, :, i:].contiguous()}
        save_file(written, tmp_path / f"W_dec_{i}.safetensors")
    x0, x1, y0, y1 = activations(
        model, *(Site(i, kind) for kind in ("resid_mid", "mlp_out") for i in (0, 1))
    )
    z0, z1 = ((x @ W_enc[i].T.double() + b_enc[i]).relu() for i, x in enumerate((x0, x1)))
    first = z0 @ W_dec[0, :, 0].double() + b_dec[0]
    second = z0 @ W_dec[0, :, 1].double() + z1 @ W_dec[1, :, 1].double() + b_dec[1]
    rows = check_dictionary(tmp_path, model=model, n_tokens=1024).measured
    assert [row["reading"] for row in rows] == ["L0.mlp", "L1.mlp"]
    expected = [fvu(first, y0), fvu(second, y1)]
    assert [row["FVU"] for row in rows] == pytest.approx(expected, rel=1e-4)
    assert rows[1]["L0"] == pytest.approx(float((z1 > 0).sum(1).double().mean()), abs=1e-3)


def test_what_contradicts_or_is_missing_is_said(tmp_path: Path, model) -> None:
    write(tmp_path / "a", metadata={"hook_name": "blocks.1.hook_resid_post"})
    with pytest.raises(UserError, match="says another site"):
        check_dictionary(tmp_path / "a", model=model, site=Site(0, "resid_post"))
    write(tmp_path / "b")
    with pytest.raises(UserError, match="does not say its site"):
        check_dictionary(tmp_path / "b", model=model)
    write(tmp_path / "c", architecture="transcoder", metadata={})
    with pytest.raises(UserError, match="does not say what it reads"):
        check_dictionary(tmp_path / "c", model=model, site=Site(1, "mlp_out"))


def test_the_command_says_what_it_is_without_a_model(tmp_path: Path) -> None:
    write(tmp_path, metadata={"hook_name": "blocks.1.hook_resid_post", "model_name": "gpt2"})
    done = CliRunner().invoke(sae_commands, ["check", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    for word in ("saelens", "SAE", "blocks.1.hook_resid_post", "gpt2", "8 in, 8 out"):
        assert word in done.output


def test_a_cross_layer_transcoder_is_converted_whole(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    (tmp_path / "clt").mkdir()
    (tmp_path / "clt" / "config.yaml").write_text("model_kind: cross_layer_transcoder\n")
    for i in (0, 1):
        encoder = {f"W_enc_{i}": torch.randn(N, D, generator=g), f"b_enc_{i}": torch.zeros(N)}
        encoder[f"b_dec_{i}"] = torch.zeros(D)
        save_file(encoder, tmp_path / "clt" / f"W_enc_{i}.safetensors")
        W_dec = {f"W_dec_{i}": torch.randn(N, 2 - i, D, generator=g)}
        save_file(W_dec, tmp_path / "clt" / f"W_dec_{i}.safetensors")
    arguments = ["convert", str(tmp_path / "clt"), str(tmp_path / "out"), "--to", "native"]
    assert CliRunner().invoke(sae_commands, arguments, catch_exceptions=False).exit_code == 0
    before, after = read_cross_layer(tmp_path / "clt"), read_cross_layer(tmp_path / "out")
    x = {site: torch.randn(5, D, generator=g) for site in before.reads}
    for site, expected in before(x).items():
        torch.testing.assert_close(after(x)[site], expected)
    done = CliRunner().invoke(
        sae_commands, ["check", str(tmp_path / "out")], catch_exceptions=False
    )
    assert "cross-layer transcoder" in done.output


def test_a_set_of_transcoders_is_converted_for_circuit_tracer(tmp_path: Path) -> None:
    names = []
    for layer in (0, 1):
        hooks = {"hook_name": f"blocks.{layer}.hook_resid_mid"}
        hooks |= {"hook_name_out": f"blocks.{layer}.hook_mlp_out"}
        write(tmp_path / f"{layer}", architecture="transcoder", metadata=hooks)
        names.append(str(tmp_path / f"{layer}"))
    out = tmp_path / "set"
    arguments = ["convert", *names, str(out), "--to", "circuit_tracer"]
    done = CliRunner().invoke(sae_commands, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert yaml.safe_load((out / "config.yaml").read_text())["model_kind"] == "transcoder_set"
    x = torch.randn(5, D)
    torch.testing.assert_close(read(out / "layer_1.safetensors")(x), read(names[1])(x))


def test_a_topk_set_gets_its_thresholds_from_a_run(tmp_path: Path, inputs) -> None:
    """On the rows that were stored the mean number of active latents is k."""
    root, reads, writes = inputs.collect.path.parent, Site(0, "resid_post"), Site(0, "mlp_out")
    g = torch.Generator().manual_seed(0)
    W_enc, W_dec = (torch.randn(64, 32, generator=g) for _ in range(2))
    sae = Sae(
        W_enc=W_enc,
        b_enc=torch.zeros(64),
        W_dec=torch.nn.functional.normalize(W_dec, dim=1),
        b_dec=torch.zeros(32),
        b_in=torch.zeros(32),
        activation=TopKActivation(k=5),
        metadata={"site": writes.name, "reads": reads.name},
    )
    save_sae(sae, tmp_path / "topk")
    out = tmp_path / "set"
    arguments = ["convert", str(tmp_path / "topk"), str(out), "--to", "circuit_tracer"]
    with pytest.raises(UserError, match="no transcoder set"):
        CliRunner().invoke(sae_commands, arguments, catch_exceptions=False)
    arguments += ["--run", str(root)]
    assert CliRunner().invoke(sae_commands, arguments, catch_exceptions=False).exit_code == 0
    store = Run.open(root).store
    rows = store.kept_rows("validation")
    x = torch.from_numpy(store.read(reads, 0, store.n_rows)[rows])
    n_active = (read(out / "layer_0.safetensors").encode(x) > 0).sum(1).float()
    assert n_active.mean() == pytest.approx(5.0, abs=0.01)
    assert n_active.min() < 5 < n_active.max()
