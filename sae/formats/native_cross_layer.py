"""The native form of a dictionary that writes into many layers: a folder with `cross_layer.json`
and one `part_{i}.safetensors` a layer.

`cross_layer.json` is written last and says what the tensors mean: `format`, `version`, `metadata`,
and of every part `reads`, `writes`, `first` (the output that its first decoder writes into) and
`activation`. A part holds `W_enc [latent, d_in]`, `b_enc`, `W_dec [latent, output, d_out]`,
`b_dec [d_out]`, the tensors of the activation as `activation.<name>`, and perhaps
`W_skip [d_out, d_in]`. Nothing in the files executes on load; reading refuses NaN and infinity.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from featureflow.errors import UserError
from featureflow.files import write_text_atomically
from featureflow.sites import Site, parse_site
from sae.activations import Activation, activations, describe, tensors_of
from sae.cross_layer import CrossLayer, CrossLayerPart
from sae.formats.tensors import Shape, checked, read_json, read_safetensors, write_tensors

FORMAT, VERSION, DESCRIPTION = "featureflow-cross-layer", 1, "cross_layer.json"
_Read = tuple[CrossLayerPart, Tensor, Tensor | None]
_SHAPES: dict[str, Shape] = {
    "W_enc": ("latent", "d_in"),
    "b_enc": ("latent",),
    "W_dec": ("latent", "output", "d_out"),
    "b_dec": ("d_out",),
    "W_skip": ("d_out", "d_in"),
}


def save_cross_layer(whole: CrossLayer, folder: str | Path) -> None:
    """Write into `folder`, which is made."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, part in enumerate(whole.parts):
        tensors = {"W_enc": part.W_enc, "b_enc": part.b_enc, "W_dec": part.W_dec}
        own = tensors_of(part.activation)
        tensors |= {"b_dec": whole.b_dec[i], **{f"activation.{n}": t for n, t in own.items()}}
        if (skip := whole.W_skip[i]) is not None:
            tensors["W_skip"] = skip
        write_tensors(tensors, folder / f"part_{i}.safetensors")
    parts = [
        {
            "reads": reads.name,
            "writes": writes.name,
            "first": part.first,
            "activation": describe(part.activation),
        }
        for reads, writes, part in zip(whole.reads, whole.writes, whole.parts, strict=True)
    ]
    document = {"format": FORMAT, "version": VERSION, "parts": parts, "metadata": whole.metadata}
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_text_atomically(folder / DESCRIPTION, text)


def load_cross_layer(folder: str | Path) -> CrossLayer:
    """Read all parts. Raises UserError for what is missing, misshaped or not finite."""
    folder = Path(folder)
    document = read_json(folder / DESCRIPTION)
    found = (document.get("format"), document.get("version"))
    if found != (FORMAT, VERSION):
        expected = f"{FORMAT} version {VERSION}"
        where = str(folder / DESCRIPTION)
        raise UserError(
            "not a native cross-layer dictionary", where=where, expected=expected, found=str(found)
        )
    try:
        parts = [(_sites(part), _part(folder, i, part)) for i, part in enumerate(document["parts"])]
        metadata = dict(document["metadata"])
    except (KeyError, TypeError, ValueError) as error:
        where = str(folder / DESCRIPTION)
        raise UserError(
            "the description lacks something", where=where, found=repr(error)
        ) from error
    return CrossLayer(
        reads=tuple(reads for (reads, _), _ in parts),
        writes=tuple(writes for (_, writes), _ in parts),
        parts=tuple(part for _, (part, _, _) in parts),
        b_dec=tuple(b_dec for _, (_, b_dec, _) in parts),
        W_skip=tuple(skip for _, (_, _, skip) in parts),
        metadata=metadata,
    )


@dataclass(frozen=True)
class Decoders:
    """The decoder rows of a native folder from site to site, read when they are asked for; travels
    between processes as a path."""

    folder: Path

    def __call__(self, source: Site, target: Site) -> Float[Tensor, "latent d_out"] | None:
        """What the latents that read `source` write into `target`; None for other sites."""
        ends = [_sites(part) for part in self._parts()]
        reads, writes = [end[0] for end in ends], [end[1] for end in ends]
        if source not in reads or target not in writes:
            return None
        layer = reads.index(source)
        into = writes.index(target) - int(self._parts()[layer]["first"])
        with safe_open(self.folder / f"part_{layer}.safetensors", "pt") as file:
            rows = file.get_slice("W_dec")
            n_latents, n_outputs, d_out = rows.get_shape()
            if 0 <= into < n_outputs:
                return rows[:, into].float()
        return torch.zeros(n_latents, d_out)

    def _parts(self) -> list[dict[str, Any]]:
        return read_json(self.folder / DESCRIPTION)["parts"]


def _sites(part: dict[str, Any]) -> tuple[Site, Site]:
    return parse_site(part["reads"]), parse_site(part["writes"])


def _part(folder: Path, number: int, part: dict[str, Any]) -> _Read:
    kind = activations()[part["activation"]["kind"]]
    own = {
        f"activation.{f.name}": f.name
        for f in fields(kind)
        if f.name not in ("kind", *part["activation"])
    }
    file = folder / f"part_{number}.safetensors"
    shapes = _SHAPES | dict.fromkeys(own, ("latent",))
    optional = frozenset({"W_skip"})
    found = checked(read_safetensors(file), shapes, where=file, optional=optional, only=True)
    tensors = {name: found[full] for full, name in own.items()}
    activation: Activation = kind(**{**part["activation"], **tensors})
    made = CrossLayerPart(
        W_enc=found["W_enc"],
        b_enc=found["b_enc"],
        W_dec=found["W_dec"],
        activation=activation,
        first=int(part["first"]),
    )
    return made, found["b_dec"], found.get("W_skip")
