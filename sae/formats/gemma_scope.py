"""Gemma Scope dictionaries: JumpReLU SAEs and transcoders published as arrays.

1. Gemma Scope (1): `params.npz` with `W_enc [d_in, latent]`, `W_dec [latent, d_out]`, `b_enc`,
   `b_dec`, `threshold`, in upper or lower case, sometimes `scaling_factor [latent]` (applied to
   latents before decoding). Where it was trained stands in the names of its folders only. Its
   transcoders read the MLP's input without the norm's gain.
2. Gemma Scope 2: `params.safetensors` with the same names in lower case, for skip transcoders also
   `affine_skip_connection [d_in, d_out]`; `config.json` beside it says where it was trained.
   Cross-layer transcoders and crosscoders: sae/formats/cross_layer.py.

`z = relu(pre) · (pre > threshold)` with `pre = x W_enc + b_enc`; `b_dec` is not subtracted from the
input. Papers: arXiv 2408.05147; layouts as published by their authors. Cost: one pass over the
arrays.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from featureflow.errors import Problem, UserError
from sae.activations import Threshold
from sae.formats.base import Format, config_beside, described
from sae.formats.folding import Foreign
from sae.formats.tensors import Shape, checked, lowered, read_json, read_npz, read_safetensors

_SHAPES: dict[str, Shape] = {
    "w_enc": ("d_in", "latent"),
    "w_dec": ("latent", "d_out"),
    "b_enc": ("latent",),
    "b_dec": ("d_out",),
    "threshold": ("latent",),
}
_SKIP = "affine_skip_connection"
_HOOKS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


def read_gemma_scope(path: Path, variant: str | None = None) -> Foreign:
    file = path / "params.npz" if path.is_dir() else path
    tensors = lowered(read_npz(file), file)
    optional = frozenset({"scaling_factor"})
    shapes = {**_SHAPES, "scaling_factor": ("latent",)}
    found = checked(tensors, shapes, where=file, optional=optional, only=True)
    if "scaling_factor" in found:
        found["w_dec"] = found["w_dec"] * found["scaling_factor"][:, None]
    return _foreign(found, _described_1(file))


def read_gemma_scope_2(path: Path, variant: str | None = None) -> Foreign:
    file = path / "params.safetensors" if path.is_dir() else path
    tensors = lowered(read_safetensors(file), file)
    if getattr(tensors.get("w_dec"), "ndim", 2) == 3:
        raise UserError(
            "a cross-layer dictionary decodes into many layers; it is not one dictionary",
            where=f"{file}: w_dec",
            expected="[latent, d_out]",
            found=str(list(tensors["w_dec"].shape)),
            fix="read the folder with all its layers by sae.formats.read_cross_layer",
        )
    shapes = {**_SHAPES, _SKIP: ("d_in", "d_out")}
    found = checked(tensors, shapes, where=file, optional=frozenset({_SKIP}), only=True)
    config = config_beside(file, "config.json", read_json)
    if problems := tuple(_problems_of(config)):
        raise UserError(f"{file.parent / 'config.json'} cannot be used", problems=problems)
    return _foreign(found, _described_2(file, config))


def _problems_of(config: Mapping[str, Any]) -> list[Problem]:
    wanted = {"architecture": ("jump_relu",), "type": ("sae", "transcoder")}
    return [
        Problem(what="unknown", where=key, expected=", ".join(known), found=str(config[key]))
        for key, known in wanted.items()
        if config.get(key, known[0]) not in known
    ]


def _foreign(found: Mapping[str, Tensor], metadata: dict[str, Any]) -> Foreign:
    skip = found.get(_SKIP)
    return Foreign(
        W_enc=found["w_enc"].T.contiguous(),
        b_enc=found["b_enc"],
        W_dec=found["w_dec"],
        b_dec=found["b_dec"],
        activation=Threshold(theta=found["threshold"].clamp_min(0)),
        W_skip=None if skip is None else skip.T.contiguous(),
        metadata=metadata,
    )


def _described_1(file: Path) -> dict[str, Any]:
    """From names such as `gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82`."""
    place = "/".join(file.absolute().parts[-8:-1])
    layer, l0 = re.search(r"layer_(\d+)", place), re.search(r"average_l0_(\d+)", place)
    model = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)\b", place)
    kind = model[3] if model else None
    reads = writes = None
    if layer and kind == "transcoders":
        reads = f"blocks.{layer[1]}.ln2.hook_normalized"
        writes = f"blocks.{layer[1]}.hook_mlp_out"
    elif layer and kind:
        writes = f"blocks.{layer[1]}.{_HOOKS[kind]}"
    elif re.search(r"(^|/)embedding/", place) and kind:
        writes = "hook_embed"
    return described(
        "gemma_scope",
        file,
        {"place": place},
        reads=reads,
        writes=writes,
        transcodes=kind == "transcoders",
        model=f"gemma-2-{model[1]}{'-it' if model[2] == 'it' else ''}" if model else None,
        l0=int(l0[1]) if l0 else None,
    )


def _described_2(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """From its configuration, or from the folders' names where there is none."""
    place = "/".join(file.absolute().parts[-8:-1])
    layer = re.search(r"layer_(\d+)_width", place)
    kind = re.search(r"(resid_post|mlp_out|attn_out|transcoder)(_all)?/", place)
    reads, writes = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    transcodes = config.get("type") == "transcoder" or bool(kind and kind[1] == "transcoder")
    if not writes and not reads and layer and kind:
        names = {"attn_out": "attn.hook_z", "transcoder": "hook_mlp_out"}
        writes = f"blocks.{layer[1]}.{names.get(kind[1], f'hook_{kind[1]}')}"
        reads = f"blocks.{layer[1]}.mlp.hook_in" if transcodes else None
    model = str(config.get("model_name") or "").replace("gemma-v3", "gemma-3")
    found = re.search(r"gemma-scope-2-(\d+[mb]-(?:pt|it))", place)
    return described(
        "gemma_scope_2",
        file,
        {"place": place, **config},
        reads=reads if transcodes else None,
        writes=writes or reads,
        transcodes=transcodes,
        model=model or (f"gemma-3-{found[1]}" if found else None),
        l0=config.get("l0"),
    )


def _fits(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return {"w_enc", "w_dec"} <= set(shapes) or {"W_enc", "W_dec", "threshold"} <= set(shapes)


FORMATS = {
    "gemma_scope": Format(read=read_gemma_scope, files=("params.npz",), lone=("*.npz",)),
    "gemma_scope_2": Format(
        read=read_gemma_scope_2,
        files=("params.safetensors",),
        lone=("params.safetensors", "*.safetensors"),
        fits=_fits,
    ),
}
