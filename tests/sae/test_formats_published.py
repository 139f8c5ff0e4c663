"""Files of published families, built by hand in their layout, give what their authors' formulas
give; and what a file leaves out comes from the table of conventions or from the user."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from featureflow.errors import UserError
from featureflow.sites import Site
from sae import Relu, Sae, Threshold, TopKActivation, load_sae, save_sae
from sae.calibration import with_threshold
from sae.formats import Conventions, find, read, recognise, write_circuit_tracer, write_sparsify
from sae.formats.normalised import ConstantNorm, LayerNorm, NormalisedSae
from tests.sae.foreign_files import D, K, N, agrees, numbers, topk, write_folder


def pre_of(parts, x=None):
    return (parts["x"] if x is None else x) @ parts["W_enc"] + parts["b_enc"]


def contiguous(tensors):
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def test_qwen_scope(tmp_path, parts):
    folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
    folder.mkdir()
    state = {
        "W_enc": parts["W_enc"].T,
        "W_dec": parts["W_dec"].T,
        "b_enc": parts["b_enc"],
        "b_dec": parts["b_dec"],
    }
    config = {"model_type": "topk_sae", "base_model": "Qwen/Qwen3-1.7B-Base", "d_model": D}
    config |= {"d_sae": N, "k": K, "hook_point": "resid_post"}
    for layer in (0, 7):
        torch.save(contiguous(state), folder / f"layer{layer}.sae.pt")
    (folder / "config.json").write_text(json.dumps(config))
    z = topk(pre_of(parts))
    sae = agrees(folder / "layer7.sae.pt", z, z @ parts["W_dec"] + parts["b_dec"], parts["x"])
    assert (sae.metadata["site"], sae.metadata["model"]) == (
        "blocks.7.hook_resid_post",
        "Qwen/Qwen3-1.7B-Base",
    )
    assert sae.metadata["published"] == {"l0": K}
    assert [path.name for path, _ in find(tmp_path)] == ["layer0.sae.pt", "layer7.sae.pt"]
    with pytest.raises(UserError, match="2 dictionaries lie here") as caught:
        read(folder)
    assert "layer0.sae.pt" in str(caught.value)
    (folder / "config.json").unlink()  # its k stands in the folder's name: 50 of 11 is refused
    with pytest.raises(UserError, match="k is impossible"):
        read(folder / "layer0.sae.pt")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "relu_sae"}))
    with pytest.raises(UserError, match="relu_sae"):
        read(folder / "layer0.sae.pt")


@pytest.mark.parametrize("name", ["Llama-3.1-8B-Instruct-SAE-l19.pth", "sae.pt"])
def test_goodfire(tmp_path, parts, name):
    state = {
        "encoder_linear.weight": parts["W_enc"].T,
        "encoder_linear.bias": parts["b_enc"],
        "decoder_linear.weight": parts["W_dec"].T,
        "decoder_linear.bias": parts["b_dec"],
    }
    torch.save(contiguous(state), tmp_path / name)
    z = pre_of(parts).relu()
    sae = agrees(tmp_path / name, z, z @ parts["W_dec"] + parts["b_dec"], parts["x"])
    known = name.startswith("Llama")
    assert sae.metadata.get("site") == ("blocks.19.hook_resid_post" if known else None)
    assert sae.metadata.get("model") == ("Llama-3.1-8B-Instruct" if known else None)


def test_hook_z_subtracts_its_decoder_bias(tmp_path, parts):
    state = {name: parts[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    torch.save(state, tmp_path / "gpt2-small_L3_Hcat_z.pt")
    config = {"act_size": D, "dict_size": N, "act_name": "blocks.3.attn.hook_z"}
    (tmp_path / "gpt2-small_L3_Hcat_z_cfg.json").write_text(json.dumps(config))
    z = pre_of(parts, parts["x"] - parts["b_dec"]).relu()
    path = tmp_path / "gpt2-small_L3_Hcat_z.pt"
    sae = agrees(path, z, z @ parts["W_dec"] + parts["b_dec"], parts["x"])
    assert sae.metadata["site"] == Site(3, "z").name


def circuit_tracer_files(parts, kind):
    tensors = {"W_enc": parts["W_enc"].T, "W_dec": parts["W_dec"]}
    tensors |= {name: parts[name] for name in ("b_enc", "b_dec")}
    config = {
        "model_kind": "transcoder_set",
        "model_name": "Qwen/Qwen3-4B",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": "qwen3",
    }
    pre, skip = pre_of(parts), 0.0
    z = pre.relu()
    if kind == "jumprelu":
        tensors["activation_function.threshold"] = parts["theta"]
        z = torch.where(pre > parts["theta"], pre, 0.0)
    elif kind == "topk":
        config |= {"activation": "topk", "k": K}
        z = topk(pre)
    elif kind == "skip":
        tensors["W_skip"] = numbers(D, D, seed=30)
        skip = parts["x"] @ tensors["W_skip"].T
    return contiguous(tensors), config, z, z @ parts["W_dec"] + parts["b_dec"] + skip


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "skip"])
def test_circuit_tracer_per_layer(tmp_path, parts, kind):
    tensors, config, z, out = circuit_tracer_files(parts, kind)
    for layer in (0, 1):
        save_file(tensors, tmp_path / f"layer_{layer}.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    sae = agrees(tmp_path / "layer_1.safetensors", z, out, parts["x"])
    assert sae.metadata["reads"] == "blocks.1.mlp.hook_in"
    assert sae.metadata["site"] == "blocks.1.hook_mlp_out"
    assert sae.metadata["transcodes"]
    assert [path.name for path, _ in find(tmp_path)] == [
        "layer_0.safetensors",
        "layer_1.safetensors",
    ]


def test_circuit_tracer_lists_its_files_in_the_order_of_layers(tmp_path, parts):
    tensors, config, *_ = circuit_tracer_files(parts, "relu")
    save_file(tensors, tmp_path / "b.safetensors")
    config["transcoders"] = ["hf://someone/set/a.safetensors", "hf://someone/set/b.safetensors"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert read(tmp_path / "b.safetensors").metadata["site"] == "blocks.1.hook_mlp_out"


def test_circuit_tracer_without_its_configuration_says_what_is_unknown(tmp_path, parts):
    tensors, *_ = circuit_tracer_files(parts, "relu")
    save_file(tensors, tmp_path / "layer_1.safetensors")
    metadata = read(tmp_path / "layer_1.safetensors").metadata
    assert "site" not in metadata
    assert metadata["transcodes"]
    assert "no config.yaml" in metadata["notes"][0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation": "gelu"}, "unknown activation"),
        ({"activation": "topk", "k": 0}, "not a positive integer"),
        ({"model_kind": "cross_layer_transcoder"}, "per-layer"),
    ],
)
def test_circuit_tracer_configurations_that_are_refused(tmp_path, parts, change, said):
    tensors, config, *_ = circuit_tracer_files(parts, "relu")
    save_file(tensors, tmp_path / "layer_1.safetensors")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | change))
    with pytest.raises(UserError, match=said):
        read(tmp_path / "layer_1.safetensors")


def transcoder(activation, layer, *, skip=False):
    return Sae(
        W_enc=numbers(N, D, seed=41 + layer),
        b_enc=numbers(N, seed=42),
        W_dec=torch.nn.functional.normalize(numbers(N, D, seed=43 + layer), dim=1),
        b_dec=numbers(D, seed=44),
        b_in=numbers(D, seed=45),
        activation=activation,
        W_skip=numbers(D, D, seed=46) if skip else None,
        metadata={
            "site": f"blocks.{layer}.hook_mlp_out",
            "reads": f"blocks.{layer}.hook_resid_mid",
            "model": "a-model",
        },
    )


@pytest.mark.parametrize(
    "activation", [Relu(), Threshold(theta=numbers(N, seed=47).abs())], ids=lambda a: a.kind
)
def test_what_we_write_for_circuit_tracer_is_read_back_the_same(tmp_path, parts, activation):
    saes = {Site(n, "mlp_out"): transcoder(activation, n, skip=n == 1) for n in (0, 1, 2)}
    write_circuit_tracer(saes, tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (config["feature_input_hook"], config["feature_output_hook"]) == (
        "hook_resid_mid",
        "hook_mlp_out",
    )
    for site, sae in saes.items():
        back = read(tmp_path / f"layer_{site.layer}.safetensors")
        torch.testing.assert_close(back(parts["x"]), sae(parts["x"]), rtol=1e-4, atol=1e-4)
        assert {n: back.metadata[n] for n in ("site", "reads", "model")} == sae.metadata


def test_a_topk_set_needs_thresholds_for_circuit_tracer(tmp_path):
    """Its loader of 0.5 would open it as ReLU. The thresholds leave k active latents a token on
    average, and those above them keep their values."""
    sae = transcoder(TopKActivation(k=K), 0)
    with pytest.raises(UserError, match="no transcoder set") as caught:
        write_circuit_tracer({Site(0, "mlp_out"): sae}, tmp_path / "out")
    assert "--run" in str(caught.value.fix)
    assert not (tmp_path / "out").exists()
    x = numbers(500, D, seed=5)
    made = with_threshold(sae, x)
    z, pre = made.encode(x), sae.pre_activations(x)
    assert int((z > 0).sum()) == K * len(x)
    edge = pre.flatten().sort(descending=True).values[K * len(x) - 1]
    torch.testing.assert_close(z, torch.where(pre >= edge, pre, 0.0))
    write_circuit_tracer({Site(0, "mlp_out"): made}, tmp_path / "out")
    assert "activation" not in yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    back = read(tmp_path / "out" / "layer_0.safetensors")
    torch.testing.assert_close(back(x), made(x), rtol=1e-4, atol=1e-4)


def test_all_that_a_transcoder_set_cannot_hold_is_named(tmp_path):
    saes = {
        Site(0, "mlp_out"): transcoder(Relu(), 0),
        Site(2, "mlp_out"): transcoder(TopKActivation(k=K), 2),
        Site(3, "mlp_out"): transcoder(Relu(), 3).replace(metadata={}),
    }
    with pytest.raises(UserError) as caught:
        write_circuit_tracer(saes, tmp_path / "out")
    said = {problem.what for problem in caught.value.problems}
    assert said >= {"not every layer", "several activations"}
    assert any("what it reads" in what for what in said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("act", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("out", ["blocks.2.hook_mlp_out", "blocks.2.hook_resid_mid"])
def test_llamascopium(tmp_path, parts, act, by_norm, out):
    norm_in, norm_out = 3.5, 0.8
    hook = "blocks.2.hook_resid_mid"
    config = {
        "sae_type": "sae",
        "d_model": D,
        "act_fn": act,
        "top_k": K,
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": by_norm,
        "hook_point_in": hook,
        "hook_point_out": out,
    }
    norms = {hook: norm_in} | ({out: norm_out} if out != hook else {})
    tensors = {"W_E": parts["W_enc"], "b_E": parts["b_enc"]}
    tensors |= {"W_D": parts["W_dec"], "b_D": parts["b_dec"]}
    tensors |= {
        f"dataset_average_activation_norm.{name}": torch.tensor(value)
        for name, value in norms.items()
    }
    if act == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = parts["theta"].log()
    folder = write_folder(
        tmp_path, tensors, config, weights="sae_weights.safetensors", description="config.json"
    )
    s_in, s_out = math.sqrt(D) / norm_in, math.sqrt(D) / norms[out]
    length = parts["W_dec"].norm(dim=1) if by_norm else torch.ones(N)
    gate = pre_of(parts, parts["x"] * s_in) * length  # chosen by it, then divided again
    if act == "topk":
        chosen = topk(gate)
    else:
        chosen = torch.where(gate > (parts["theta"] if act == "jumprelu" else 0), gate, 0.0)
    expected = ((chosen / length) @ parts["W_dec"] + parts["b_dec"]) / s_out
    for unit_decoder in (True, False):
        sae = read(folder, unit_decoder=unit_decoder)
        torch.testing.assert_close(sae(parts["x"]), expected, rtol=1e-4, atol=1e-4)
        assert ((sae.encode(parts["x"]) > 0) == (chosen > 0)).all()
    assert sae.metadata["site"] == out
    assert sae.metadata.get("reads") == (hook if out != hook else None)


def test_llamascopium_token_wise_gives_every_token_the_norm_of_its_width(tmp_path, parts):
    hook = "blocks.2.hook_resid_mid"
    config = {"d_model": D, "act_fn": "relu", "norm_activation": "token-wise"}
    config |= {"sparsity_include_decoder_norm": False}
    config |= {"hook_point_in": hook, "hook_point_out": hook}
    tensors = {"W_E": parts["W_enc"], "b_E": parts["b_enc"]}
    tensors |= {"W_D": parts["W_dec"], "b_D": parts["b_dec"]}
    folder = write_folder(
        tmp_path, tensors, config, weights="sae_weights.safetensors", description="config.json"
    )
    scale = parts["x"].norm(dim=1, keepdim=True) / math.sqrt(D)
    z = pre_of(parts, parts["x"] / scale).relu()
    agrees(folder, z, (z @ parts["W_dec"] + parts["b_dec"]) * scale, parts["x"])


def test_what_llamascopium_files_cannot_be_is_named_all_at_once(tmp_path, parts):
    config = {"sae_type": "lorsa", "d_model": D, "act_fn": "gelu", "norm_activation": "batch-wise"}
    folder = write_folder(
        tmp_path,
        {"W_E": parts["W_enc"], "W_D": parts["W_dec"], "W_E_glu": parts["W_enc"] + 1},
        config,
        weights="sae_weights.safetensors",
        description="config.json",
    )
    with pytest.raises(UserError) as caught:
        read(folder)
    where = {problem.where for problem in caught.value.problems}
    assert where >= {
        "config.json: sae_type",
        "config.json: act_fn",
        "config.json: norm_activation",
        "W_E_glu",
        "hook_point_in, hook_point_out",
    }


def llama_scope_r1(folder, parts):
    tensors = {
        "encoder.weight": parts["W_enc"].T,
        "encoder.bias": parts["b_enc"],
        "decoder.weight": parts["W_dec"].T,
        "decoder.bias": parts["b_dec"],
        "log_jumprelu_threshold": parts["theta"].log(),
    }
    config = {"d_model": D, "hook_point_in": "blocks.4.hook_resid_post"}
    return write_folder(
        folder, tensors, config, weights="sae_weights.safetensors", description="config.json"
    )


@pytest.mark.parametrize("by_user", [True, False])
def test_llama_scope_r1_takes_its_scale_from_the_table_or_from_the_user(tmp_path, parts, by_user):
    mix = "x" if by_user else "400M-Slimpajama-400M-OpenR1-Math-220k"
    folder = llama_scope_r1(tmp_path / mix / "L4R", parts)
    scale = 0.7 if by_user else 16.491434
    conventions = Conventions(input_scale=0.7) if by_user else None
    pre = pre_of(parts, parts["x"] * scale)
    z = torch.where(pre > parts["theta"], pre, 0.0)
    assert 0 < (z > 0).float().mean() < 1
    sae = read(folder, unit_decoder=False, conventions=conventions)
    torch.testing.assert_close(sae.encode(parts["x"]), z, rtol=1e-3, atol=1e-4)
    expected = (z @ parts["W_dec"] + parts["b_dec"]) / scale
    torch.testing.assert_close(sae(parts["x"]), expected, rtol=1e-3, atol=1e-3)


def test_a_scale_that_nobody_knows_is_asked_for_with_what_to_say(tmp_path, parts):
    with pytest.raises(UserError, match="scale of the activations") as caught:
        read(llama_scope_r1(tmp_path / "L4R", parts))
    assert "input_scale" in str(caught.value)


def saelens_5(folder, parts, **more):
    config = {"d_in": D, "d_sae": N, "hook_point": "blocks.8.hook_resid_pre"}
    config |= {"hook_point_layer": 8, "model_name": "gpt2-small", "dtype": "torch.float32"}
    tensors = {name: parts[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")}
    return write_folder(
        folder, tensors, config | more, weights="sae_weights.safetensors", description="cfg.json"
    )


def test_a_hook_point_of_old_saelens_is_its_site(tmp_path, parts):
    assert read(saelens_5(tmp_path, parts)).metadata["site"] == "blocks.8.hook_resid_pre"


@pytest.mark.parametrize("names_it", ["architecture", "activation_fn", "activation_fn_str"])
def test_saelens_4_and_5_keep_k_among_the_arguments_of_the_activation(tmp_path, parts, names_it):
    folder = saelens_5(tmp_path, parts, activation_fn_kwargs={"k": K}, **{names_it: "topk"})
    z = topk(pre_of(parts, parts["x"] - parts["b_dec"]))
    agrees(folder, z, z @ parts["W_dec"] + parts["b_dec"], parts["x"])


@pytest.mark.parametrize(
    "change",
    [
        {"activation_fn_str": "tanh-relu"},
        {"activation_fn": "gelu"},
        {"architecture": "standard", "hook_head_index": 3},
    ],
)
def test_saelens_activations_and_heads_that_are_refused(tmp_path, parts, change):
    with pytest.raises(UserError, match="cannot be used"):
        read(saelens_5(tmp_path, parts, **change))


@pytest.mark.parametrize("how", ["repository", "user", "file", "hub cache"])
def test_a_centred_stream_is_folded_so_that_raw_activations_go_in_and_come_out(
    tmp_path, parts, how
):
    name = {
        "repository": "GPT2-Small-SAEs-Reformatted",
        "hub cache": "models--jbloom--GPT2-Small-SAEs-Reformatted",
    }.get(how, "x")
    options = {"center_writing_weights": True} if how == "file" else None
    more = {"model_from_pretrained_kwargs": options} if options else {}
    folder = saelens_5(tmp_path / name / "blocks.8.hook_resid_pre", parts, **more)
    sae = read(folder, conventions=Conventions(centred=True) if how == "user" else None)
    mean = parts["x"].mean(dim=1, keepdim=True)
    z = pre_of(parts, parts["x"] - mean - parts["b_dec"]).relu()
    expected = z @ parts["W_dec"] + parts["b_dec"] + mean
    torch.testing.assert_close(sae(parts["x"]), expected, rtol=1e-4, atol=1e-4)
    lengths = parts["W_dec"].norm(dim=1)
    torch.testing.assert_close(sae.encode(parts["x"]), z * lengths, rtol=1e-4, atol=1e-4)
    assert "conventions_open" not in sae.metadata


def test_what_gpt2_files_leave_open_is_said(tmp_path, parts):
    metadata = read(saelens_5(tmp_path, parts)).metadata
    assert metadata["conventions_open"] == ["centred"]
    assert "centred" in metadata["notes"][0]
    other = read(saelens_5(tmp_path / "b", parts, model_name="gemma-2b")).metadata
    assert "notes" not in other


def test_the_scale_of_a_gpt2_mlp_dictionary_comes_from_the_table(tmp_path, parts):
    folder = tmp_path / "gpt2-small-mlp-out-saes" / "sae_group_gpt2_blocks.2.hook_mlp_out_24576:v0"
    saelens_5(folder, parts, normalize_activations=True, hook_point="blocks.2.hook_mlp_out")
    scale = 1.6411934982190302
    mean = parts["x"].mean(dim=1, keepdim=True)
    z = pre_of(parts, (parts["x"] - mean) * scale - parts["b_dec"]).relu()
    expected = (z @ parts["W_dec"] + parts["b_dec"]) / scale + mean
    torch.testing.assert_close(read(folder)(parts["x"]), expected, rtol=1e-4, atol=1e-4)


def test_a_scale_beside_the_files_own_is_refused(tmp_path, parts):
    with pytest.raises(UserError, match="says its scale itself"):
        read(saelens_5(tmp_path, parts), conventions=Conventions(input_scale=2.0))


@pytest.mark.parametrize("named", [True, False])
def test_dictionary_learning_of_the_hub(tmp_path, parts, named):
    tensors = {
        "encoder.weight": parts["W_enc"].T,
        "encoder.bias": parts["b_enc"],
        "decoder.weight": parts["W_dec"].T,
        "b_dec": parts["b_dec"],
        "threshold": torch.tensor(0.6),
    }
    folder = write_folder(
        tmp_path,
        tensors,
        {"activation_dim": D, "dict_size": N, "k": K},
        weights="model.safetensors",
        description="config.json",
    )
    if not named:
        with pytest.raises(UserError, match="TopK or BatchTopK") as caught:
            read(folder)
        assert "dictionary_learning:BatchTopKSAE" in str(caught.value)
        return
    pre = pre_of(parts, parts["x"] - parts["b_dec"])
    for name, z in (
        ("BatchTopKSAE", torch.where(pre > 0.6, pre, 0.0)),
        ("AutoEncoderTopK", topk(pre)),
    ):
        out = z @ parts["W_dec"] + parts["b_dec"]
        agrees(folder, z, out, parts["x"], format=f"dictionary_learning:{name}")


@pytest.mark.parametrize("normalisation", [LayerNorm(), ConstantNorm()])
def test_the_native_form_keeps_the_normalisation(tmp_path, parts, normalisation):
    plain = transcoder(TopKActivation(k=K), 1).replace(metadata={"site": "blocks.1.hook_mlp_out"})
    sae = NormalisedSae.around(plain, normalisation)
    save_sae(sae, tmp_path)
    back = load_sae(tmp_path)
    x = parts["x"]
    torch.testing.assert_close(back(x), sae(x))
    torch.testing.assert_close(back.encode(x), sae.encode(x))
    description = json.loads((tmp_path / "sae.json").read_text())
    assert description["version"] == 2, "a reader of version 1 would drop the normalisation"
    description["normalisation"] = {"kind": "batch_norm"}
    (tmp_path / "sae.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="unknown normalisation"):
        load_sae(tmp_path)


def test_latents_of_normalised_tokens_are_what_they_add_to_the_raw_activation(parts):
    plain = transcoder(TopKActivation(k=K), 1)
    sae, x = NormalisedSae.around(plain, LayerNorm()), parts["x"]
    z = sae.encode(x)
    without = z.clone()
    without[:, 4] = 0
    centred = x - x.mean(-1, keepdim=True)
    scale = x.std(-1, keepdim=True)
    peer = topk((centred / (scale + 1e-5) - plain.b_in) @ plain.W_enc.T + plain.b_enc)
    cut = peer.clone()
    cut[:, 4] = 0
    expected = (peer - cut) @ plain.W_dec * scale  # in the peer's own forward pass
    torch.testing.assert_close(sae.decode(z) - sae.decode(without), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.encode_sparse(x).dense(), z)
    torch.testing.assert_close(sae.encode_selected(x, [4, 2]), z[:, [4, 2]])


def test_gemma_scope_says_where_it_was_trained(tmp_path, parts):
    """From the folders' names (1) and the configuration (2), transcoders and z among them."""
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    arrays = {name: parts[name].numpy() for name in names} | {"threshold": parts["theta"].numpy()}
    for kind, reads, site in (
        ("transcoders", "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"),
        ("res", None, "blocks.3.hook_resid_post"),
        ("att", None, "blocks.3.attn.hook_z"),
    ):
        folder = tmp_path / f"gemma-scope-2b-pt-{kind}" / "layer_3/width_16k/average_l0_82"
        folder.mkdir(parents=True)
        np.savez(folder / "params.npz", **arrays)
        metadata = read(folder).metadata
        assert (metadata.get("reads"), metadata["site"]) == (reads, site)
        assert (metadata["model"], metadata["published"]["l0"]) == ("gemma-2-2b", 82)
    config = {
        "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
        "model_name": "gemma-v3-270m-pt",
        "architecture": "jump_relu",
        "l0": 15,
        "type": "transcoder",
    }
    tensors = {name.lower(): parts[name] for name in names} | {"threshold": parts["theta"]}
    folder = write_folder(
        tmp_path / "2", tensors, config, weights="params.safetensors", description="config.json"
    )
    metadata = read(folder).metadata
    assert metadata["reads"] == Site(5, "mlp_in").name
    assert metadata["site"] == Site(5, "mlp_out").name
    assert metadata["model"] == "gemma-3-270m-pt"
    config |= {"type": "clt", "architecture": "topk"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        read(folder)
    assert {problem.where for problem in caught.value.problems} == {"type", "architecture"}


def test_formats_that_share_a_file_name_are_told_apart(tmp_path, parts):
    folder = llama_scope_r1(tmp_path / "r1", parts)
    assert recognise(folder) == ("llama_scope_r1",)
    tensors = {"W_E": parts["W_enc"], "W_D": parts["W_dec"]}
    save_file(tensors, folder / "sae_weights.safetensors")
    assert recognise(folder) == ("llamascopium",)
    save_file({"something": parts["W_enc"]}, folder / "sae_weights.safetensors")
    assert recognise(folder) == ()


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip"])
def test_topk_dictionaries_written_for_sparsify_are_read_back_the_same(tmp_path, parts, kind):
    sae = transcoder(TopKActivation(k=K), 1, skip=kind == "skip")
    if kind == "sae":
        sae = sae.replace(metadata={})
    folder = tmp_path / "layers.1.mlp"
    write_sparsify(sae, folder)
    back = read(folder)
    torch.testing.assert_close(back(parts["x"]), sae(parts["x"]), rtol=1e-4, atol=1e-4)
    assert json.loads((folder / "cfg.json").read_text())["transcode"] is (kind != "sae")
    with pytest.raises(UserError, match="sparsify has no such dictionary"):
        write_sparsify(transcoder(Relu(), 1), tmp_path / "relu")
