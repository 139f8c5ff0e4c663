"""Files that are hostile, damaged or of the wrong shape are refused, with every problem named, and
nothing runs."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from featureflow.errors import UserError
from sae.formats import read


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return (os.mkdir, (self.place,))


@pytest.mark.parametrize("name", ["ae.pt", "6.pt"])
def test_a_pickle_payload_in_a_torch_file_is_not_run(tmp_path, name):
    place = tmp_path / "executed"
    torch.save({"encoder.weight": torch.zeros(3, 2), "x": Payload(place)}, tmp_path / name)
    with pytest.raises(UserError, match="not plain data"):
        read(tmp_path / name)
    assert not place.exists()


def test_a_bare_pickle_is_not_run(tmp_path):
    place = tmp_path / "executed"
    (tmp_path / "ae.pt").write_bytes(pickle.dumps(Payload(place)))
    with pytest.raises(UserError):
        read(tmp_path / "ae.pt")
    assert not place.exists()


def test_an_object_array_in_an_archive_is_not_run(tmp_path):
    place = tmp_path / "executed"
    np.savez(tmp_path / "params.npz", W_enc=np.array([Payload(place)], dtype=object))
    with pytest.raises(UserError, match="not plain data"):
        read(tmp_path)
    assert not place.exists()


def saelens(folder, tensors, **config):
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(
        json.dumps({"architecture": "standard", "d_in": 4, "d_sae": 6} | config)
    )
    return folder


def test_all_problems_of_the_tensors_come_at_once(tmp_path):
    tensors = {
        "W_enc": torch.zeros(4, 6),
        "W_dec": torch.zeros(6, 5),
        "b_enc": torch.full((6,), float("nan")),
    }
    with pytest.raises(UserError) as caught:
        read(saelens(tmp_path, tensors))
    text = str(caught.value)
    assert "W_dec: shape" in text
    assert "expected: [latent=6, d_in=4]" in text
    assert "b_enc: NaN or infinity" in text
    assert "b_dec: missing tensor" in text


def test_sizes_in_the_description_are_held_against_the_tensors(tmp_path):
    tensors = {
        "W_enc": torch.zeros(4, 7),
        "W_dec": torch.zeros(7, 4),
        "b_enc": torch.zeros(7),
        "b_dec": torch.zeros(4),
    }
    with pytest.raises(UserError, match="does not hold") as caught:
        read(saelens(tmp_path, tensors))
    assert len(caught.value.problems) == 3


def test_all_problems_of_the_description_come_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        read(
            saelens(
                tmp_path,
                {"a": torch.zeros(1)},
                architecture="topk",
                k="3",
                normalize_activations="whitened",
            )
        )
    assert {problem.where for problem in caught.value.problems} == {"k", "normalize_activations"}


def test_integer_tensors_are_refused(tmp_path):
    tensors = {
        name: torch.zeros(4, 4, dtype=torch.int32)
        for name in ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
    }
    save_file(tensors, tmp_path / "params.safetensors")
    with pytest.raises(UserError, match="does not hold") as caught:
        read(tmp_path)
    assert len(caught.value.problems) == 5


def test_a_cross_layer_transcoder_is_refused_by_name(tmp_path):
    save_file(
        {"w_enc": torch.zeros(4, 6), "w_dec": torch.zeros(6, 3, 4)}, tmp_path / "params.safetensors"
    )
    with pytest.raises(UserError, match="cross-layer"):
        read(tmp_path)


def test_nothing_known_lists_what_would_be(tmp_path):
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(UserError, match="no dictionary of a known format") as caught:
        read(tmp_path)
    assert "gemma_scope: params.npz" in str(caught.value)
    assert "readme.txt" in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "absent")
    with pytest.raises(UserError, match="unknown format"):
        read(tmp_path, format="onnx")


def test_several_formats_in_one_folder_must_be_named(tmp_path):
    (tmp_path / "params.npz").write_bytes(b"")
    (tmp_path / "ae.pt").write_bytes(b"")
    with pytest.raises(UserError, match="several formats"):
        read(tmp_path)


@given(
    data=st.binary(max_size=300),
    name=st.sampled_from(["params.npz", "params.safetensors", "ae.pt"]),
)
@settings(max_examples=60, deadline=None)
def test_random_bytes_only_ever_give_the_one_error(tmp_path_factory, data, name):
    folder = tmp_path_factory.mktemp("bytes")
    (folder / name).write_bytes(data)
    with pytest.raises(UserError):
        read(folder)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", ["params.npz", "params.safetensors", "ae.pt"])
def test_truncated_files_give_the_one_error(tmp_path, name, keep):
    tensors = {
        "w_enc": torch.zeros(4, 6),
        "w_dec": torch.zeros(6, 4),
        "b_enc": torch.zeros(6),
        "b_dec": torch.zeros(4),
    }
    path = tmp_path / name
    if name.endswith("npz"):
        np.savez(path, **{key: value.numpy() for key, value in tensors.items()})
    elif name.endswith("pt"):
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(UserError):
        read(tmp_path)


def four(**changes):
    tensors = {"W_enc": torch.ones(6, 4), "W_dec": torch.ones(6, 4)}
    return {**tensors, "b_enc": torch.ones(6), "b_dec": torch.ones(4)} | changes


LAYOUTS = {
    "circuit_tracer": ("layer_0.safetensors", four()),
    "qwen_scope": ("SAE-Res-Q-W0K-L0_2/layer0.sae.pt", four(W_dec=torch.ones(4, 6))),
    "hook_z": ("z.pt", four(W_enc=torch.ones(4, 6))),
    "goodfire": (
        "Model-SAE-l3.pt",
        {
            "encoder_linear.weight": torch.ones(6, 4),
            "encoder_linear.bias": torch.ones(6),
            "decoder_linear.weight": torch.ones(4, 6),
            "decoder_linear.bias": torch.ones(4),
        },
    ),
    "gemma_scope_2": (
        "params.safetensors",
        {
            "w_enc": torch.ones(4, 6),
            "w_dec": torch.ones(6, 4),
            "b_enc": torch.ones(6),
            "b_dec": torch.ones(4),
            "threshold": torch.ones(6),
        },
    ),
    "cross_layer": (
        "params_layer_0.safetensors",
        {
            "w_enc": torch.ones(4, 6),
            "w_dec": torch.ones(6, 1, 4),
            "b_enc": torch.ones(6),
            "b_dec": torch.ones(4),
            "threshold": torch.ones(6),
        },
    ),
}


def write_layout(path, tensors):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_wrong_tensor_of_a_layout_is_named_in_one_error(tmp_path, name):
    file, tensors = LAYOUTS[name]
    path = write_layout(tmp_path / file, tensors)
    assert read(path).metadata["source"]["format"] == name
    first, second, third, *_ = tensors
    damaged = dict(tensors)
    damaged[first] = damaged[first].clone()
    damaged[first].view(-1)[1] = float("nan")
    damaged[second] = torch.ones(tensors[second].shape[0] + 1, *tensors[second].shape[1:])
    damaged[third] = tensors[third].int()
    damaged["one_more"] = torch.ones(2)
    write_layout(path, damaged)
    with pytest.raises(UserError) as caught:
        read(path, format=name)
    where = {problem.where for problem in caught.value.problems}
    assert where >= {first, second, third, "one_more"}
    write_layout(path, {**tensors, first: torch.full_like(tensors[first], float("inf"))})
    with pytest.raises(UserError, match="NaN or infinity"):
        read(path, format=name)


def test_a_tensor_that_comes_twice_is_refused(tmp_path):
    save_file({"w_enc": torch.ones(2, 2), "w_dex": torch.zeros(2, 2)}, tmp_path / "p.safetensors")
    raw = (tmp_path / "p.safetensors").read_bytes()
    (tmp_path / "params.safetensors").write_bytes(raw.replace(b"w_dex", b"w_enc"))
    with pytest.raises(UserError, match="cannot be read") as caught:
        read(tmp_path / "params.safetensors", format="gemma_scope_2")
    assert "w_enc" in str(caught.value)
    arrays = {name: np.ones((2, 2), np.float32) for name in ("W_enc", "w_enc")}
    np.savez(tmp_path / "params.npz", **arrays)
    with pytest.raises(UserError, match="two tensors of one name"):
        read(tmp_path / "params.npz")
    folder = saelens(tmp_path, {"W_enc": torch.zeros(4, 6)})
    (folder / "cfg.json").write_text('{"d_in": 4, "d_in": 5}')
    with pytest.raises(UserError, match="cannot be read") as caught:
        read(folder, format="saelens")
    assert "twice in the file: d_in" in str(caught.value)


def test_a_skip_connection_that_the_architecture_does_not_have_is_not_dropped(tmp_path):
    tensors = {"W_enc": torch.ones(4, 6), "W_dec": torch.ones(6, 4), "b_enc": torch.ones(6)}
    tensors |= {"b_dec": torch.ones(4), "W_skip": torch.ones(4, 4)}
    with pytest.raises(UserError, match="W_skip"):
        read(saelens(tmp_path, tensors, architecture="transcoder"))
