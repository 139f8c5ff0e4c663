"""Cross-layer transcoders and crosscoders: circuit-tracer's and Gemma Scope 2's, whole or one layer
of them.

| family | files | tensors of layer i |
|---|---|---|
| circuit-tracer, `model_kind: cross_layer_transcoder` | `config.yaml`, `W_enc_{i}.safetensors`,
`W_dec_{i}.safetensors` | `W_enc_{i} [n, d]`, `b_enc_{i}`, `b_dec_{i}`, optional `threshold_{i} [n]`
and `W_skip_{i} [d, d]` (x @ W_skip); `W_dec_{i} [n, L − i, d]`, slice j into layer i + j | | Gemma
Scope 2, `type: clt` or `crosscoder` | `config.json`, `params_layer_{i}.safetensors` | `w_enc [d,
n]`, `b_enc`, `threshold`, `w_dec [n, L, d]` into all layers, `b_dec`, optional
`affine_skip_connection [d, d]` (x @ A, same layer) |

`z = relu(pre) · (pre > θ)`, ReLU without thresholds; b_dec is not subtracted. Each layer encodes
for itself, in a crosscoder too.

`read_cross_layer(folder)` reads all layers (sae/cross_layer.py), of the native form too
(sae/formats/native_cross_layer.py); a missing one is an error. `layers_of` gives the layers of a
crosscoder one by one, each with its decoder into its own site.
`read(file)` of `W_enc_{i}` or `params_layer_{i}` gives that layer alone, with its decoder into its
own site: the dictionary that the flow graph links. Memory: all tensors.
"""  # one row of a table is one line

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from featureflow.errors import Problem, UserError
from featureflow.sites import Site
from sae.activations import Activation, Relu, Threshold
from sae.cross_layer import CrossLayer, CrossLayerPart
from sae.dictionary import Sae
from sae.formats.base import Format, config_beside, described, site_of_hook
from sae.formats.folding import Foreign, fold
from sae.formats.native_cross_layer import DESCRIPTION, load_cross_layer
from sae.formats.tensors import Shape, checked, lowered, read_json, read_safetensors, read_yaml

_NOTE = "one layer of a cross-layer dictionary: what other layers write into its site is left out"
_SKIP = "affine_skip_connection"
_Layer = tuple[CrossLayerPart, Tensor, Tensor | None]
"""A part, its b_dec and its W_skip."""


def is_cross_layer(folder: Path) -> bool:
    """Whether a folder holds the layers of one."""
    names = ("params_layer_*.safetensors", "W_enc_*.safetensors", DESCRIPTION)
    return any(path for name in names for path in folder.glob(name))


def read_cross_layer(folder: str | Path) -> CrossLayer:
    """All layers of a folder. Raises UserError with every file that is missing."""
    folder = Path(folder)
    if (folder / DESCRIPTION).is_file():
        return load_cross_layer(folder)
    is_gemma = any(folder.glob("params_layer_*.safetensors"))
    pattern = "params_layer_{}.safetensors" if is_gemma else "W_enc_{}.safetensors"
    found = {int(m[1]) for f in folder.glob(pattern.format("*")) if (m := _INDEX.search(f.name))}
    config = _config_of(folder, is_gemma=is_gemma)
    layers = _layers_named(config, folder, is_gemma=is_gemma)
    n_layers = len(layers) if layers else (max(found, default=-1) + 1)
    missing = sorted(set(range(n_layers)) - found)
    if missing or not n_layers:
        raise UserError(
            "a cross-layer dictionary with layers missing",
            where=str(folder),
            expected=", ".join(pattern.format(i) for i in range(n_layers)) or pattern.format(0),
            found="missing: " + ", ".join(pattern.format(i) for i in missing),
        )
    parts = [_read_layer(folder / pattern.format(i), is_gemma=is_gemma) for i in range(n_layers)]
    places = [_sites_of(config, layers, i, is_gemma=is_gemma) for i in range(n_layers)]
    sites = [(reads, writes) for reads, writes in places if reads and writes]
    if unknown := [i for i, (reads, writes) in enumerate(places) if not (reads and writes)]:
        hooks = ", ".join(str(hook) for hook in _hooks_of(config, is_gemma=is_gemma))
        raise UserError(
            "a cross-layer dictionary whose places are no sites here",
            where=str(folder),
            found=f"{hooks} at {', '.join(map(str, unknown))}",
        )
    return CrossLayer(
        reads=tuple(reads for reads, _ in sites),
        writes=tuple(writes for _, writes in sites),
        parts=tuple(part for part, _, _ in parts),
        b_dec=tuple(b_dec for _, b_dec, _ in parts),
        W_skip=tuple(skip for _, _, skip in parts),
        metadata={
            "source": {"format": "cross_layer", "name": folder.absolute().name},
            "model": str(config.get("model_name") or "").replace("gemma-v3", "gemma-3") or None,
            "published": {"l0": config.get("l0")},
        },
    )


def layers_of(whole: CrossLayer) -> dict[Site, Sae]:
    """The layers of a crosscoder as dictionaries of their sites; `metadata["cross_layer"]` is the
    number of the layer. None of a transcoder, whose latents are no parts of the site they read."""
    if whole.reads != whole.writes:
        return {}
    found = {}
    for layer, (site, part) in enumerate(zip(whole.reads, whole.parts, strict=True)):
        foreign = Foreign(
            W_enc=part.W_enc,
            b_enc=part.b_enc,
            W_dec=whole.rows(layer, layer),
            b_dec=whole.b_dec[layer],
            activation=part.activation,
            W_skip=whole.W_skip[layer],
            metadata={**whole.metadata, "site": site.name, "cross_layer": layer, "notes": [_NOTE]},
        )
        found[site] = fold(foreign)
    return found


def read_layer(file: Path, variant: str | None = None) -> Foreign:
    """One layer, with its decoder into its own site."""
    is_gemma = file.name.startswith("params_layer")
    config = _config_of(file.parent, is_gemma=is_gemma)
    part, b_dec, skip = _read_layer(file, is_gemma=is_gemma)
    index = _index_of(file)
    own = index - part.first
    if not own < part.W_dec.shape[1]:
        raise UserError(
            "no decoder into its own layer",
            where=str(file),
            expected=f"more than {own} outputs",
            found=str(part.W_dec.shape[1]),
        )
    layers = _layers_named(config, file.parent, is_gemma=is_gemma)
    reads, writes = _sites_of(config, layers, index, is_gemma=is_gemma)
    hooks = _hooks_of(config, is_gemma=is_gemma)
    transcodes = config.get("type", "clt") != "crosscoder"
    return Foreign(
        W_enc=part.W_enc,
        b_enc=part.b_enc,
        W_dec=part.W_dec[:, own].contiguous(),
        b_dec=b_dec,
        activation=part.activation,
        W_skip=skip,
        metadata=described(
            "cross_layer",
            file,
            {"layer": index},
            reads=(reads.name if reads else hooks[0]) if transcodes else None,
            writes=writes.name if writes else hooks[1],
            transcodes=transcodes,
            model=str(config.get("model_name") or "").replace("gemma-v3", "gemma-3"),
            notes=(_NOTE,),
        ),
    )


_INDEX = re.compile(r"_(\d+)\.safetensors$")


def _index_of(file: Path) -> int:
    match = _INDEX.search(file.name)
    if match is None:
        raise UserError("which layer is it?", where=str(file), expected="W_enc_3 or params_layer_3")
    return int(match[1])


def _config_of(folder: Path, *, is_gemma: bool) -> dict[str, Any]:
    beside = folder / "any"
    if is_gemma:
        config = config_beside(beside, "config.json", read_json)
        wanted = {"architecture": ("jump_relu",), "type": ("clt", "crosscoder")}
    else:
        config = config_beside(beside, "config.yaml", read_yaml)
        wanted = {"model_kind": ("cross_layer_transcoder",)}
    problems = tuple(
        Problem(what="unknown", where=key, expected=", ".join(known), found=str(config[key]))
        for key, known in wanted.items()
        if config.get(key, known[0]) not in known
    )
    if problems:
        raise UserError(f"the configuration in {folder} cannot be used", problems=problems)
    return config


def _read_layer(file: Path, *, is_gemma: bool) -> _Layer:
    return _read_gemma(file) if is_gemma else _read_circuit_tracer(file)


def _read_gemma(file: Path) -> _Layer:
    shapes: dict[str, Shape] = {
        "w_enc": ("d_in", "latent"),
        "b_enc": ("latent",),
        "threshold": ("latent",),
        "w_dec": ("latent", "output", "d_out"),
        "b_dec": ("d_out",),
        _SKIP: ("d_in", "d_out"),
    }
    tensors = lowered(read_safetensors(file), file)
    found = checked(tensors, shapes, where=file, optional=frozenset({_SKIP}), only=True)
    part = CrossLayerPart(
        W_enc=found["w_enc"].T.contiguous(),
        b_enc=found["b_enc"],
        W_dec=found["w_dec"],
        activation=Threshold(theta=found["threshold"].clamp_min(0)),
    )
    skip = found.get(_SKIP)
    return part, found["b_dec"], None if skip is None else skip.T.contiguous()


def _read_circuit_tracer(file: Path) -> _Layer:
    i = _index_of(file)
    names: dict[str, Shape] = {
        f"W_enc_{i}": ("latent", "d_in"),
        f"b_enc_{i}": ("latent",),
        f"b_dec_{i}": ("d_out",),
        f"threshold_{i}": ("latent",),
        f"W_skip_{i}": ("d_in", "d_out"),
    }
    optional = frozenset({f"threshold_{i}", f"W_skip_{i}"})
    found = checked(read_safetensors(file), names, where=file, optional=optional, only=True)
    decoder = file.with_name(f"W_dec_{i}.safetensors")
    shape: Shape = (len(found[f"b_enc_{i}"]), "output", len(found[f"b_dec_{i}"]))
    W_dec = checked(read_safetensors(decoder), {f"W_dec_{i}": shape}, where=decoder)[f"W_dec_{i}"]
    activation: Activation = Relu()
    if f"threshold_{i}" in found:
        activation = Threshold(theta=found[f"threshold_{i}"].clamp_min(0))
    part = CrossLayerPart(
        W_enc=found[f"W_enc_{i}"],
        b_enc=found[f"b_enc_{i}"],
        W_dec=W_dec,
        activation=activation,
        first=i,
    )
    skip = found.get(f"W_skip_{i}")
    return part, found[f"b_dec_{i}"], None if skip is None else skip.T.contiguous()


def _hooks_of(config: Mapping[str, Any], *, is_gemma: bool) -> tuple[str | None, str | None]:
    """Input and output as written, for all layers together."""
    if not is_gemma:
        ends = (config.get("feature_input_hook"), config.get("feature_output_hook"))
        return str(ends[0] or "hook_resid_mid"), str(ends[1] or "hook_mlp_out")
    reads, writes = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    return reads, writes or reads


def _layers_named(config: Mapping[str, Any], folder: Path, *, is_gemma: bool) -> list[int]:
    """The layers of a crosscoder, in the order of its files; empty where all are meant."""
    if not is_gemma:
        return []
    hook = re.search(r"\{(\d+(?:,\s*\d+)*)\}", str(config.get("hf_hook_point_in")))
    name = re.search(r"layer_(\d+(?:_\d+)+)_width", folder.absolute().name)
    text = hook[1] if hook else name[1] if name else ""
    return [int(number) for number in re.findall(r"\d+", text)]


def _sites_of(
    config: Mapping[str, Any], layers: list[int], index: int, *, is_gemma: bool
) -> tuple[Site | None, Site | None]:
    layer = layers[index] if index < len(layers) else index
    hooks = _hooks_of(config, is_gemma=is_gemma)
    if not is_gemma:
        reads, writes = (site_of_hook(f"blocks.{layer}.{hook}") for hook in hooks)
    else:
        reads, writes = (
            site_of_hook(re.sub(r"\{[^}]*\}", str(layer), hook)) if hook else None for hook in hooks
        )
    return reads, writes


FORMATS = {
    "cross_layer": Format(
        read=read_layer,
        lone=("W_enc_*.safetensors", "params_layer_*.safetensors"),
        fits=lambda shapes: any(
            name.startswith("W_enc_") or (name == "w_dec" and len(shape) == 3)
            for name, shape in shapes.items()
        ),
    )
}
