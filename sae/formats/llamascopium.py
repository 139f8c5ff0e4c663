"""Llamascopium (OpenMOSS, lm-saes): `config.json` and `sae_weights.safetensors`, and Llama Scope
R1.

| format | tensors |
|---|---|
| llamascopium | `W_E [d_in, latent]`, `b_E`, `W_D [latent, d_out]`, `b_D`; for JumpReLU
`activation_function.log_jumprelu_threshold`; `dataset_average_activation_norm.<hook>` | |
llama_scope_r1 | `encoder.weight [latent, d]`, `encoder.bias`, `decoder.weight [d, latent]`,
`decoder.bias`, `log_jumprelu_threshold`; its scale is in no file (sae/formats/conventions.py) |

    x' = x s_in;   pre = x' W_E + b_E;   z = activation(pre);   x̂ = (z W_D + b_D) / s_out

`norm_activation`: "dataset-wise" gives s = √d / average norm of each hook, "token-wise" each
token's own, "inference" 1. With `sparsity_include_decoder_norm` latents are chosen by pre · row
length. Thresholds are exp(log θ), compared in the scaled space; the package's own two ways of
folding treat them differently, so the scale is applied here, not imitated. Cross-layer transcoders,
crosscoders, Lorsa and MoLT are refused by name, and so is a GLU encoder.
"""  # one row of a table is one line

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from featureflow.errors import Problem, UserError
from sae.activations import Activation, Relu, Threshold, TopKActivation
from sae.formats.base import Format, described, has
from sae.formats.folding import Foreign, row_lengths
from sae.formats.normalised import ConstantNorm
from sae.formats.tensors import Shape, checked, read_json, read_safetensors

_CONFIG, _WEIGHTS = "config.json", "sae_weights.safetensors"
_THRESHOLD = "activation_function.log_jumprelu_threshold"
_NORM = "dataset_average_activation_norm"
_ACTIVATIONS = ("relu", "jumprelu", "topk")
_NORMALISATIONS = ("dataset-wise", "token-wise", "inference")


def read_llamascopium(folder: Path, variant: str | None = None) -> Foreign:
    config = read_json(folder / _CONFIG)
    file = folder / _WEIGHTS
    tensors = read_safetensors(file)
    hooks = [config.get(name) for name in ("hook_point_in", "hook_point_out")]
    if problems := _problems_of(config, tensors, hooks):
        raise UserError(f"{folder} cannot be used", problems=tuple(problems))
    shapes: dict[str, Shape] = {
        "W_E": ("d_in", "latent"),
        "b_E": ("latent",),
        "W_D": ("latent", "d_out"),
        "b_D": ("d_out",),
    }
    if config["act_fn"] == "jumprelu":
        shapes[_THRESHOLD] = ("latent",)
    sizes = {"d_in": int(config["d_model"]), "d_out": int(config["d_model"])}
    optional = frozenset() if config.get("use_decoder_bias", True) else frozenset({"b_D"})
    found = checked(
        tensors, shapes, where=file, sizes=sizes, optional=optional, only=frozenset({_THRESHOLD})
    )
    by_norm = bool(config.get("sparsity_include_decoder_norm", True))
    length = row_lengths(found["W_D"]) if by_norm else found["b_E"].new_ones(len(found["b_E"]))
    s_in, s_out = (_scale_of(config, tensors, str(hook)) for hook in hooks)
    transcodes = hooks[0] != hooks[1]
    return Foreign(
        W_enc=found["W_E"].T.contiguous(),
        b_enc=found["b_E"],
        W_dec=found["W_D"],
        b_dec=found.get("b_D", found["W_D"].new_zeros(found["W_D"].shape[1])),
        activation=_activation(config, found, length),
        input_scale=s_in,
        output_scale=s_out,
        normalisation=ConstantNorm() if config["norm_activation"] == "token-wise" else None,
        select_by_norm=by_norm and config["act_fn"] == "topk",
        metadata=described(
            "llamascopium",
            folder,
            _plain(config),
            reads=hooks[0] if transcodes else None,
            writes=hooks[1],
            transcodes=transcodes,
            model=config.get("model_name"),
            l0=config.get("top_k") if config["act_fn"] == "topk" else None,
        ),
    )


def read_llama_scope_r1(folder: Path, variant: str | None = None) -> Foreign:
    config = read_json(folder / _CONFIG)
    file = folder / _WEIGHTS
    shapes: dict[str, Shape] = {
        "encoder.weight": ("latent", "d_in"),
        "encoder.bias": ("latent",),
        "decoder.weight": ("d_in", "latent"),
        "decoder.bias": ("d_in",),
        "log_jumprelu_threshold": ("latent",),
    }
    sizes = {"d_in": config["d_model"]} if isinstance(config.get("d_model"), int) else {}
    found = checked(read_safetensors(file), shapes, where=file, sizes=sizes)
    hook = config.get("hook_point_in")
    inference = config.get("norm_activation") == "inference"
    return Foreign(
        W_enc=found["encoder.weight"],
        b_enc=found["encoder.bias"],
        W_dec=found["decoder.weight"].T.contiguous(),
        b_dec=found["decoder.bias"],
        activation=Threshold(theta=found["log_jumprelu_threshold"].exp()),
        input_scale=1.0 if inference else None,
        output_scale=1.0 if inference else None,
        metadata=described(
            "llama_scope_r1",
            folder,
            _plain(config),
            writes=hook if isinstance(hook, str) else None,
            model=config.get("model_name"),
        ),
    )


def _problems_of(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], hooks: list[Any]
) -> list[Problem]:
    wanted = {
        "sae_type": ("sae", "transcoder"),
        "act_fn": _ACTIVATIONS,
        "norm_activation": _NORMALISATIONS,
    }
    problems = [
        Problem(
            what="not supported",
            where=f"{_CONFIG}: {name}",
            expected=", ".join(known),
            found=str(config.get(name)),
        )
        for name, known in wanted.items()
        if config.get(name, "sae" if name == "sae_type" else None) not in known
    ]
    numbers = ("d_model", *(("top_k",) if config.get("act_fn") == "topk" else ()))
    problems += [
        Problem(what="not a positive number", where=f"{_CONFIG}: {name}", found=str(config[name]))
        if name in config
        else Problem(what="missing", where=f"{_CONFIG}: {name}")
        for name in numbers
        if not isinstance(config.get(name), (int, float)) or not config[name] > 0
    ]
    if "W_E_glu" in tensors or config.get("use_glu_encoder"):
        problems.append(Problem(what="a GLU encoder is not supported", where="W_E_glu"))
    if not all(isinstance(hook, str) for hook in hooks):
        found = ", ".join(map(str, hooks))
        problems.append(Problem(what="missing", where="hook_point_in, hook_point_out", found=found))
    elif config.get("norm_activation") == "token-wise" and hooks[0] != hooks[1]:
        problems.append(
            Problem(
                what="a transcoder of normalised tokens is not supported",
                where=f"{_CONFIG}: norm_activation",
                expected="dataset-wise, inference",
                found="token-wise",
            )
        )
    elif config.get("norm_activation") == "dataset-wise":
        problems += [
            Problem(what="missing, or not a positive number", where=f"{_NORM}.{hook}")
            for hook in dict.fromkeys(hooks)
            if not _norm_of(tensors, hook) > 0
        ]
    return problems


def _norm_of(tensors: Mapping[str, Tensor], hook: str) -> float:
    norm = tensors.get(f"{_NORM}.{hook}")
    value = float(norm) if norm is not None and norm.numel() == 1 else math.nan
    return value if math.isfinite(value) else math.nan


def _scale_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], hook: str) -> float:
    if config["norm_activation"] != "dataset-wise":
        return 1.0
    return math.sqrt(config["d_model"]) / _norm_of(tensors, hook)


def _activation(
    config: Mapping[str, Any], found: Mapping[str, Tensor], length: Tensor
) -> Activation:
    """A threshold on pre · length is θ / length on pre."""
    if config["act_fn"] == "jumprelu":
        return Threshold(theta=found[_THRESHOLD].exp() / length)
    return TopKActivation(k=int(config["top_k"])) if config["act_fn"] == "topk" else Relu()


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if isinstance(value, (str, int, float))}


FORMATS = {
    "llamascopium": Format(
        read=read_llamascopium, files=(_CONFIG, _WEIGHTS), fits=has("W_E", "W_D")
    ),
    "llama_scope_r1": Format(
        read=read_llama_scope_r1,
        files=(_CONFIG, _WEIGHTS),
        fits=has("encoder.weight", "log_jumprelu_threshold"),
    ),
}
