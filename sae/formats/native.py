"""The native form of a dictionary on disk: a folder with `sae.safetensors` and `sae.json`.

`sae.json` says what the tensors mean and is written last; nothing in either file executes on load.
Normative description: docs/formats.md. Reading costs one pass over the tensors, to refuse NaN and
infinity. A dictionary of normalised tokens (sae/formats/normalised.py) is version 2: its
`normalisation` is part of the description, so that no older reader drops it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from featureflow.errors import Problem, UserError
from featureflow.files import write_text_atomically
from sae.activations import Activation, activations, describe, tensors_of
from sae.dictionary import Sae
from sae.formats.base import Format
from sae.formats.normalised import NormalisedSae, normalisation_of
from sae.formats.tensors import write_tensors

FORMAT, VERSION, VERSION_NORMALISED = "featureflow-sae", 1, 2
WEIGHTS, DESCRIPTION = "sae.safetensors", "sae.json"
_ALWAYS = ("W_enc", "b_enc", "W_dec", "b_dec", "b_in")


def save_sae(sae: Sae, folder: str | Path) -> None:
    """Write `sae` into `folder`, which is made. Each file is written beside and renamed, the
    description last."""
    normalised = isinstance(sae, NormalisedSae)
    if not (sae.raw_units if isinstance(sae, NormalisedSae) else type(sae) is Sae):
        raise UserError(
            f"the native form cannot hold a {type(sae).__name__} with latents in a peer's units",
            expected="a dictionary with latents in units of the activation",
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(sae, name) for name in _ALWAYS}
    tensors |= {f"activation.{name}": tensor for name, tensor in tensors_of(sae.activation).items()}
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip
    description = {
        "format": FORMAT,
        "version": VERSION_NORMALISED if normalised else VERSION,
        "n_latents": sae.n_latents,
        "d_in": sae.d_in,
        "d_out": sae.d_out,
        "activation": describe(sae.activation),
        "metadata": sae.metadata,
    }
    if isinstance(sae, NormalisedSae):
        description["normalisation"] = asdict(sae.normalisation)
    text = json.dumps(description, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_tensors(tensors, folder / WEIGHTS)
    write_text_atomically(folder / DESCRIPTION, text)


def load_sae(folder: str | Path, *, device: str | torch.device = "cpu") -> Sae:
    """Read a dictionary. Raises UserError with every missing, misshaped or non-finite tensor."""
    folder = Path(folder)
    description = _read_description(folder)
    tensors = _read_tensors(folder)
    if problems := tuple(_problems_of(description, tensors)):
        raise UserError(
            f"{folder} is not a usable dictionary",
            problems=problems,
            fix="train or export it again",
        )
    sae = Sae(
        **{name: tensors[name] for name in _ALWAYS},
        W_skip=tensors.get("W_skip"),
        activation=_activation_of(description["activation"], tensors),
        metadata=description["metadata"],
    )
    if description["version"] == VERSION_NORMALISED:
        sae = NormalisedSae.around(sae, normalisation_of(description.get("normalisation"), folder))
    return sae.to(device)


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            "there is no dictionary here", where=str(folder), expected=str(path), found=str(error)
        ) from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError("the description is not JSON", where=str(path), found=str(error)) from error
    found = (
        (description.get("format"), description.get("version"))
        if isinstance(description, dict)
        else None
    )
    if found not in ((FORMAT, VERSION), (FORMAT, VERSION_NORMALISED)):
        raise UserError(
            "not a native dictionary",
            where=str(path),
            expected=f"{FORMAT} version {VERSION} or {VERSION_NORMALISED}",
            found=str(found),
        )
    return description


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            "the weights cannot be read", where=str(path), expected="safetensors", found=str(error)
        ) from error


def _problems_of(
    description: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Iterator[Problem]:
    activation = description.get("activation")
    activation = activation if isinstance(activation, dict) else {}
    kind, k = activation.get("kind"), activation.get("k")
    if kind not in activations():
        yield Problem(
            what="unknown activation",
            where=DESCRIPTION,
            expected=", ".join(activations()),
            found=str(kind),
        )
    elif kind == "topk" and not (isinstance(k, int) and k > 0):
        yield Problem(
            what="k is not a positive integer", where=f"{DESCRIPTION}: activation.k", found=str(k)
        )
    if not isinstance(description.get("metadata"), dict):
        yield Problem(what="missing or not an object", where=f"{DESCRIPTION}: metadata")
    names = {f.name for f in fields(activations()[str(kind)])} if kind in activations() else set()
    for name in activation.keys() - names - {"kind"} if names else ():
        yield Problem(what="unknown key", where=f"{DESCRIPTION}: activation.{name}")
    own = sorted(names - activation.keys() - {"k"})
    required = [*_ALWAYS, *(f"activation.{name}" for name in own)]
    for name in required:
        if name not in tensors:
            yield Problem(what="missing tensor", where=f"{WEIGHTS}: {name}")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            yield Problem(
                what="not floating point", where=f"{WEIGHTS}: {name}", found=str(tensor.dtype)
            )
        elif not torch.isfinite(tensor).all():
            yield Problem(what="NaN or infinity", where=f"{WEIGHTS}: {name}")


def _activation_of(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Activation:
    own: dict[str, Any] = {
        name.removeprefix("activation."): tensor
        for name, tensor in tensors.items()
        if name.startswith("activation.")
    }
    return activations()[description["kind"]](**{**description, **own})


FORMATS = {
    "featureflow": Format(
        read=lambda folder, variant: load_sae(folder), files=(DESCRIPTION, WEIGHTS)
    )
}
