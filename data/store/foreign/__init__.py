"""Activations that others have stored: a folder or file in, named sites whose rows are read a part
at a time out.

1. `FORMATS` has a module for each kind of file. `files_in(source)` finds its files, and
   `iter_pieces(file)` takes one apart: an array, the site it says it is, and its number in a series
   (`L3-0.npy`, `part-00001-of-00004`).
2. Pieces of one site follow each other in the order of their numbers.
3. Everything that is missing or does not fit together (data/store/foreign/agreement.py) is raised
   as one error. Nothing is dropped or joined unsaid; `ignore` names what may be left out.

Nothing is unpickled; `datasets` is not needed for SAELens' caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from data.store.foreign import arrow_caches, numpy_files, safetensors_files, zarr_arrays
from data.store.foreign.agreement import iter_problems
from data.store.foreign.pieces import ForeignRows, Piece, joined, numbered, site_name
from featureflow.errors import Problem, UserError
from featureflow.files import is_lfs_pointer, lfs_problem

__all__ = ["ForeignRows", "find_foreign"]

_OTHERS = (
    *(".pt", ".pth", ".ckpt", ".npz", ".h5", ".hdf5", ".bin", ".pkl", ".parquet", ".feather"),
    *(".mat", ".tar", ".zip", ".gz", ".zst"),
)


class _Format(Protocol):
    def files_in(self, source: Path) -> list[Path]:
        """Its files, those included that should be there and are not."""

    def iter_pieces(self, file: Path) -> Iterator[Piece]:
        """The arrays of a file. Raises UserError where it cannot be read."""


FORMATS: Mapping[str, _Format] = {
    "saelens": arrow_caches,
    "zarr": zarr_arrays,
    "safetensors": safetensors_files,
    "npy": numpy_files,
}


def find_foreign(
    source: Path, rename: Mapping[str, str], *, ignore: Sequence[str] = ()
) -> list[ForeignRows]:
    """The sites of a source, in the order of their names. Raises UserError with everything that is
    missing or does not fit together."""
    if not source.exists():
        raise UserError("there is nothing here to import", where=str(source))
    found = {name: files for name, each in FORMATS.items() if (files := each.files_in(source))}
    if not found:
        raise UserError(
            "nothing here can be imported",
            where=str(source),
            expected="SAELens' cached activations (*.arrow), *.safetensors, *.npy or a Zarr group",
        )
    name = next(iter(found))
    problems = [
        Problem(what=f"files of another format beside {name}", where=str(file))
        for other in found
        if other != name
        for file in found[other]
    ]
    problems += [
        Problem(what="a file that is not read here", where=str(file))
        for file in numbered(source, lambda path: path.suffix.lower() in _OTHERS)
    ]
    every: list[Piece] = []
    for file in found[name]:
        try:
            every += _pieces_of(FORMATS[name], file)
        except UserError as error:
            problems += error.problems
    pieces = [piece for piece in every if piece.name not in ignore]
    problems += [
        Problem(what="no array of this name", where=given)
        for given in (*rename, *ignore)
        if given not in {piece.name for piece in every}
    ]
    problems += [piece.problem for piece in pieces if piece.problem is not None]
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces:
        if piece.problem is None:
            by_name.setdefault(piece.name, []).append(piece)
    problems += iter_problems(by_name, rename)
    if not by_name and not problems:
        problems.append(Problem(what="there are no activations here", where=str(source)))
    if problems:
        raise UserError(
            f"{source.name} is incomplete or does not fit together",
            problems=tuple(problems),
            fix="complete it, or move what is no activation elsewhere; --ignore NAME leaves an "
            "array out",
        )
    return [joined(name, site_name(each, rename), by_name[each]) for each in sorted(by_name)]


def _pieces_of(form: _Format, file: Path) -> list[Piece]:
    if not file.exists():
        raise UserError("a file is missing", where=str(file))
    if file.is_file() and is_lfs_pointer(file):
        raise UserError("a pointer", problems=(lfs_problem(file),))
    return list(form.iter_pieces(file))
