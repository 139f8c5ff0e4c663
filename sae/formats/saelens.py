"""SAELens (version 6, and the flat configuration of 1 to 5): `cfg.json` and
`sae_weights.safetensors`, both ways.

Reading, by architecture (`pre = (x − b_dec if apply_b_dec_to_input) W_enc + b_enc`, matrices stored
[in, out]; each also as `transcoder` and `skip_transcoder`, without the subtraction):

| architecture | z |
|---|---|
| standard | relu(pre) |
| topk | topk(relu(pre)); by decoder norm: of pre · row length, decoded by unit rows |
| jumprelu | relu(pre) · (pre > threshold) |
| batchtopk, matryoshka_batchtopk | relu(pre) · (pre > topk_threshold), `pre` rescaled as for topk |
| gated | (pre + b_gate > 0) · relu(exp(r_mag) pre + b_mag), no b_enc |

A flat configuration names its hook `hook_name` or `hook_point`, and TopK by `activation_fn_str` or
`activation_fn` with its k in `activation_fn_kwargs`. Activations scaled by
`expected_average_only_in` are folded when `activation_scaler.json` or the conventions have the
scale; layer norm and constant norm depend on the token (sae/formats/normalised.py); whitening is
refused.

Writing chooses topk, jumprelu, standard or gated (or their transcoders) by the activation; latents
and reconstructions are the same there. SAELens 6 has no TopK transcoder: those are written for
sparsify (sae/formats/sparsify.py). Layouts of SAELens 6.54.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import Command, Problem, UserError
from featureflow.files import write_text_atomically
from sae.activations import Activation, Gated, Relu, Threshold, TopKActivation
from sae.dictionary import Sae
from sae.formats.base import Format, described
from sae.formats.folding import Foreign, full_like_latents, row_lengths
from sae.formats.normalised import ConstantNorm, LayerNorm, Normalisation, NormalisedSae
from sae.formats.tensors import Shape, checked, read_json, read_safetensors, write_tensors

CONFIG, WEIGHTS, SPARSITY, SCALER = (
    "cfg.json",
    "sae_weights.safetensors",
    "sparsity.safetensors",
    "activation_scaler.json",
)
HISTORY = "featureflow"  # the key below SAELens' metadata that says how we trained
_HISTORY_FIELDS = (
    "architecture",
    "initialisation",
    "schedule",
    "steps",
    "batch_size",
    "learning_rate",
)
_RELU = ("standard", "transcoder", "skip_transcoder")
_JUMP = ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_BATCH = ("batchtopk", "matryoshka_batchtopk")
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_FUNCTIONS = ("relu", "topk")
_COMPUTING = frozenset({"W_skip", "threshold", "b_gate", "b_mag", "r_mag"})
"""Tensors that only some architectures have and that change what is computed."""
_ARCHITECTURES = (*_RELU, "topk", *_JUMP, *_BATCH, "gated")
_NORMALISATIONS: dict[str, Normalisation] = {
    "layer_norm": LayerNorm(),
    "constant_norm_rescale": ConstantNorm(),
}


def read_saelens(folder: Path, variant: str | None = None) -> Foreign:
    config = _modern(read_json(folder / CONFIG))
    if problems := tuple(_problems_of(config)):
        raise UserError(f"{folder / CONFIG} cannot be used", problems=problems)
    architecture = config["architecture"]
    sizes = {
        name: config[key]
        for name, key in (("d_in", "d_in"), ("latent", "d_sae"))
        if isinstance(config.get(key), int)
    }
    file = folder / WEIGHTS
    tensors = read_safetensors(file)
    _check_scaling_factor(tensors, file)
    shapes = _shapes(architecture, config)
    found = checked(tensors, shapes, where=file, sizes=sizes, only=_COMPUTING)
    is_scaled = config["normalize_activations"] == "expected_average_only_in"
    scale = _input_scale(folder) if is_scaled else 1.0
    subtracts = config["apply_b_dec_to_input"] and "transcoder" not in architecture
    return Foreign(
        W_enc=found["W_enc"].T.contiguous(),
        b_enc=found["b_gate"] if architecture == "gated" else found["b_enc"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        b_in=found["b_dec"] if subtracts else None,
        activation=_activation(config, found),
        W_skip=found.get("W_skip"),
        input_scale=scale,
        output_scale=scale,
        centred=_is_centred(config),
        normalisation=_NORMALISATIONS.get(config["normalize_activations"]),
        select_by_norm=_selects_by_norm(config),
        metadata=_described(folder, config),
    )


def write_saelens(
    sae: Sae,
    folder: str | Path,
    *,
    model_name: str | None = None,
    hook_name: str | None = None,
    firing_rates: Float[Tensor, "latent"] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `SAE.load_from_disk` of SAELens ≥ 6 opens. `hook_name` defaults to the
    dictionary's site; `metadata` is added to SAELens' metadata (context_size, prepend_bos, …). How
    it was trained goes along under `featureflow`, which SAELens keeps and `read` gives back: the
    linker needs to know the start. Raises UserError where SAELens has no such architecture."""
    if isinstance(sae, NormalisedSae):
        raise UserError(
            "SAELens files of token-normalised dictionaries are not written",
            expected="a plain dictionary",
        )
    architecture, tensors, extra = _exported(sae)
    config = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.n_latents,
        "dtype": str(sae.dtype).removeprefix("torch."),
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        **extra,
        "metadata": {
            "sae_lens_version": "6.0.0",  # the layout's version; below 6 SAELens would convert it
            "sae_lens_training_version": None,
            "model_name": model_name or sae.metadata.get("model"),
            "hook_name": hook_name or sae.metadata.get("reads") or sae.metadata.get("site"),
            **({"hook_name_out": sae.metadata["site"]} if "reads" in sae.metadata else {}),
            "training_architecture": _trained_as(sae) or architecture,
            "written_by": "featureflow",
            HISTORY: {name: sae.metadata[name] for name in _HISTORY_FIELDS if name in sae.metadata},
            **dict(metadata or {}),
        },
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if firing_rates is not None:
        sparsity = torch.log10(firing_rates.float().clamp_min(1e-10))
        write_tensors({"sparsity": sparsity}, folder / SPARSITY)
    write_tensors(tensors, folder / WEIGHTS)
    text = json.dumps(config, indent=1, ensure_ascii=False) + "\n"
    write_text_atomically(folder / CONFIG, text)


def _trained_as(sae: Sae) -> str | None:
    found = sae.metadata.get("architecture")
    return found.get("kind") if isinstance(found, dict) else found


def _exported(sae: Sae) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """Architecture, tensors and further configuration keys."""
    transcodes = "reads" in sae.metadata or sae.W_skip is not None or sae.d_in != sae.d_out
    subtracts = not transcodes and torch.equal(sae.b_in, sae.b_dec)
    b_enc = sae.b_enc if subtracts else sae.b_enc - sae.W_enc @ sae.b_in
    tensors = {"W_enc": sae.W_enc.T, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    extra: dict[str, Any] = {"apply_b_dec_to_input": subtracts}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    if transcodes:
        extra["d_out"] = sae.d_out
    kind = sae.activation
    suffix = "" if not transcodes else "skip_transcoder" if sae.W_skip is not None else "transcoder"
    if isinstance(kind, Relu):
        return suffix or "standard", {**tensors, "b_enc": b_enc}, extra
    if isinstance(kind, Threshold):
        name = f"jumprelu_{suffix}" if suffix else "jumprelu"
        return name, {**tensors, "b_enc": b_enc, "threshold": kind.theta}, extra
    if transcodes:
        raise UserError(
            "SAELens has no such transcoder",
            expected="ReLU or thresholds",
            found=kind.kind,
            fix=Command("sae", "convert", to="sparsify"),
        )
    if isinstance(kind, TopKActivation):
        return (
            "topk",
            {**tensors, "b_enc": b_enc},
            {**extra, "k": kind.k, "rescale_acts_by_decoder_norm": False},
        )
    if not isinstance(kind, Gated):
        raise UserError("SAELens has no such activation", found=kind.kind)
    if not (kind.gain > 0).all():
        raise UserError("SAELens stores the logarithm of a gate's gain", expected="gains above 0")
    return (
        "gated",
        {**tensors, "b_gate": b_enc, "r_mag": kind.gain.log(), "b_mag": _b_mag(kind, b_enc)},
        extra,
    )


def _b_mag(gate: Gated, b_gate: Float[Tensor, "latent"]) -> Float[Tensor, "latent"]:
    """The bias of the magnitude path, which SAELens adds to `exp(r_mag) x W_enc` without the gate's
    bias."""
    return gate.offset + gate.gain * b_gate


def _activation(config: Mapping[str, Any], found: Mapping[str, Tensor]) -> Activation:
    architecture = config["architecture"]
    if architecture in _JUMP:
        return Threshold(theta=found["threshold"].clamp_min(0))
    if architecture in _BATCH:
        theta = full_like_latents(max(float(found["topk_threshold"]), 0.0), found["W_enc"].T)
        return Threshold(
            theta=theta / row_lengths(found["W_dec"]) if _selects_by_norm(config) else theta
        )
    if architecture == "topk":
        return TopKActivation(k=config["k"])
    if architecture == "gated":
        gain = found["r_mag"].exp()
        return Gated(gain=gain, offset=found["b_mag"] - gain * found["b_gate"])
    return Relu()


def _selects_by_norm(config: Mapping[str, Any]) -> bool:
    """Whether latents are chosen by pre-activation times decoder row length; absent, it is so while
    training only."""
    if config["architecture"] not in ("topk", *_BATCH):
        return False
    return bool(config.get("rescale_acts_by_decoder_norm", config["architecture"] in _BATCH))


def _shapes(architecture: str, config: Mapping[str, Any]) -> dict[str, Shape]:
    d_out = "d_out" if "transcoder" in architecture else "d_in"
    shapes: dict[str, Shape] = {
        "W_enc": ("d_in", "latent"),
        "W_dec": ("latent", d_out),
        "b_dec": (d_out,),
    }
    names = ("b_gate", "b_mag", "r_mag") if architecture == "gated" else ("b_enc",)
    shapes |= dict.fromkeys(names, ("latent",))
    if architecture in _JUMP:
        shapes["threshold"] = ("latent",)
    if architecture in _BATCH:
        shapes["topk_threshold"] = ()
    if "skip" in architecture:
        shapes["W_skip"] = (d_out, "d_in")
    return shapes


def _modern(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of version 6; a flat one is renamed, and names its activation apart from
    its architecture."""
    config = {_RENAMED.get(name, name): value for name, value in config.items()}
    config.setdefault("architecture", "standard")
    config.setdefault("apply_b_dec_to_input", True)
    if config.get("activation_fn") == "topk" and config["architecture"] == "standard":
        config["architecture"] = "topk"
    if config["architecture"] == "topk":
        config.setdefault("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    mode = config.get("normalize_activations")
    named = {True: "expected_average_only_in", False: "none", None: "none"}
    config["normalize_activations"] = named.get(mode, mode) if not isinstance(mode, list) else mode
    return config


def _facts(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the file says about where it was trained: `metadata`, before version 6 the whole."""
    inner = config.get("metadata")
    return {**config, **inner} if isinstance(inner, Mapping) else config


def _is_centred(config: Mapping[str, Any]) -> bool | None:
    """Whether the stream was centred. Version 6 loads models unprocessed unless told otherwise;
    before it GPT-2 files say nothing, and both occur."""
    facts = _facts(config)
    options = facts.get("model_from_pretrained_kwargs")
    if isinstance(options, Mapping) and "center_writing_weights" in options:
        return bool(options["center_writing_weights"])
    is_old = not isinstance(config.get("metadata"), Mapping)
    is_gpt2 = str(facts.get("model_name") or "").rpartition("/")[2].startswith("gpt2")
    normed = config["normalize_activations"] == "layer_norm"  # which takes the mean away anyway
    return None if is_old and is_gpt2 and not normed else False


def _check_scaling_factor(tensors: Mapping[str, Tensor], file: Path) -> None:
    factor = tensors.get("scaling_factor")
    if factor is not None and not torch.allclose(factor.float(), torch.ones(())):
        raise UserError(
            "fine-tuned scaling is not supported",
            where=f"{file}: scaling_factor",
            expected="ones",
            found=f"{float(factor.min()):.3g} to {float(factor.max()):.3g}",
        )


def _problems_of(config: Mapping[str, Any]) -> list[Problem]:
    problems = []
    if config["architecture"] not in _ARCHITECTURES:
        problems.append(
            Problem(
                what="architecture not supported",
                where="architecture",
                expected=", ".join(_ARCHITECTURES),
                found=str(config["architecture"]),
            )
        )
    function = config.get("activation_fn")
    if function is not None and function not in _FUNCTIONS:
        problems.append(
            Problem(
                what="activation not supported",
                where="activation_fn",
                expected=", ".join(_FUNCTIONS),
                found=str(function),
            )
        )
    if _facts(config).get("hook_head_index") is not None:
        found = str(_facts(config)["hook_head_index"])
        problems.append(
            Problem(what="one head alone is not a site", where="hook_head_index", found=found)
        )
    k = config.get("k")
    if config["architecture"] == "topk" and (
        not isinstance(k, int) or isinstance(k, bool) or k < 1
    ):
        problems.append(Problem(what="not a positive integer", where="k", found=str(k)))
    modes = ("none", "expected_average_only_in", *_NORMALISATIONS)
    if config["normalize_activations"] not in modes:
        problems.append(
            Problem(
                what="normalisation not supported",
                where="normalize_activations",
                expected=", ".join(modes),
                found=str(config["normalize_activations"]),
            )
        )
    if config.get("finetuning_scaling_factor"):
        problems.append(
            Problem(what="fine-tuned scaling is not supported", where="finetuning_scaling_factor")
        )
    return problems


def _input_scale(folder: Path) -> float | None:
    """The scale of a training checkpoint. Finished SAELens dictionaries have it folded and say
    "none"."""
    path = folder / SCALER
    if not path.is_file():
        return None
    scale = read_json(path).get("scaling_factor")
    if not isinstance(scale, (int, float)) or not scale > 0:
        raise UserError("not a positive number", where=f"{path}: scaling_factor", found=str(scale))
    return float(scale)


def _described(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    facts = _facts(config)
    hook, out = (_text(facts.get(name)) for name in ("hook_name", "hook_name_out"))
    transcodes = "transcoder" in config["architecture"] or (out is not None and out != hook)
    metadata = described(
        "saelens",
        folder,
        {"architecture": config["architecture"]},
        reads=hook if transcodes else None,
        writes=out if transcodes else hook,
        transcodes=transcodes,
        model=facts.get("model_name"),
        l0=config.get("k") if config["architecture"] == "topk" else None,
    )
    history = facts.get(HISTORY)
    if isinstance(history, Mapping):
        metadata |= {
            name: history[name]
            for name in _HISTORY_FIELDS
            if isinstance(history.get(name), (dict, int, float))
        }
    return metadata


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


FORMATS = {"saelens": Format(read=read_saelens, files=(CONFIG, WEIGHTS))}
