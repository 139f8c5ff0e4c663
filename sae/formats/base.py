"""What every format is made of: how its files are recognised, how they are read, and what a file
says about itself.

1. A `Format` names the files of a folder, or the pattern of single files, and how tensors are named
   there. One module of this folder holds one or two of them in `FORMATS`; nothing else lists them.
2. `shapes_in` looks into a file without reading its weights.
3. `described` turns the words of a file into the metadata that all readers give: `site`, `reads`
   (the input of a transcoder), `model`, `hooks` (as the file writes them), `published`, `notes`
   (what is not in the file). A hook that is no site here stays in `hooks` only.
"""

from __future__ import annotations

import json
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from featureflow.errors import UserError
from featureflow.sites import Site, SiteKind, parse_site
from sae.dictionary import Sae
from sae.formats.folding import Foreign
from sae.formats.tensors import read_pt

Shapes = Mapping[str, tuple[int, ...]]
_LONGEST_HEADER = 100 << 20


@dataclass(frozen=True, kw_only=True)
class Format:
    """`files`: all that a folder of it has, the weights last. `lone`: patterns of single files.
    `many`: the pattern of files of which a folder holds one a layer. `fits`: whether tensors of
    these names and shapes are of it; a file that cannot be read is judged by its name alone.
    `read(path, variant)` gets the folder or the single file, and what stood behind the format's
    name after a colon."""

    read: Callable[[Path, str | None], Foreign | Sae]
    files: tuple[str, ...] = ()
    lone: tuple[str, ...] = ()
    many: str = ""
    fits: Callable[[Shapes], bool] = lambda shapes: True


def shapes_in(file: Path) -> Shapes:
    """Tensor names and shapes of a file; empty where they cannot be read. The cost is the header,
    or for torch files a mapping of the pages."""
    try:
        if file.suffix == ".safetensors":
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(min(length, _LONGEST_HEADER)))
            return {name: tuple(header[name]["shape"]) for name in header if name != "__metadata__"}
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as archive:
                return {name.removesuffix(".npy"): () for name in archive.namelist()}
        return {
            name: tuple(value.shape) if isinstance(value, Tensor) else ()
            for name, value in read_pt(file).items()
        }
    except (OSError, ValueError, KeyError, TypeError, struct.error, zipfile.BadZipFile, UserError):
        return {}


def has(*names: str) -> Callable[[Shapes], bool]:
    """Whether all tensors of these names are there."""
    return lambda shapes: set(names) <= set(shapes)


def config_beside(file: Path, name: str, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """The description beside a file, or nothing."""
    description = file.parent / name
    return read(description) if description.is_file() else {}


def described(
    format_name: str,
    path: Path,
    config: Mapping[str, Any] | None = None,
    *,
    reads: str | None = None,
    writes: str | None = None,
    transcodes: bool = False,
    model: object = None,
    l0: object = None,
    notes: Iterable[str] = (),
) -> dict[str, Any]:
    """Metadata of a foreign dictionary. `reads` and `writes` are the hooks of input and output as
    the file writes them; of an autoencoder only `writes` is given."""
    metadata: dict[str, Any] = {
        "source": {"format": format_name, "name": path.resolve().name, **dict(config or {})}
    }
    hooks = {"reads": reads, "writes": writes}
    if reads or writes:
        metadata["hooks"] = {name: hook for name, hook in hooks.items() if hook}
    site, source = site_of_hook(writes, model=model), site_of_hook(reads, model=model)
    if site is not None:
        metadata["site"] = site.name
    if transcodes:
        metadata["transcodes"] = True
        if source is not None:
            metadata["reads"] = source.name
    if isinstance(model, str) and model:
        metadata["model"] = model
    if isinstance(l0, (int, float)) and not isinstance(l0, bool):
        metadata["published"] = {"l0": l0}
    if notes := tuple(notes):
        metadata["notes"] = list(notes)
    return metadata


_OF_MODULES: dict[str, SiteKind] = {
    "": "resid_post",
    ".output": "resid_post",
    ".input": "resid_pre",
    ".mlp": "mlp_out",
    ".mlp.output": "mlp_out",
    ".mlp.input": "mlp_in",
    ".post_feedforward_layernorm.output": "mlp_out",
    ".pre_feedforward_layernorm.output": "mlp_in",
    ".self_attn": "attn_out",
    ".self_attn.output": "attn_out",
    ".attn": "attn_out",
    ".attention": "attn_out",
    ".self_attn.o_proj.input": "z",
}
"""What the modules of a Hugging Face block give, by the end of their name. The module before a
second norm (Gemma 2 and 3, OLMo 2) gives something else, see `_before_a_norm`."""
_MODULE = re.compile(r"(?:\w+\.)*(?:layers|h)\.(\d+)((?:\.\w+)*)")
_OF_BRIDGE: dict[str, SiteKind] = {
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
    "attn.hook_out": "attn_out",
    "mlp.hook_out": "mlp_out",
}
"""What TransformerLens' bridge calls the ends of a block and of its modules."""
_HOOK = re.compile(r"blocks\.(\d+)\.([\w.]+)")
_POST_NORMS = re.compile(r"gemma-?[23]|olmo-?2", re.IGNORECASE)


def site_of_hook(hook: str | None, *, model: object = None) -> Site | None:
    """The site that a hook names, written as TransformerLens or as Hugging Face's modules write it;
    None for one that is no site here."""
    if hook is None:
        return None
    if match := _MODULE.fullmatch(hook):
        kind = None if _before_a_norm(match[2], model) else _OF_MODULES.get(match[2])
        return Site(int(match[1]), kind) if kind else None
    match = _HOOK.fullmatch(hook)
    if match and match[2] in _OF_BRIDGE:
        is_inside = "." in match[2] and isinstance(model, str) and _POST_NORMS.search(model)
        return None if is_inside else Site(int(match[1]), _OF_BRIDGE[match[2]])
    try:
        return parse_site(hook.replace(".hook_z", ".attn.hook_z") if ".attn." not in hook else hook)
    except UserError:
        return None


def _before_a_norm(tail: str, model: object) -> bool:
    """Whether a module's output goes through another norm before it enters the stream."""
    inside = tail.removesuffix(".output") in (".mlp", ".self_attn")
    return inside and isinstance(model, str) and _POST_NORMS.search(model) is not None
