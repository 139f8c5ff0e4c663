"""Llama Scope dictionaries: `hyperparams.json` and `checkpoints/final.safetensors`, turned into the
inference form.

Tensors: `encoder.weight [latent, d]`, `encoder.bias`, `decoder.weight [d, latent]`, `decoder.bias`.
The code they were made with runs them on activations scaled to norm √d on average and then rewrites
them for raw activations:

1. `s_in = √d / average norm (in)`, `s_out` likewise; `pre = W_enc x + b_enc / s_in`, decoder `W_dec
   s_in / s_out`, `b_dec / s_out`;
2. decoder rows get unit length, the encoder takes their lengths (`sparsity_include_decoder_norm`);
3. only then is `pre` compared with the scalar `jump_relu_threshold`, which therefore is in units of
   the raw activation.

So the threshold is not scaled and is applied after step 2. Order matters: users of one dictionary
reported a mean L0 of 1,089, 42 and 29 under three readings (Llamascopium issue 128). Paper: arXiv
2410.20526. Cost: one pass over the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from featureflow.errors import Problem, UserError
from sae.activations import Activation, Relu, Threshold, TopKActivation
from sae.formats.base import Format, described
from sae.formats.folding import Foreign
from sae.formats.tensors import checked, read_json, read_safetensors


def read_llama_scope(folder: Path, variant: str | None = None) -> Foreign:
    config = read_json(folder / "hyperparams.json")
    if problems := tuple(_problems_of(config)):
        raise UserError(f"{folder / 'hyperparams.json'} cannot be used", problems=problems)
    file = folder / "checkpoints" / "final.safetensors"
    found = checked(
        read_safetensors(file),
        {
            "encoder.weight": ("latent", "d_in"),
            "encoder.bias": ("latent",),
            "decoder.weight": ("d_out", "latent"),
            "decoder.bias": ("d_out",),
        },
        where=file,
        sizes={"d_in": int(config["d_model"])},
        optional=frozenset()
        if config.get("use_decoder_bias", True)
        else frozenset({"decoder.bias"}),
    )
    return _foreign(found, config, folder)


def _foreign(found: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> Foreign:
    s_in, s_out = _scales(config)
    W_dec = found["decoder.weight"].T.contiguous() * (s_in / s_out)
    b_dec = found["decoder.bias"] if "decoder.bias" in found else W_dec.new_zeros(W_dec.shape[1])
    by_norm = bool(config.get("sparsity_include_decoder_norm", True))
    length = W_dec.norm(dim=1).clamp_min(1e-12) if by_norm else W_dec.new_ones(W_dec.shape[0])
    hook, out = (_hook(config.get(name)) for name in ("hook_point_in", "hook_point_out"))
    transcodes = out is not None and out != hook
    metadata = described(
        "llama_scope",
        folder,
        config,
        reads=hook if transcodes else None,
        writes=out or hook,
        transcodes=transcodes,
        model=config.get("model_name") or _model_of(folder),
    )
    return Foreign(
        W_enc=found["encoder.weight"],
        b_enc=found["encoder.bias"] / s_in,
        W_dec=W_dec,
        b_dec=b_dec / s_out,
        b_in=b_dec / s_in if config.get("apply_decoder_bias_to_pre_encoder") else None,
        activation=_activation(config, length),
        select_by_norm=by_norm and config["act_fn"] == "topk",
        metadata=metadata,
    )


def _activation(config: Mapping[str, Any], length: Tensor) -> Activation:
    """`length` is how much longer latents are when the threshold is applied than before step 2."""
    match config["act_fn"]:
        case "jumprelu":
            return Threshold(theta=float(config["jump_relu_threshold"]) / length)
        case "topk":
            return TopKActivation(k=int(config["top_k"]))
        case _:
            return Relu()


def _scales(config: Mapping[str, Any]) -> tuple[float, float]:
    if config.get("norm_activation", "dataset-wise") == "inference":
        return 1.0, 1.0
    norms, root = config["dataset_average_activation_norm"], math.sqrt(config["d_model"])
    return root / norms["in"], root / norms["out"]


def _problems_of(config: Mapping[str, Any]) -> list[Problem]:
    problems = []
    wanted = {"jumprelu": "jump_relu_threshold", "topk": "top_k", "relu": "d_model"}
    act = config.get("act_fn")
    if act not in wanted:
        problems.append(
            Problem(
                what="unknown activation",
                where="act_fn",
                expected=", ".join(wanted),
                found=str(act),
            )
        )
    numbers = ("d_model", *([wanted[act]] if act in wanted else []))
    problems += [
        Problem(what="not a number", where=name, found=str(config.get(name)))
        for name in numbers
        if not _is_number(config.get(name))
    ]
    mode = config.get("norm_activation", "dataset-wise")
    norms = config.get("dataset_average_activation_norm")
    if mode not in ("dataset-wise", "inference"):
        problems.append(
            Problem(
                what="unknown scaling",
                where="norm_activation",
                expected="dataset-wise, inference",
                found=str(mode),
            )
        )
    elif mode == "dataset-wise" and not (
        isinstance(norms, dict) and all(_is_positive(norms.get(n)) for n in ("in", "out"))
    ):
        problems.append(
            Problem(
                what="not two positive norms",
                where="dataset_average_activation_norm",
                expected='{"in": …, "out": …}',
                found=str(norms),
            )
        )
    if config.get("use_glu_encoder"):
        problems.append(Problem(what="a GLU encoder is not supported", where="use_glu_encoder"))
    return problems


def _hook(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _model_of(folder: Path) -> str | None:
    """From names such as `Llama3_1-8B-Base-L15R-8x`, which the files do not repeat."""
    return "Llama-3.1-8B" if "Llama3_1-8B-Base-L" in folder.absolute().name else None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: object) -> bool:
    return _is_number(value) and value > 0  # type: ignore[operator]  # _is_number has seen to it


FORMATS = {
    "llama_scope": Format(
        read=read_llama_scope, files=("hyperparams.json", "checkpoints/final.safetensors")
    )
}
