"""EleutherAI sparsify: `<hookpoint>/cfg.json` and `sae.safetensors`, turned into the inference
form.

Tensors: `encoder.weight [latent, d_in]`, `encoder.bias`, `W_dec [latent, d_out]`, `b_dec`, `W_skip
[d_out, d_in]` with `skip_connection`. `z = topk(relu(encoder(x − b_dec)))`, without the subtraction
for transcoders; `x̂ = Σ z_i W_dec[i] + b_dec + W_skip x`. Layout of sparsify 1.3.3. Cost: one pass
over the tensors. `write_sparsify` writes the same two files for TopK dictionaries, transcoders with
and without a skip connection among them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from featureflow.errors import Problem, UserError
from featureflow.files import write_text_atomically
from sae.activations import TopKActivation
from sae.dictionary import Sae
from sae.formats.base import Format, config_beside, described
from sae.formats.folding import Foreign
from sae.formats.tensors import Shape, checked, read_json, read_safetensors, write_tensors


def read_sparsify(folder: Path, variant: str | None = None) -> Foreign:
    config = read_json(folder / "cfg.json")
    k, skips, transcodes = (
        config.get("k"),
        bool(config.get("skip_connection")),
        bool(config.get("transcode")),
    )
    if problems := tuple(_problems_of(config)):
        raise UserError(
            f"{folder / 'cfg.json'} is not a sparsify dictionary that can be used here",
            problems=problems,
        )
    shapes: dict[str, Shape] = {
        "encoder.weight": ("latent", "d_in"),
        "encoder.bias": ("latent",),
        "W_dec": ("latent", "d_out"),
        "b_dec": ("d_out",),
    }
    if skips:
        shapes["W_skip"] = ("d_out", "d_in")
    sizes = {"d_in": int(config["d_in"])} if "d_in" in config else {}
    file = folder / "sae.safetensors"
    found = checked(read_safetensors(file), shapes, where=file, sizes=sizes, only=True)
    return Foreign(
        W_enc=found["encoder.weight"],
        b_enc=found["encoder.bias"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        b_in=None if transcodes else found["b_dec"],
        activation=TopKActivation(k=int(k)),  # type: ignore[arg-type]  # _problems_of has seen that it is an int
        W_skip=found.get("W_skip"),
        metadata=_described(folder, config),
    )


def write_sparsify(sae: Sae, folder: str | Path) -> None:
    """Write a folder that `SparseCoder.load_from_disk` of sparsify opens. Its transcoders are as
    wide at the output as at the input, and only SAEs subtract b_dec. Raises UserError for what it
    cannot hold."""
    transcodes = "reads" in sae.metadata or sae.W_skip is not None
    problems = []
    if type(sae) is not Sae or not isinstance(sae.activation, TopKActivation):
        found = f"{type(sae).__name__} with {sae.activation.kind}"
        problems.append(Problem(what="not a TopK dictionary", expected="topk", found=found))
    if sae.d_in != sae.d_out:
        found = f"{sae.d_in} in, {sae.d_out} out"
        problems.append(Problem(what="input and output are not equally wide", found=found))
    if problems:
        raise UserError("sparsify has no such dictionary", problems=tuple(problems))
    b_enc = sae.b_enc + sae.W_enc @ ((0 if transcodes else sae.b_dec) - sae.b_in)
    tensors = {"encoder.weight": sae.W_enc, "encoder.bias": b_enc}
    tensors |= {"W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    config = {
        "activation": "topk",
        "d_in": sae.d_in,
        "num_latents": sae.n_latents,
        "k": sae.activation.k,  # type: ignore[attr-defined]  # seen to be TopK above
        "expansion_factor": max(1, sae.n_latents // sae.d_in),
        "normalize_decoder": bool(sae.metadata.get("unit_decoder", True)),
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": transcodes,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.float() for name, tensor in tensors.items()}
    write_tensors(weights, folder / "sae.safetensors")
    write_text_atomically(folder / "cfg.json", json.dumps(config, indent=1) + "\n")


def _problems_of(config: dict[str, Any]) -> list[Problem]:
    problems = []
    k = config.get("k")
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        problems.append(Problem(what="not a positive integer", where="k", found=str(k)))
    if config.get("activation", "topk") != "topk":
        problems.append(
            Problem(
                what="activation not supported",
                where="activation",
                expected="topk",
                found=str(config["activation"]),
            )
        )
    if config.get("signed"):
        problems.append(
            Problem(
                what="signed latents are not supported",
                where="signed",
                expected="false",
                found="true",
            )
        )
    return problems


def _described(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Its hookpoints are named after Hugging Face modules: `layers.6` is the residual stream after
    block 6. A transcoder goes from the input of a module to its output."""
    hook = folder.absolute().name
    transcodes = bool(config.get("transcode"))
    whole = config_beside(folder, "config.json", read_json)
    return described(
        "sparsify",
        folder,
        config,
        reads=f"{hook}.input" if transcodes else None,
        writes=f"{hook}.output" if transcodes else hook,
        transcodes=transcodes,
        model=whole.get("model"),
        l0=config.get("k"),
    )


FORMATS = {"sparsify": Format(read=read_sparsify, files=("cfg.json", "sae.safetensors"))}
