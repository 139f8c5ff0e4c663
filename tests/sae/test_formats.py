"""Foreign dictionaries give the latents and reconstructions that their own formulas give.

Each file is built by hand in its exact layout, with decoder rows of unequal length and non-zero
biases everywhere, and each oracle is the peer's forward pass written out.
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from featureflow.errors import UserError
from sae import Gated, Relu, Sae, Threshold, TopKActivation
from sae.formats import find, read, recognise, save_sae, write_saelens
from sae.formats.base import site_of_hook
from tests.sae.foreign_files import D, K, N, agrees, numbers, topk, write_folder


def saelens_folder(folder, parts, config, **more):
    tensors = {name: parts[name] for name in ("W_enc", "W_dec", "b_enc", "b_dec")} | more
    config = {"d_in": D, "d_sae": N, "normalize_activations": "none"} | config
    return write_folder(
        folder, tensors, config, weights="sae_weights.safetensors", description="cfg.json"
    )


@pytest.mark.parametrize("subtracts", [True, False])
def test_saelens_standard(tmp_path, parts, subtracts):
    config = {"architecture": "standard", "apply_b_dec_to_input": subtracts}
    path = saelens_folder(tmp_path, parts, config)
    x = parts["x"]
    z = ((x - parts["b_dec"] if subtracts else x) @ parts["W_enc"] + parts["b_enc"]).relu()
    agrees(path, z, z @ parts["W_dec"] + parts["b_dec"], x)


def test_saelens_topk_keeps_unequal_rows_because_rescaling_them_would_choose_other_latents(
    tmp_path, parts
):
    path = saelens_folder(tmp_path, parts, {"architecture": "topk", "k": K})
    z = topk((parts["x"] - parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"])
    sae = agrees(path, z, z @ parts["W_dec"] + parts["b_dec"], parts["x"])
    assert sae.metadata["unit_decoder"] is False
    torch.testing.assert_close(sae.W_dec, parts["W_dec"])


def test_saelens_topk_that_chooses_by_decoder_norm(tmp_path, parts):
    config = {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True}
    path = saelens_folder(tmp_path, parts, config)
    length = parts["W_dec"].norm(dim=1)
    z = topk(((parts["x"] - parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"]) * length)
    sae = agrees(path, z, (z / length) @ parts["W_dec"] + parts["b_dec"], parts["x"])
    assert sae.metadata["unit_decoder"] is True


def test_topk_with_rows_of_one_length_gets_unit_rows(tmp_path, parts):
    parts["W_dec"] = 0.1 * parts["W_dec"] / parts["W_dec"].norm(dim=1, keepdim=True)
    path = saelens_folder(tmp_path, parts, {"architecture": "topk", "k": K})
    z = topk((parts["x"] - parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"])
    assert (
        agrees(path, z, z @ parts["W_dec"] + parts["b_dec"], parts["x"]).metadata["unit_decoder"]
        is True
    )


def test_saelens_jumprelu_compares_before_the_relu(tmp_path, parts):
    theta = parts["theta"].clone()
    theta[
        ::3
    ] = (
        -0.5
    )  # a threshold below zero lets every positive pre-activation through, and no negative one
    path = saelens_folder(tmp_path, parts, {"architecture": "jumprelu"}, threshold=theta)
    pre = (parts["x"] - parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"]
    z = pre.relu() * (pre > theta)
    agrees(path, z, z @ parts["W_dec"] + parts["b_dec"], parts["x"])


def test_saelens_gated(tmp_path, parts):
    more = {
        "b_gate": numbers(N, seed=8),
        "b_mag": numbers(N, seed=9),
        "r_mag": numbers(N, seed=10, scale=0.5),
    }
    tensors = {name: parts[name] for name in ("W_enc", "W_dec", "b_dec")} | more
    config = {"architecture": "gated", "d_in": D, "d_sae": N}
    path = write_folder(
        tmp_path, tensors, config, weights="sae_weights.safetensors", description="cfg.json"
    )
    inner = parts["x"] - parts["b_dec"]
    gate = inner @ parts["W_enc"] + more["b_gate"] > 0
    z = gate * (inner @ (parts["W_enc"] * more["r_mag"].exp()) + more["b_mag"]).relu()
    agrees(path, z, z @ parts["W_dec"] + parts["b_dec"], parts["x"])


@pytest.mark.parametrize("by_norm", [True, False])
def test_saelens_batchtopk_checkpoint_with_its_input_scale(tmp_path, parts, by_norm):
    config = {
        "architecture": "batchtopk",
        "normalize_activations": "expected_average_only_in",
        "k": K,
    }
    config |= {"rescale_acts_by_decoder_norm": by_norm}
    path = saelens_folder(
        tmp_path, parts, config, topk_threshold=torch.tensor(0.7, dtype=torch.float64)
    )
    (path / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    length = parts["W_dec"].norm(dim=1) if by_norm else torch.ones(N)
    pre = ((0.25 * parts["x"] - parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"]) * length
    z = pre.relu() * (pre > 0.7)
    assert (z > 0).any()
    expected = ((z / length) @ parts["W_dec"] + parts["b_dec"]) / 0.25
    for unit_decoder in (True, False):
        sae = read(path, unit_decoder=unit_decoder)
        torch.testing.assert_close(sae(parts["x"]), expected, rtol=1e-4, atol=1e-4)
        assert ((sae.encode(parts["x"]) > 0) == (z > 0)).all()


def test_saelens_scale_that_is_not_there_is_asked_for(tmp_path, parts):
    config = {"architecture": "standard", "normalize_activations": "expected_average_only_in"}
    with pytest.raises(UserError, match="scale of the activations"):
        read(saelens_folder(tmp_path, parts, config))


def test_saelens_layer_norm(tmp_path, parts):
    path = saelens_folder(
        tmp_path, parts, {"architecture": "standard", "normalize_activations": "layer_norm"}
    )
    x = parts["x"]
    mean, deviation = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    z = ((x - mean) / (deviation + 1e-5) - parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"]
    agrees(path, z.relu(), (z.relu() @ parts["W_dec"] + parts["b_dec"]) * deviation + mean, x)


def test_saelens_skip_transcoder(tmp_path, parts):
    d_out = 4
    tensors = {
        "W_enc": parts["W_enc"],
        "b_enc": parts["b_enc"],
        "W_dec": numbers(N, d_out, seed=11),
        "b_dec": numbers(d_out, seed=12),
        "W_skip": numbers(d_out, D, seed=13),
        "threshold": parts["theta"],
    }
    config = {
        "architecture": "jumprelu_skip_transcoder",
        "apply_b_dec_to_input": False,
        "d_in": D,
        "d_sae": N,
    }
    path = write_folder(
        tmp_path, tensors, config, weights="sae_weights.safetensors", description="cfg.json"
    )
    pre = parts["x"] @ parts["W_enc"] + parts["b_enc"]
    z = pre.relu() * (pre > parts["theta"])
    agrees(
        path,
        z,
        z @ tensors["W_dec"] + tensors["b_dec"] + parts["x"] @ tensors["W_skip"].T,
        parts["x"],
    )


def test_saelens_before_version_6(tmp_path, parts):
    config = {
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "normalize_activations": False,
    }
    config |= {"hook_name": "blocks.7.hook_resid_post", "model_name": "gpt2-small"}
    path = saelens_folder(tmp_path, parts, config)
    z = topk((parts["x"] - parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"])
    sae = agrees(path, z, z @ parts["W_dec"] + parts["b_dec"], parts["x"])
    assert (sae.metadata["site"], sae.metadata["model"]) == (
        "blocks.7.hook_resid_post",
        "gpt2-small",
    )


def gemma_tensors(parts, upper=True):
    names = ("W_enc", "W_dec", "b_enc", "b_dec")
    tensors = {name if upper else name.lower(): parts[name] for name in names} | {
        "threshold": parts["theta"]
    }
    pre = parts["x"] @ parts["W_enc"] + parts["b_enc"]
    z = pre.relu() * (pre > parts["theta"])
    return tensors, z, z @ parts["W_dec"] + parts["b_dec"]


@pytest.mark.parametrize("upper", [True, False])
def test_gemma_scope(tmp_path, parts, upper):
    tensors, z, reconstruction = gemma_tensors(parts, upper)
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_12" / "width_16k" / "average_l0_82"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in tensors.items()})
    sae = agrees(folder, z, reconstruction, parts["x"])
    assert sae.metadata["site"] == "blocks.12.hook_resid_post"
    agrees(folder / "params.npz", z, reconstruction, parts["x"])


def test_gemma_scope_2_with_a_skip_connection(tmp_path, parts):
    tensors, z, reconstruction = gemma_tensors(parts, upper=False)
    tensors["affine_skip_connection"] = numbers(D, D, seed=14)
    folder = write_folder(
        tmp_path,
        tensors,
        {"architecture": "jump_relu"},
        weights="params.safetensors",
        description="config.json",
    )
    agrees(folder, z, reconstruction + parts["x"] @ tensors["affine_skip_connection"], parts["x"])


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip"])
def test_sparsify(tmp_path, parts, kind):
    tensors = {"encoder.weight": parts["W_enc"].T, "encoder.bias": parts["b_enc"]}
    tensors |= {"W_dec": parts["W_dec"], "b_dec": parts["b_dec"]}
    config = {
        "k": K,
        "d_in": D,
        "activation": "topk",
        "transcode": kind != "sae",
        "skip_connection": kind == "skip",
    }
    x = parts["x"]
    z = topk(
        ((x - parts["b_dec"] if kind == "sae" else x) @ parts["W_enc"] + parts["b_enc"]).relu()
    )
    reconstruction = z @ parts["W_dec"] + parts["b_dec"]
    if kind == "skip":
        tensors["W_skip"] = numbers(D, D, seed=15)
        reconstruction = reconstruction + x @ tensors["W_skip"].mT
    folder = tmp_path / ("layers.6" if kind == "sae" else "layers.6.mlp")
    sae = agrees(
        write_folder(folder, tensors, config, weights="sae.safetensors", description="cfg.json"),
        z,
        reconstruction,
        x,
    )
    ends = (sae.metadata.get("reads"), sae.metadata["site"])
    expected = (None, "blocks.6.hook_resid_post")
    assert ends == (
        expected if kind == "sae" else ("blocks.6.mlp.hook_in", "blocks.6.hook_mlp_out")
    )


def dictionary_learning_case(name, parts):
    """State as its class saves it, latents, reconstruction."""
    x, b = parts["x"], parts["b_dec"]
    linear = {"encoder.weight": parts["W_enc"].T, "decoder.weight": parts["W_dec"].T}
    matrices = {key: parts[key] for key in ("W_enc", "b_enc", "W_dec", "b_dec")}
    centred = (x - b) @ parts["W_enc"]
    k, threshold = torch.tensor(K, dtype=torch.int), torch.tensor(0.6)
    match name:
        case "AutoEncoder":
            state, z = (
                {**linear, "encoder.bias": parts["b_enc"], "bias": b},
                (centred + parts["b_enc"]).relu(),
            )
        case "AutoEncoderNew":
            state = {**linear, "encoder.bias": parts["b_enc"], "decoder.bias": b}
            z = (x @ parts["W_enc"] + parts["b_enc"]).relu()
        case "GatedAutoEncoder":
            r, g, m = (numbers(N, seed=s, scale=0.4) for s in (20, 21, 22))
            state = {**linear, "decoder_bias": b, "r_mag": r, "gate_bias": g, "mag_bias": m}
            z = (centred + g > 0) * (r.exp() * centred + m).relu()
        case "JumpReluAutoEncoder":
            state, pre = (
                {**matrices, "threshold": parts["theta"]},
                x @ parts["W_enc"] + parts["b_enc"],
            )
            z = (pre * (pre > parts["theta"])).relu()
        case "AutoEncoderTopK":
            state = {
                **linear,
                "encoder.bias": parts["b_enc"],
                "b_dec": b,
                "k": k,
                "threshold": threshold,
            }
            z = topk((centred + parts["b_enc"]).relu())
        case "BatchTopKSAE":
            state = {
                **linear,
                "encoder.bias": parts["b_enc"],
                "b_dec": b,
                "k": k,
                "threshold": threshold,
            }
            positive = (centred + parts["b_enc"]).relu()
            z = positive * (positive > 0.6)
        case _:
            state = {
                **matrices,
                "k": k,
                "threshold": threshold,
                "group_sizes": torch.tensor([5, N - 5]),
            }
            positive = (centred + parts["b_enc"]).relu()
            z = positive * (positive > 0.6)
    return state, z, z @ parts["W_dec"] + b


@pytest.mark.parametrize(
    "name",
    [
        "AutoEncoder",
        "AutoEncoderNew",
        "GatedAutoEncoder",
        "JumpReluAutoEncoder",
        "AutoEncoderTopK",
        "BatchTopKSAE",
        "MatryoshkaBatchTopKSAE",
    ],
)
@pytest.mark.parametrize("described", [True, False])
def test_dictionary_learning(tmp_path, parts, name, described):
    state, z, reconstruction = dictionary_learning_case(name, parts)
    torch.save({key: value.contiguous() for key, value in state.items()}, tmp_path / "ae.pt")
    if described:
        config = {
            "trainer": {"dict_class": name, "layer": 3, "submodule_name": "resid_post_layer_3"},
            "buffer": {},
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
    if not described and name in ("AutoEncoderTopK", "BatchTopKSAE"):
        with pytest.raises(UserError, match="TopK or BatchTopK"):
            read(tmp_path)
        return
    sae = agrees(tmp_path, z, reconstruction, parts["x"])
    assert sae.metadata.get("site") == ("blocks.3.hook_resid_post" if described else None)


@pytest.mark.parametrize("by_norm", [True, False])
def test_llama_scope_applies_its_threshold_last(tmp_path, parts, by_norm):
    norm_in, norm_out, theta = 17.125, 9.5, 0.53
    config = {
        "d_model": D,
        "act_fn": "jumprelu",
        "jump_relu_threshold": theta,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm_in, "out": norm_out},
        "sparsity_include_decoder_norm": by_norm,
        "hook_point_in": "blocks.15.hook_resid_post",
    }
    tensors = {"encoder.weight": parts["W_enc"].T, "encoder.bias": parts["b_enc"]}
    tensors |= {"decoder.weight": parts["W_dec"].T, "decoder.bias": parts["b_dec"]}
    (tmp_path / "checkpoints").mkdir()
    save_file(
        {k: v.contiguous() for k, v in tensors.items()},
        tmp_path / "checkpoints" / "final.safetensors",
    )
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    # its own steps: rewrite for raw activations, give the decoder unit rows, then compare
    s_in, s_out = math.sqrt(D) / norm_in, math.sqrt(D) / norm_out
    W_dec, pre = parts["W_dec"] * s_in / s_out, parts["x"] @ parts["W_enc"] + parts["b_enc"] / s_in
    length = W_dec.norm(dim=1) if by_norm else torch.ones(N)
    fires = pre * length > theta
    z = torch.where(fires, pre, 0.0)
    assert fires.any()
    assert not fires.all()
    sae = agrees(tmp_path, z, z @ W_dec + parts["b_dec"] / s_out, parts["x"])
    assert sae.metadata["site"] == "blocks.15.hook_resid_post"


def test_openai_v5_normalises_every_token(tmp_path, parts):
    state = {
        "pre_bias": parts["b_dec"],
        "latent_bias": parts["b_enc"],
        "encoder.weight": parts["W_enc"].T.contiguous(),
        "decoder.weight": parts["W_dec"].T.contiguous(),
        "stats_last_nonzero": torch.zeros(N, dtype=torch.long),
        "activation": "TopK",
        "activation_state_dict": {"k": K, "postact_fn": "ReLU"},
    }
    torch.save(state, tmp_path / "6.pt")
    x = parts["x"]
    mean = x.mean(-1, keepdim=True)
    deviation = (x - mean).std(-1, keepdim=True)
    z = topk(((x - mean) / (deviation + 1e-5) - parts["b_dec"]) @ parts["W_enc"] + parts["b_enc"])
    agrees(tmp_path / "6.pt", z, (z @ parts["W_dec"] + parts["b_dec"]) * deviation + mean, x)
    sae = read(tmp_path / "6.pt", unit_decoder=False)
    torch.testing.assert_close(sae.encode_selected(x, [4, 1]), z[:, [4, 1]], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.encode_sparse(x).dense(), z, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="cannot hold"):
        save_sae(sae, tmp_path / "native")
    assert not (tmp_path / "native").exists()


def our_dictionary(activation, *, d_out=D, skip=False):
    W_dec = numbers(N, d_out, seed=33)
    return Sae(
        W_enc=numbers(N, D, seed=31),
        b_enc=numbers(N, seed=32, scale=0.2),
        W_dec=W_dec / W_dec.norm(dim=1, keepdim=True),
        b_dec=numbers(d_out, seed=34),
        b_in=numbers(D, seed=35),
        activation=activation,
        W_skip=numbers(d_out, D, seed=36) if skip else None,
        metadata={"site": "blocks.3.hook_resid_post"},
    )


@pytest.mark.parametrize("same_bias", [True, False])
@pytest.mark.parametrize(
    "activation",
    [
        Relu(),
        TopKActivation(k=K),
        Threshold(theta=numbers(N, seed=40).abs()),
        Gated(gain=numbers(N, seed=41).exp(), offset=numbers(N, seed=42)),
    ],
    ids=lambda a: a.kind,
)
def test_what_we_write_for_saelens_is_read_back_the_same(tmp_path, parts, activation, same_bias):
    sae = our_dictionary(activation)
    sae = sae.replace(b_in=sae.b_dec) if same_bias else sae
    write_saelens(sae, tmp_path, firing_rates=torch.full((N,), 0.01))
    back = read(tmp_path)
    torch.testing.assert_close(
        back.encode(parts["x"]), sae.encode(parts["x"]), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(back(parts["x"]), sae(parts["x"]), rtol=1e-4, atol=1e-4)
    assert back.metadata["site"] == "blocks.3.hook_resid_post"


def test_how_a_dictionary_was_started_survives_saelens_form(tmp_path):
    """The linker judges dictionaries of one start against a null of their own, so the start must
    not be lost."""
    sae = our_dictionary(TopKActivation(k=K))
    history = {
        "initialisation": {"kind": "chain", "group": "random-0-8", "parent": "L2", "seed": 0},
        "steps": 200,
    }
    sae.metadata.update(history)
    write_saelens(sae, tmp_path)
    back = read(tmp_path)
    assert {name: back.metadata[name] for name in history} == history
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["metadata"]["featureflow"] = {
        "initialisation": "chain",
        "steps": [1],
        "surprise": {"a": 1},
    }
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert not {"initialisation", "steps", "surprise"} & set(read(tmp_path).metadata), (
        "what has another form is left out"
    )


@pytest.mark.parametrize("skip", [True, False])
def test_transcoders_are_written_for_saelens(tmp_path, parts, skip):
    sae = our_dictionary(Threshold(theta=torch.rand(N)), d_out=4, skip=skip)
    write_saelens(sae, tmp_path)
    torch.testing.assert_close(read(tmp_path)(parts["x"]), sae(parts["x"]), rtol=1e-4, atol=1e-4)
    with pytest.raises(UserError, match="no such transcoder"):
        write_saelens(our_dictionary(TopKActivation(k=K), d_out=4), tmp_path)


@pytest.mark.parametrize("same_bias", [True, False])
def test_a_transcoder_of_one_width_is_written_as_one(tmp_path, parts, same_bias):
    """As wide out as in, it could pass for an SAE of its input."""
    sae = our_dictionary(Relu())
    b_in = sae.b_dec if same_bias else torch.zeros_like(sae.b_dec)
    ends = {"reads": "blocks.1.mlp.hook_in", "site": "blocks.1.hook_mlp_out"}
    sae = sae.replace(b_in=b_in, metadata={**ends, "transcodes": True})
    write_saelens(sae, tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert (config["architecture"], config["apply_b_dec_to_input"]) == ("transcoder", False)
    back = read(tmp_path)
    assert {name: back.metadata[name] for name in ends} == ends
    torch.testing.assert_close(back(parts["x"]), sae(parts["x"]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("hook", "model", "site"),
    [
        ("blocks.3.hook_out", None, "blocks.3.hook_resid_post"),
        ("blocks.3.hook_in", None, "blocks.3.hook_resid_pre"),
        ("blocks.3.mlp.hook_out", "gpt2", "blocks.3.hook_mlp_out"),
        ("blocks.3.attn.hook_out", "gpt2", "blocks.3.hook_attn_out"),
        ("blocks.3.mlp.hook_out", "google/gemma-2-2b", None),
        ("blocks.3.mlp.hook_in", None, "blocks.3.mlp.hook_in"),
        ("blocks.3.hook_mlp_in", None, None),
        ("blocks.3.mlp.hook_post", None, None),
    ],
)
def test_hooks_of_the_bridge_are_sites(hook, model, site):
    """In Gemma 2 the MLP's own output goes through a norm before it enters the stream; and
    `hook_mlp_in` is the stream before the norm that the MLP reads through."""
    found = site_of_hook(hook, model=model)
    assert (found and found.name) == site


def test_native_folders_and_trees_are_found(tmp_path, parts):
    save_sae(our_dictionary(Relu()), tmp_path / "a" / "L3")
    saelens_folder(tmp_path / "b", parts, {"architecture": "standard"})
    found = {path.relative_to(tmp_path).as_posix(): name for path, name in find(tmp_path)}
    assert found == {"a/L3": "featureflow", "b": "saelens"}
    assert recognise(tmp_path) == ()
    assert read(tmp_path / "a" / "L3").n_latents == N
    assert read(tmp_path / "b" / "sae_weights.safetensors").n_latents == N
