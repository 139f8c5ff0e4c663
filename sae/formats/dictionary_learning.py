"""saprmarks/dictionary_learning: `ae.pt` with `config.json`, on the Hub `model.safetensors`.

The class that wrote the file decides what its tensors mean; `config.json` names it as
`trainer.dict_class`, and so does `format = "dictionary_learning:BatchTopKSAE"`.

| class | tensors | z |
|---|---|---|
| AutoEncoder | encoder.{weight,bias}, decoder.weight, bias | relu(encoder(x − bias)) |
| AutoEncoderNew | encoder.{weight,bias}, decoder.{weight,bias} | relu(encoder(x)) |
| GatedAutoEncoder | encoder.weight, decoder.weight, decoder_bias, r_mag, gate_bias, mag_bias | e =
encoder(x − decoder_bias): (e + gate_bias > 0) · relu(exp(r_mag) e + mag_bias) | |
JumpReluAutoEncoder | W_enc [d, latent], b_enc, W_dec [latent, d], b_dec, threshold [latent] |
relu(pre) · (pre > threshold), b_dec not subtracted | | AutoEncoderTopK | encoder.{weight,bias},
decoder.weight, b_dec, k, threshold | topk(relu(encoder(x − b_dec))) | | BatchTopKSAE | the same
names | relu(e) · (e > threshold), threshold a scalar | | MatryoshkaBatchTopKSAE | W_enc, b_enc,
W_dec, b_dec, k, threshold, group_sizes | as BatchTopKSAE |

Input scaling was folded by its authors when the file was saved. Layout of version 0.1.0. Read with
`weights_only=True`.
"""  # one row of a table is one line

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from featureflow.errors import UserError
from sae.activations import Activation, Gated, Relu, Threshold, TopKActivation
from sae.formats.base import Format, Shapes, config_beside, described
from sae.formats.folding import Foreign, full_like_latents
from sae.formats.tensors import Shape, checked, read_json, read_pt, read_safetensors

_LINEAR: dict[str, Shape] = {
    "encoder.weight": ("latent", "d_in"),
    "decoder.weight": ("d_in", "latent"),
}
_MATRICES: dict[str, Shape] = {
    "W_enc": ("d_in", "latent"),
    "b_enc": ("latent",),
    "W_dec": ("latent", "d_in"),
    "b_dec": ("d_in",),
}
_SHAPES: dict[str, dict[str, Shape]] = {
    "AutoEncoder": {**_LINEAR, "encoder.bias": ("latent",), "bias": ("d_in",)},
    "AutoEncoderNew": {**_LINEAR, "encoder.bias": ("latent",), "decoder.bias": ("d_in",)},
    "GatedAutoEncoder": {
        **_LINEAR,
        "decoder_bias": ("d_in",),
        "r_mag": ("latent",),
        "gate_bias": ("latent",),
        "mag_bias": ("latent",),
    },
    "JumpReluAutoEncoder": {**_MATRICES, "threshold": ("latent",)},
    "AutoEncoderTopK": {**_LINEAR, "encoder.bias": ("latent",), "b_dec": ("d_in",)},
    "BatchTopKSAE": {**_LINEAR, "encoder.bias": ("latent",), "b_dec": ("d_in",)},
    "MatryoshkaBatchTopKSAE": _MATRICES,
}


def read_dictionary_learning(path: Path, variant: str | None = None) -> Foreign:
    """`variant` says what class wrote the file when no `config.json` does."""
    file = next(f for f in (path / "ae.pt", path / _HUB, path) if f.is_file() or f == path)
    config = config_beside(file, "config.json", read_json)
    state = read_safetensors(file) if file.suffix == ".safetensors" else read_pt(file)
    state = {**{key: config[key] for key in ("k", "threshold") if key in config}, **state}
    trainer = config.get("trainer")
    trainer = trainer if isinstance(trainer, Mapping) else {}
    name = variant or str(trainer.get("dict_class") or _class_by_names(state, file))
    where = file
    if name not in _SHAPES:
        raise UserError(
            "unknown class", where=f"{where}: dict_class", expected=", ".join(_SHAPES), found=name
        )
    found = checked(state, _SHAPES[name], where=where)
    W_enc = found["encoder.weight"] if "encoder.weight" in found else found["W_enc"].T.contiguous()
    W_dec = found["decoder.weight"].T.contiguous() if "decoder.weight" in found else found["W_dec"]
    b_dec = next(found[n] for n in ("b_dec", "bias", "decoder.bias", "decoder_bias") if n in found)
    b_enc = next(found[n] for n in ("encoder.bias", "b_enc", "gate_bias") if n in found)
    return Foreign(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        b_in=None if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else b_dec,
        activation=_activation(name, state, found, W_enc, where),
        metadata=_described(name, where, trainer),
    )


def _class_by_names(state: Mapping[str, Any], where: Path) -> str:
    """The class whose tensors these are, when that is unambiguous: TopK and BatchTopK share their
    names."""
    names = set(state)
    if {"encoder.weight", "b_dec", "k"} <= names:
        raise UserError(
            "TopK or BatchTopK? Both are saved under the same names",
            where=str(where),
            expected='config.json beside it, with {"trainer": {"dict_class": "AutoEncoderTopK"}}',
            fix="put the config.json of the training run beside it, "
            "or say which: format = dictionary_learning:AutoEncoderTopK or "
            "dictionary_learning:BatchTopKSAE",
        )
    fits = [name for name, shapes in _SHAPES.items() if set(shapes) <= names]
    if "group_sizes" in names or not fits:
        return "MatryoshkaBatchTopKSAE" if "group_sizes" in names else "AutoEncoder"
    return next((name for name in fits if name != "MatryoshkaBatchTopKSAE"), fits[0])


def _activation(
    name: str, state: Mapping[str, Any], found: Mapping[str, Tensor], W_enc: Tensor, where: Path
) -> Activation:
    match name:
        case "AutoEncoderTopK":
            return TopKActivation(k=int(_scalar(state, "k", where)))
        case "BatchTopKSAE" | "MatryoshkaBatchTopKSAE":
            # a threshold below zero means that training never set it; its code then keeps every
            # positive entry
            return Threshold(
                theta=full_like_latents(max(_scalar(state, "threshold", where), 0.0), W_enc)
            )
        case "JumpReluAutoEncoder":
            return Threshold(theta=found["threshold"].clamp_min(0))
        case "GatedAutoEncoder":
            gain = found["r_mag"].exp()
            return Gated(gain=gain, offset=found["mag_bias"] - gain * found["gate_bias"])
        case _:
            return Relu()


def _scalar(state: Mapping[str, Any], name: str, where: Path) -> float:
    value = state.get(name)
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, (int, float)) or value != value:
        raise UserError("not a number", where=f"{where}: {name}", found=str(value)[:80])
    return float(value)


def _described(name: str, where: Path, trainer: Mapping[str, Any]) -> dict[str, Any]:
    kept = {
        key: value for key, value in trainer.items() if isinstance(value, (str, int, float, bool))
    }
    return described(
        "dictionary_learning",
        where,
        {"class": name, **kept},
        writes=_hook(trainer),
        model=trainer.get("lm_name"),
        l0=trainer.get("k"),
    )


def _hook(trainer: Mapping[str, Any]) -> str | None:
    """`submodule_name` is written as `resid_post_layer_3`."""
    layer, name = trainer.get("layer"), str(trainer.get("submodule_name") or "")
    if not isinstance(layer, int) or not name:
        return None
    kind = name.removesuffix(f"_layer_{layer}")
    return f"blocks.{layer}.hook_{_KINDS.get(kind, kind)}"


def _fits(shapes: Shapes) -> bool:
    return "encoder.weight" in shapes or {"W_enc", "threshold"} <= set(shapes)


_HUB = "model.safetensors"
_KINDS = {"attention_out": "attn_out", "attn_output": "attn_out", "mlp_output": "mlp_out"}
FORMATS = {
    "dictionary_learning": Format(
        read=read_dictionary_learning,
        files=("ae.pt",),
        lone=("*.pt", "*.pth"),
        fits=lambda shapes: _fits(shapes) and "pre_bias" not in shapes,
    ),
    "dictionary_learning_hub": Format(
        read=read_dictionary_learning, files=("config.json", _HUB), fits=_fits
    ),
}
