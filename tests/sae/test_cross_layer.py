"""Cross-layer transcoders and crosscoders compute the forward pass written out here, layer by layer
and pair by pair."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import save_file

from featureflow.errors import UserError
from featureflow.sites import Site
from sae.formats import read, read_cross_layer, recognise, save_cross_layer

D, N, L, TOKENS = 5, 7, 3, 20


@pytest.fixture
def numbers():
    g = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=g)


def by_hand(x, W_enc, b_enc, theta, W_dec, b_dec, skip):
    """`W_dec[l][o]` is the matrix from the latents of layer l into output o."""
    z = []
    for layer in range(L):
        pre = x[layer] @ W_enc[layer] + b_enc[layer]
        z.append(torch.where(pre > theta[layer], pre, torch.zeros(())))
    y = []
    for o in range(L):
        total = b_dec[o] + (x[o] @ skip[o] if skip is not None else 0.0)
        for layer in range(L):
            if W_dec[layer][o] is not None:
                total = total + z[layer] @ W_dec[layer][o]
        y.append(total)
    return z, y


def circuit_tracer(folder, numbers, *, thresholds=True, skip=False):
    folder.mkdir(parents=True, exist_ok=True)
    W_enc, b_enc = [numbers(D, N) for _ in range(L)], [numbers(N) for _ in range(L)]
    theta = [numbers(N).abs() if thresholds else torch.zeros(N) for _ in range(L)]
    b_dec = [numbers(D) for _ in range(L)]
    A = [numbers(D, D) for _ in range(L)] if skip else None
    W_dec = [[numbers(N, D) if o >= layer else None for o in range(L)] for layer in range(L)]
    for i in range(L):
        tensors = {f"W_enc_{i}": W_enc[i].T, f"b_enc_{i}": b_enc[i], f"b_dec_{i}": b_dec[i]}
        if thresholds:
            tensors[f"threshold_{i}"] = theta[i]
        if A is not None:
            tensors[f"W_skip_{i}"] = A[i]
        save_file(
            {n: t.contiguous() for n, t in tensors.items()}, folder / f"W_enc_{i}.safetensors"
        )
        stacked = torch.stack([W_dec[i][o] for o in range(i, L)], dim=1)
        save_file({f"W_dec_{i}": stacked}, folder / f"W_dec_{i}.safetensors")
    config = {"model_kind": "cross_layer_transcoder", "model_name": "meta-llama/Llama-3.2-1B"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return W_enc, b_enc, theta, W_dec, b_dec, A


def gemma_scope_2(folder, numbers, *, layers=None, skip=False):
    folder.mkdir(parents=True, exist_ok=True)
    W_enc, b_enc = [numbers(D, N) for _ in range(L)], [numbers(N) for _ in range(L)]
    theta, b_dec = [numbers(N).abs() for _ in range(L)], [numbers(D) for _ in range(L)]
    A = [numbers(D, D) for _ in range(L)] if skip else None
    W_dec = [[numbers(N, D) for _ in range(L)] for _ in range(L)]
    for i in range(L):
        tensors = {"w_enc": W_enc[i], "b_enc": b_enc[i], "threshold": theta[i], "b_dec": b_dec[i]}
        tensors["w_dec"] = torch.stack(W_dec[i], dim=1)
        if A is not None:
            tensors["affine_skip_connection"] = A[i]
        save_file(tensors, folder / f"params_layer_{i}.safetensors")
    place = "all" if layers is None else ",".join(map(str, layers))
    end_in, end_out = ".pre_feedforward_layernorm.output", ".post_feedforward_layernorm.output"
    if layers is not None:
        end_in = end_out = ".output"
    config = {
        "hf_hook_point_in": f"model.layers.{{{place}}}{end_in}",
        "hf_hook_point_out": f"model.layers.{{{place}}}{end_out}",
        "model_name": "google/gemma-3-270m-pt",
        "architecture": "jump_relu",
        "l0": 150,
        "type": "clt" if layers is None else "crosscoder",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return W_enc, b_enc, theta, W_dec, b_dec, A


def agrees(folder, tensors, numbers, reads, writes):
    whole = read_cross_layer(folder)
    assert whole.reads == reads
    assert whole.writes == writes
    x = {site: numbers(TOKENS, D) for site in reads}
    z, y = by_hand(list(x.values()), *tensors)
    for found, expected in zip(whole.encode(x), z, strict=True):
        torch.testing.assert_close(found, expected)
    found = whole(x)
    for site, expected in zip(writes, y, strict=True):
        torch.testing.assert_close(found[site], expected)
    return whole


@pytest.mark.parametrize("thresholds", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_circuit_tracer(tmp_path, numbers, thresholds, skip):
    tensors = circuit_tracer(tmp_path, numbers, thresholds=thresholds, skip=skip)
    reads = tuple(Site(i, "resid_mid") for i in range(L))
    agrees(tmp_path, tensors, numbers, reads, tuple(Site(i, "mlp_out") for i in range(L)))


@pytest.mark.parametrize("skip", [True, False])
def test_gemma_scope_2_transcoder(tmp_path, numbers, skip):
    tensors = gemma_scope_2(tmp_path, numbers, skip=skip)
    reads = tuple(Site(i, "mlp_in") for i in range(L))
    agrees(tmp_path, tensors, numbers, reads, tuple(Site(i, "mlp_out") for i in range(L)))


def test_gemma_scope_2_crosscoder_is_read_at_the_layers_that_it_names(tmp_path, numbers):
    tensors = gemma_scope_2(tmp_path, numbers, layers=(5, 9, 12))
    sites = tuple(Site(i, "resid_post") for i in (5, 9, 12))
    agrees(tmp_path, tensors, numbers, sites, sites)


def test_virtual_weights_are_what_a_source_adds_to_a_targets_pre_activations(tmp_path, numbers):
    """The oracle moves the stream: what the latent writes into the MLP outputs below the target is
    added to what the target reads."""
    W_enc, _, _, W_dec, _, _ = circuit_tracer(tmp_path, numbers)
    whole = read_cross_layer(tmp_path)
    moved = W_dec[0][0][4] + W_dec[0][1][4]  # layers 0 and 1 are before resid_mid of layer 2
    expected = moved @ W_enc[2]
    found = whole.virtual_weights(0, 2, latents=[4])
    torch.testing.assert_close(found[0], expected)
    assert not whole.virtual_weights(2, 0).any(), "a later layer writes nothing that 0 reads"
    assert not whole.rows(2, 0).any()


def test_a_crosscoders_latents_write_the_site_that_the_target_reads(tmp_path, numbers):
    W_enc, _, _, W_dec, _, _ = gemma_scope_2(tmp_path, numbers, layers=(5, 9, 12))
    found = read_cross_layer(tmp_path).virtual_weights(0, 2, latents=[4])
    torch.testing.assert_close(found[0], W_dec[0][2][4] @ W_enc[2])


def test_one_layer_is_the_dictionary_that_is_linked(tmp_path, numbers):
    W_enc, b_enc, theta, W_dec, b_dec, _ = circuit_tracer(tmp_path / "ct", numbers)
    sae = read(tmp_path / "ct" / "W_enc_1.safetensors", unit_decoder=False)
    x = numbers(TOKENS, D)
    pre = x @ W_enc[1] + b_enc[1]
    z = torch.where(pre > theta[1], pre, 0.0)
    torch.testing.assert_close(sae(x), z @ W_dec[1][1] + b_dec[1])
    assert (sae.metadata["reads"], sae.metadata["site"]) == (
        "blocks.1.hook_resid_mid",
        "blocks.1.hook_mlp_out",
    )
    assert "left out" in sae.metadata["notes"][0]
    W_enc, b_enc, theta, W_dec, b_dec, _ = gemma_scope_2(
        tmp_path / "gs", numbers, layers=(5, 9, 12)
    )
    file = tmp_path / "gs" / "params_layer_1.safetensors"
    pre = x @ W_enc[1] + b_enc[1]
    z = torch.where(pre > theta[1], pre, 0.0)
    torch.testing.assert_close(read(file)(x), z @ W_dec[1][1] + b_dec[1])
    assert recognise(file) == ("cross_layer",)
    metadata = read(file).metadata
    assert metadata["site"] == "blocks.9.hook_resid_post"
    assert "reads" not in metadata
    with pytest.raises(UserError, match="one a file"):
        read(tmp_path / "gs")


@pytest.mark.parametrize("make", [circuit_tracer, gemma_scope_2])
def test_the_native_form_keeps_every_number(tmp_path, numbers, make):
    tensors = make(tmp_path / "in", numbers, skip=True)
    save_cross_layer(read_cross_layer(tmp_path / "in"), tmp_path / "out")
    whole = read_cross_layer(tmp_path / "in")
    again = agrees(tmp_path / "out", tensors, numbers, whole.reads, whole.writes)
    assert again.metadata == whole.metadata
    assert [part.first for part in again.parts] == [part.first for part in whole.parts]
    torch.testing.assert_close(again.virtual_weights(0, 2), whole.virtual_weights(0, 2))


def test_a_native_form_that_is_damaged_is_refused(tmp_path, numbers):
    circuit_tracer(tmp_path / "in", numbers)
    out = tmp_path / "out"
    whole = read_cross_layer(tmp_path / "in")
    save_cross_layer(whole, out)
    text = (out / "cross_layer.json").read_text()
    for damaged, expected in (
        (text.replace('"version": 1', '"version": 2'), "version 1"),
        (text.replace('"first": 0', '"begins": 0'), "lacks something"),
        (text.replace('"threshold"', '"soft"'), "lacks something"),
        (text.replace("hook_resid_mid", "hook_nowhere"), "hook_nowhere"),
        (text[:-20], "JSON"),
    ):
        (out / "cross_layer.json").write_text(damaged)
        with pytest.raises(UserError) as error:
            read_cross_layer(out)
        assert expected in str(error.value)
    (out / "cross_layer.json").write_text(text)
    (out / "part_1.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read_cross_layer(out)
    save_file({"W_enc": torch.full((N, D), float("nan"))}, out / "part_1.safetensors")
    with pytest.raises(UserError, match="tensors of its format"):
        read_cross_layer(out)


def test_missing_layers_and_wrong_shapes_are_named(tmp_path, numbers):
    gemma_scope_2(tmp_path / "gs", numbers, layers=(5, 9, 12))
    (tmp_path / "gs" / "params_layer_2.safetensors").unlink()
    with pytest.raises(UserError, match="layers missing") as caught:
        read_cross_layer(tmp_path / "gs")
    assert "missing: params_layer_2.safetensors" in str(caught.value)
    circuit_tracer(tmp_path / "ct", numbers)
    bad = {"W_dec_1": torch.zeros(N, L, D), "extra": torch.zeros(1)}
    save_file(bad, tmp_path / "ct" / "W_dec_1.safetensors")
    with pytest.raises(UserError, match="more layers than there are"):
        read_cross_layer(tmp_path / "ct")
    save_file({"W_dec_1": torch.zeros(N + 1, 2, D)}, tmp_path / "ct" / "W_dec_1.safetensors")
    with pytest.raises(UserError, match="W_dec_1"):
        read_cross_layer(tmp_path / "ct")
    (tmp_path / "ct" / "config.yaml").write_text("model_kind: transcoder_set")
    with pytest.raises(UserError, match="cross_layer_transcoder"):
        read_cross_layer(tmp_path / "ct")
