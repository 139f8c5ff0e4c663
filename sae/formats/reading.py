"""Any supported dictionary file or folder, recognised and read into the inference form.

1. `recognise` looks at file names (for lone `.pt` files at the names inside) and says which formats
   fit.
2. `read` hands the path to that format's reader. Each reader folds scales, biases and decoder
   lengths (sae/formats/folding.py) so that the result works on raw activations.
3. `find` walks a folder tree and reports every dictionary in it.

Nothing is unpickled; the cost is one pass over the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from featureflow.errors import UserError
from sae.dictionary import Sae
from sae.formats import dictionary_learning, openai
from sae.formats.gemma_scope import read_gemma_scope, read_gemma_scope_2
from sae.formats.llama_scope import read_llama_scope
from sae.formats.native import load_sae
from sae.formats.saelens import read_saelens
from sae.formats.sparsify import read_sparsify
from sae.formats.tensors import read_pt


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format: the files that a folder of it has, and how it is read. `lone` tells which single
    files are of it."""

    files: tuple[str, ...]
    read: Callable[..., Sae]
    lone: tuple[str, ...] = ()


def _read_native(path: Path, *, unit_decoder: bool = True) -> Sae:
    return load_sae(path)


FORMATS: dict[str, Format] = {
    "featureflow": Format(files=("sae.json", "sae.safetensors"), read=_read_native),
    "saelens": Format(files=("cfg.json", "sae_weights.safetensors"), read=read_saelens),
    "sparsify": Format(files=("cfg.json", "sae.safetensors"), read=read_sparsify),
    "gemma_scope": Format(files=("params.npz",), read=read_gemma_scope, lone=(".npz",)),
    "gemma_scope_2": Format(
        files=("params.safetensors",), read=read_gemma_scope_2, lone=(".safetensors",)
    ),
    "llama_scope": Format(
        files=("hyperparams.json", "checkpoints/final.safetensors"), read=read_llama_scope
    ),
    "dictionary_learning": Format(
        files=("ae.pt",), read=dictionary_learning.read_dictionary_learning, lone=(".pt", ".pth")
    ),
    "openai": Format(files=(), read=openai.read_openai, lone=(".pt", ".pth")),
}


def read(path: str | Path, *, format: str = "auto", unit_decoder: bool = True) -> Sae:
    """Read a dictionary from a folder or a file of any supported format.

    With `unit_decoder` (the default) decoder rows have unit length and latents the size of what
    they add; without it latents have the size the peer's own code gives them. Raises UserError
    naming every problem of the file.
    """
    path = Path(path)
    if not path.exists():
        raise UserError("there is no such file or folder", where=str(path), expected=_expected())
    if format == "auto":
        path = path.parent if _is_part_of_a_folder(path) else path
        format = _only(path)
    if format not in FORMATS:
        raise UserError(
            "unknown format", where="format", expected="auto, " + ", ".join(FORMATS), found=format
        )
    return FORMATS[format].read(path, unit_decoder=unit_decoder)


def recognise(path: str | Path) -> tuple[str, ...]:
    """The formats that `path` may be of; empty when none fits, several when their files lie in one
    folder."""
    path = Path(path)
    if path.is_dir():
        return tuple(
            name for name, spec in FORMATS.items() if spec.files and _has(path, spec.files)
        )
    fits = tuple(name for name, spec in FORMATS.items() if path.suffix in spec.lone)
    if path.suffix in (".pt", ".pth") and path.is_file():
        return ("openai",) if "pre_bias" in read_pt(path) else ("dictionary_learning",)
    return fits


def find(root: str | Path) -> Iterator[tuple[Path, str]]:
    """Every folder under `root` (itself included) that holds exactly one recognised dictionary, in
    path order."""
    root = Path(root)
    for folder in sorted([root, *(path for path in root.rglob("*") if path.is_dir())]):
        names = recognise(folder)
        if len(names) == 1:
            yield folder, names[0]


def _has(folder: Path, files: tuple[str, ...]) -> bool:
    return all((folder / name).is_file() for name in files)


def _is_part_of_a_folder(path: Path) -> bool:
    """Whether a file is one of the files that make its folder a dictionary, as
    `sae_weights.safetensors` is."""
    return path.is_file() and any(
        path.name in FORMATS[name].files for name in recognise(path.parent)
    )


def _only(path: Path) -> str:
    names = recognise(path)
    if len(names) == 1:
        return names[0]
    if not names:
        raise UserError(
            "no dictionary of a known format here",
            where=str(path),
            expected=_expected(),
            found=_listing(path),
        )
    raise UserError(
        "files of several formats lie here",
        where=str(path),
        found=", ".join(names),
        fix=f'name one: format="{names[0]}"',
    )


def _expected() -> str:
    return "; ".join(
        f"{name}: {' + '.join(spec.files) or '*.pt'}" for name, spec in FORMATS.items()
    )


def _listing(path: Path) -> str:
    if not path.is_dir():
        return path.name
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "an empty folder"
