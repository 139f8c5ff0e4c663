"""circuit-tracer's per-layer transcoders: `config.yaml` and one `layer_{i}.safetensors` a layer,
both ways.

`layer_{i}.safetensors`: `W_enc [latent, d]`, `W_dec [latent, d]`, `b_enc`, `b_dec`; with
`activation_function.threshold [latent]` JumpReLU, with `activation: topk` and `k` in the
configuration the k largest pre-activations, else ReLU; with `W_skip [d, d]` x·W_skipᵀ is added.
`b_dec` is not subtracted. `config.yaml`: `model_kind: transcoder_set`, `model_name`,
`feature_input_hook` and `feature_output_hook` within a block, `scan`, and `transcoders`: the files
in the order of layers, where they are called otherwise.

`write_circuit_tracer` writes a whole set; layers 0, 1, … must all be there. circuit-tracer 0.5
reads no `activation` from the configuration and would open a TopK set as ReLU. Such a set is
refused: `with_threshold` (sae/calibration.py) gives it thresholds that circuit-tracer applies,
sparsify's form (sae/formats/sparsify.py) keeps the k. TopK keeps negative values among its k in
circuit-tracer; latents here are never negative, see `read_circuit_tracer`.
Layout of circuit-tracer 0.5.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from featureflow.errors import Problem, UserError
from featureflow.files import write_text_atomically
from featureflow.sites import Site, parse_site
from sae.activations import Activation, Relu, Threshold, TopKActivation
from sae.dictionary import Sae
from sae.formats.base import Format, Shapes, config_beside, described
from sae.formats.folding import Foreign
from sae.formats.tensors import Shape, checked, read_safetensors, read_yaml, write_tensors

CONFIG, KIND = "config.yaml", "transcoder_set"
THRESHOLD = "activation_function.threshold"
_SHAPES: dict[str, Shape] = {
    "W_enc": ("latent", "d_in"),
    "b_enc": ("latent",),
    "W_dec": ("latent", "d_out"),
    "b_dec": ("d_out",),
    THRESHOLD: ("latent",),
    "W_skip": ("d_out", "d_in"),
}


def read_circuit_tracer(file: Path, variant: str | None = None) -> Foreign:
    """One layer. A TopK's negative values, which circuit-tracer keeps, are read as zeros: they
    occur only where fewer than k pre-activations are positive."""
    config = config_beside(file, CONFIG, read_yaml)
    if problems := _problems_of(config):
        raise UserError(f"{file.parent / CONFIG} cannot be used", problems=tuple(problems))
    optional = frozenset({THRESHOLD, "W_skip"})
    found = checked(read_safetensors(file), _SHAPES, where=file, optional=optional, only=True)
    layer = _layer_of(file, config)
    hooks = [config.get(f"feature_{end}_hook") for end in ("input", "output")]
    reads, writes = (
        f"blocks.{layer}.{hook}" if isinstance(hook, str) and layer is not None else None
        for hook in hooks
    )
    return Foreign(
        W_enc=found["W_enc"],
        b_enc=found["b_enc"],
        W_dec=found["W_dec"],
        b_dec=found["b_dec"],
        activation=_activation(config, found),
        W_skip=found.get("W_skip"),
        metadata=described(
            "circuit_tracer",
            file,
            {name: config[name] for name in ("scan",) if isinstance(config.get(name), str)},
            reads=reads,
            writes=writes,
            transcodes=True,
            model=config.get("model_name"),
            l0=config.get("k"),
            notes=_notes(config),
        ),
    )


def write_circuit_tracer(
    saes: Mapping[Site, Sae],
    folder: str | Path,
    *,
    model_name: str | None = None,
    scan: str = "featureflow",
) -> None:
    """Write transcoders, by their output site, as a set that `load_transcoder_set` opens. Raises
    UserError with everything that a set cannot hold."""
    sites = sorted(saes)
    if problems := tuple(_problems_of_set(saes)):
        fix = None
        if any(isinstance(sae.activation, TopKActivation) for sae in saes.values()):
            fix = "featureflow sae convert … --to circuit_tracer --run RUN fits the thresholds"
        raise UserError("these are no transcoder set of circuit-tracer", problems=problems, fix=fix)
    first = saes[sites[0]]
    reads = parse_site(first.metadata["reads"])
    config = {
        "model_kind": KIND,
        "model_name": model_name or first.metadata.get("model"),
        "feature_input_hook": reads.name.split(".", 2)[2],
        "feature_output_hook": sites[0].name.split(".", 2)[2],
        "scan": scan,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for site in sites:
        write_tensors(_tensors_of(saes[site]), folder / f"layer_{site.layer}.safetensors")
    write_text_atomically(folder / CONFIG, yaml.safe_dump(config, sort_keys=False))


def _tensors_of(sae: Sae) -> dict[str, Tensor]:
    tensors = {
        "W_enc": sae.W_enc,
        "b_enc": sae.b_enc - sae.W_enc @ sae.b_in,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    if isinstance(sae.activation, Threshold):
        tensors[THRESHOLD] = sae.activation.theta
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    return {name: tensor.float() for name, tensor in tensors.items()}


def _problems_of_set(saes: Mapping[Site, Sae]) -> list[Problem]:
    layers = sorted(site.layer for site in saes)
    problems = []
    if layers != list(range(len(layers))) or not layers:
        found = ", ".join(map(str, layers)) or "none"
        problems.append(
            Problem(what="not every layer", expected="one each of 0, 1, 2, …", found=found)
        )
    activations = {sae.activation.kind for sae in saes.values()}
    if len(activations) > 1:
        found = ", ".join(sorted(activations))
        problems.append(Problem(what="several activations", expected="one", found=found))
    ends = {(_kind(sae.metadata.get("reads")), site.kind) for site, sae in saes.items()}
    if len(ends) > 1:
        found = ", ".join(f"{a} → {b}" for a, b in sorted(ends))
        problems.append(Problem(what="several inputs or outputs", expected="one", found=found))
    for site, sae in saes.items():
        what = None
        if isinstance(sae.activation, TopKActivation):
            what = "circuit-tracer 0.5 opens a TopK as ReLU: it needs thresholds, or another form"
        elif type(sae) is not Sae or not isinstance(sae.activation, Relu | Threshold):
            what = f"a {type(sae).__name__} with activation {sae.activation.kind} is not held"
        elif "reads" not in sae.metadata:
            what = "not a transcoder that says what it reads"
        elif sae.d_in != sae.d_out:
            what = f"input and output are not equally wide: {sae.d_in}, {sae.d_out}"
        problems += [Problem(what=what, where=site.short)] if what else []
    return problems


def _kind(name: str | None) -> str:
    return "unknown" if name is None else parse_site(name).kind


def _problems_of(config: Mapping[str, Any]) -> list[Problem]:
    problems = []
    if config and config.get("model_kind", KIND) != KIND:
        problems.append(
            Problem(
                what="not a set of per-layer transcoders",
                where="model_kind",
                expected=KIND,
                found=str(config["model_kind"]),
            )
        )
    activation, k = config.get("activation"), config.get("k")
    if activation not in (None, "relu", "topk", "jumprelu"):
        problems.append(
            Problem(
                what="unknown activation",
                where="activation",
                expected="relu, topk, jumprelu",
                found=str(activation),
            )
        )
    if activation == "topk" and (not isinstance(k, int) or isinstance(k, bool) or k < 1):
        problems.append(Problem(what="not a positive integer", where="k", found=str(k)))
    return problems


def _activation(config: Mapping[str, Any], found: Mapping[str, Tensor]) -> Activation:
    if THRESHOLD in found:
        return Threshold(theta=found[THRESHOLD].clamp_min(0))
    return TopKActivation(k=config["k"]) if config.get("activation") == "topk" else Relu()


def _notes(config: Mapping[str, Any]) -> list[str]:
    notes = [] if config else ["no config.yaml beside it: input, output and model are unknown"]
    if config.get("activation") == "topk":
        notes.append(
            "circuit-tracer keeps negative values among its k largest; they are zeros here"
        )
    return notes


def _layer_of(file: Path, config: Mapping[str, Any]) -> int | None:
    """From the place in the list of files, else from the name."""
    named = config.get("transcoders")
    names = [str(name).rpartition("/")[2] for name in named] if isinstance(named, list) else []
    if names.count(file.name) == 1:
        return names.index(file.name)
    match = re.search(r"layer_(\d+)", file.name)
    return int(match[1]) if match else None


def _fits(shapes: Shapes) -> bool:
    return {"W_enc", "W_dec", "b_enc", "b_dec"} <= set(shapes) and "threshold" not in shapes


FORMATS = {
    "circuit_tracer": Format(
        read=read_circuit_tracer, lone=("*.safetensors",), many="layer_*.safetensors", fits=_fits
    )
}
