"""Gemma Scope dictionaries: JumpReLU SAEs and transcoders published as arrays, turned into the
inference form.

1. Gemma Scope (1): `params.npz` with `W_enc [d_in, latent]`, `W_dec [latent, d_out]`, `b_enc`,
   `b_dec`, `threshold`, in upper or lower case, sometimes `scaling_factor [latent]` (applied to
   latents before decoding).
2. Gemma Scope 2: `params.safetensors` with the same names in lower case, for skip transcoders also
   `affine_skip_connection [d_in, d_out]`; `config.json` beside it says where it was trained.

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

from featureflow.errors import UserError
from sae.activations import Threshold
from sae.dictionary import Sae
from sae.formats.folding import Foreign, fold
from sae.formats.tensors import Shape, checked, read_json, read_npz, read_safetensors

_SHAPES: dict[str, Shape] = {
    "w_enc": ("d_in", "latent"),
    "w_dec": ("latent", "d_out"),
    "b_enc": ("latent",),
    "b_dec": ("d_out",),
    "threshold": ("latent",),
}


def read_gemma_scope(path: Path, *, unit_decoder: bool = True) -> Sae:
    """Read `params.npz`, or a folder with it."""
    file = path / "params.npz" if path.is_dir() else path
    tensors = {name.lower(): tensor for name, tensor in read_npz(file).items()}
    found = checked(
        tensors,
        {**_SHAPES, "scaling_factor": ("latent",)},
        where=file,
        optional=frozenset({"scaling_factor"}),
    )
    if "scaling_factor" in found:
        found["w_dec"] = found["w_dec"] * found["scaling_factor"][:, None]
    return _folded(found, unit_decoder=unit_decoder, metadata=_described("gemma_scope", file, {}))


def read_gemma_scope_2(path: Path, *, unit_decoder: bool = True) -> Sae:
    """Read `params.safetensors`, or a folder with it."""
    file = path / "params.safetensors" if path.is_dir() else path
    tensors = {name.lower(): tensor for name, tensor in read_safetensors(file).items()}
    if getattr(tensors.get("w_dec"), "ndim", 2) == 3:
        raise UserError(
            "a cross-layer transcoder decodes into many layers; it is not one dictionary",
            where=f"{file}: w_dec",
            expected="[latent, d_out]",
            found=str(list(tensors["w_dec"].shape)),
        )
    skip = "affine_skip_connection"
    found = checked(
        tensors, {**_SHAPES, skip: ("d_in", "d_out")}, where=file, optional=frozenset({skip})
    )
    description = file.parent / "config.json"
    config = read_json(description) if description.is_file() else {}
    if config.get("architecture", "jump_relu") != "jump_relu":
        raise UserError(
            "unknown architecture",
            where=str(description),
            expected="jump_relu",
            found=str(config["architecture"]),
        )
    return _folded(
        found, unit_decoder=unit_decoder, metadata=_described("gemma_scope_2", file, config)
    )


def _folded(found: Mapping[str, Tensor], *, unit_decoder: bool, metadata: dict[str, Any]) -> Sae:
    skip = found.get("affine_skip_connection")
    foreign = Foreign(
        W_enc=found["w_enc"].T.contiguous(),
        b_enc=found["b_enc"],
        W_dec=found["w_dec"],
        b_dec=found["b_dec"],
        activation=Threshold(theta=found["threshold"].clamp_min(0)),
        W_skip=None if skip is None else skip.T.contiguous(),
        metadata=metadata,
    )
    return fold(foreign, unit_decoder=unit_decoder)


def _described(format_name: str, file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the published folder names say: `…-pt-res/layer_12/width_16k/average_l0_82`,
    `resid_post/layer_12_…`."""
    place = "/".join(file.resolve().parts[-6:-1])
    metadata: dict[str, Any] = {"source": {"format": format_name, "name": place, **config}}
    layer = re.search(r"layer_(\d+)", place)
    kind = re.search(r"resid_post|mlp_out|-res\b|-mlp\b", place)
    if layer and kind and "transcoder" not in place:
        hook = {"-res": "resid_post", "-mlp": "mlp_out"}.get(kind[0], kind[0])
        metadata["site"] = f"blocks.{layer[1]}.hook_{hook}"
    return metadata
