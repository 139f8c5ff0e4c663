"""Any supported dictionary file or folder, recognised and read into the inference form.

1. `FORMATS` holds what the modules of this folder declare in a `FORMATS` of their own, and what
   installed packages offer in the entry point group `featureflow.formats`: a format is one file.
2. `recognise` looks at file names, and at the names and shapes of tensors where several formats
   share a file name.
3. `read` hands the path to that format's reader, fills in the conventions that are in no file
   (sae/formats/conventions.py) and folds scales, biases and decoder lengths
   (sae/formats/folding.py), so that the result works on raw activations.
4. `find` walks a folder tree and reports every dictionary in it.

Nothing is unpickled; the cost is one pass over the tensors.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path

from featureflow.errors import UserError
from featureflow.plugins import plugins
from sae import formats
from sae.dictionary import Sae
from sae.formats.base import Format, shapes_in
from sae.formats.conventions import Conventions, settled
from sae.formats.folding import fold


def _all_formats() -> dict[str, Format]:
    names = sorted(module.name for module in pkgutil.iter_modules(formats.__path__))
    here = (importlib.import_module(f"sae.formats.{name}") for name in names if name != "reading")
    found: dict[str, Format] = {}
    for module in (*here, *plugins("formats").values()):
        found |= getattr(module, "FORMATS", {})
    return found


FORMATS = _all_formats()


def read(
    path: str | Path,
    *,
    format: str = "auto",
    unit_decoder: bool = True,
    conventions: Conventions | None = None,
) -> Sae:
    """Read a dictionary from a folder or a file of any supported format.

    With `unit_decoder` (the default) decoder rows have unit length and latents the size of what
    they add; without it latents have the size the peer's own code gives them. `format` may name a
    class after a colon (`dictionary_learning:BatchTopKSAE`). Raises UserError naming every problem
    of the file.
    """
    path = Path(path)
    if not path.exists():
        raise UserError("there is no such file or folder", where=str(path), expected=_expected())
    name, _, variant = format.partition(":")
    if name == "auto":
        path = path.parent if _is_part_of_a_folder(path) else path
        name = _only(path)
    if name not in FORMATS:
        raise UserError(
            "unknown format", where="format", expected="auto, " + ", ".join(FORMATS), found=format
        )
    found = FORMATS[name].read(path, variant or None)
    if isinstance(found, Sae):
        return found
    return fold(settled(found, path, conventions or Conventions()), unit_decoder=unit_decoder)


def recognise(path: str | Path) -> tuple[str, ...]:
    """The formats that `path` may be of; empty when none fits, several when their files lie in one
    folder."""
    path = Path(path)
    if path.is_dir():
        return tuple(name for name, form in FORMATS.items() if form.files and _fits(path, form))
    names = _matching(path, own=True) or _matching(path, own=False)
    if len(names) < 2 or not path.is_file():
        return names
    shapes = shapes_in(path)
    return tuple(name for name in names if FORMATS[name].fits(shapes)) if shapes else names


def find(root: str | Path) -> Iterator[tuple[Path, str]]:
    """Every folder under `root` (itself included) that holds exactly one recognised dictionary, and
    every file of those that lie one a layer in a folder; in path order."""
    root = Path(root)
    for folder in sorted([root, *(path for path in root.rglob("*") if path.is_dir())]):
        names = recognise(folder)
        if len(names) == 1:
            yield folder, names[0]
        elif not names:
            yield from ((file, name) for file in _many(folder) for name in recognise(file)[:1])


def _matching(path: Path, *, own: bool) -> tuple[str, ...]:
    """The formats with a pattern for this file: one of their own, or just a suffix."""
    return tuple(
        name
        for name, form in FORMATS.items()
        if any(path.match(pattern) for pattern in form.lone if pattern.startswith("*") != own)
    )


def _fits(folder: Path, form: Format) -> bool:
    if not all((folder / name).is_file() for name in form.files):
        return False
    shapes = shapes_in(folder / form.files[-1])
    return form.fits(shapes) if shapes else True


def _many(folder: Path) -> list[Path]:
    """The files of which a folder holds one a layer."""
    patterns = sorted({form.many for form in FORMATS.values() if form.many})
    return sorted(file for many in patterns for file in folder.glob(many) if recognise(file))


def _is_part_of_a_folder(path: Path) -> bool:
    """Whether a file is one of the files that make its folder a dictionary, as
    `sae_weights.safetensors` is."""
    return path.is_file() and any(
        path.name in FORMATS[name].files for name in recognise(path.parent)
    )


def _only(path: Path) -> str:
    names = recognise(path)
    if len(names) == 1 or (names and path.is_file() and not shapes_in(path)):
        return names[0]
    if names:
        raise UserError(
            "files of several formats lie here",
            where=str(path),
            found=", ".join(names),
            fix=f'name one: format="{names[0]}"',
        )
    files = _many(path) or [f for f in sorted(path.glob("*")) if _matching(f, own=True)]
    if path.is_dir() and files:
        raise UserError(
            f"{len(files)} dictionaries lie here, one a file",
            where=str(path),
            found=", ".join(file.name for file in files[:3]),
            fix=f"name one file, such as {files[0]}",
        )
    raise UserError(
        "no dictionary of a known format here",
        where=str(path),
        expected=_expected(),
        found=_listing(path),
    )


def _expected() -> str:
    return "; ".join(
        f"{name}: {' + '.join(form.files) or form.many or ', '.join(form.lone)}"
        for name, form in FORMATS.items()
    )


def _listing(path: Path) -> str:
    if path.is_file():
        tensors = sorted(shapes_in(path))
        return f"{path.name} with {', '.join(tensors[:8])}" if tensors else path.name
    names = sorted(entry.name for entry in path.iterdir())
    return ", ".join(names[:8]) + (" …" if len(names) > 8 else "") if names else "an empty folder"
