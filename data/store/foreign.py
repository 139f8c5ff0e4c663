"""Readers of foreign activations: a folder or file in, named arrays of rows that are read a part at
a time out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.store.foreign_arrow import read_arrow
from data.store.foreign_rows import ForeignRows, ReadRows, files_of, site_name, spanning
from featureflow.errors import UserError


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """A stretch of a site's rows: (row, width), or (context, position, width)."""

    name: str
    shape: tuple[int, ...]
    read_all: Callable[[], Any]

    @property
    def n_rows(self) -> int:
        return int(np.prod(self.shape[:-1]))


def find_foreign(source: Path, rename: Mapping[str, str]) -> list[ForeignRows]:
    """The sites of a source, in the order of their names. Raises UserError when nothing there can
    be read."""
    if not source.exists():
        raise UserError("there is nothing here to import", where=str(source))
    for read in (read_arrow, _read_zarr, _read_safetensors, _read_npy):
        if found := read(source, rename):
            return found
    raise UserError(
        "nothing here can be imported",
        where=str(source),
        expected="SAELens' cached activations (*.arrow), *.safetensors, *.npy or a Zarr group",
    )


def _read_npy(source: Path, rename: Mapping[str, str]) -> list[ForeignRows]:
    """`L3.npy`, or several a site: `L3-0.npy`, `L3-1.npy` (a last `-<number>` or `_<number>` is no
    part of a name)."""
    return _joined("npy", rename, (_npy_piece(path) for path in files_of(source, ".npy")))


def _npy_piece(path: Path) -> _Piece:
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError) as error:
        raise UserError(
            "not an array that can be read", where=str(path), found=str(error)
        ) from error
    return _Piece(
        name=re.sub(r"[-_]\d+$", "", path.stem), shape=values.shape, read_all=lambda: values
    )


def _read_safetensors(source: Path, rename: Mapping[str, str]) -> list[ForeignRows]:
    return _joined("safetensors", rename, _iter_safetensors(files_of(source, ".safetensors")))


def _iter_safetensors(files: Sequence[Path]) -> Iterator[_Piece]:
    from safetensors import SafetensorError, safe_open

    for path in files:
        try:
            with safe_open(path, framework="pt") as opened:
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError("not a safetensors file", where=str(path), found=str(error)) from error
        for name, shape in shapes.items():
            if len(shape) in (2, 3):
                yield _Piece(
                    name=name,
                    shape=shape,
                    read_all=lambda path=path, name=name: _load_tensor(path, name),
                )


def _load_tensor(path: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        return opened.get_tensor(name)


def _read_zarr(source: Path, rename: Mapping[str, str]) -> list[ForeignRows]:
    if not (source / "zarr.json").is_file():
        return []
    import zarr

    opened = zarr.open(source, mode="r")
    arrays = dict(opened.arrays()) if isinstance(opened, zarr.Group) else {source.stem: opened}
    found = []
    for name, array in sorted(arrays.items()):
        if array.ndim == 2:
            read = _zarr_reader(array)
            found.append(
                ForeignRows(
                    name=site_name(name, rename),
                    format="zarr",
                    n_rows=array.shape[0],
                    width=array.shape[1],
                    read=read,
                )
            )
    return found


def _zarr_reader(array: Any) -> ReadRows:
    is_bfloat16 = array.attrs.get("logical_dtype") == "bfloat16"

    def read(start: int, stop: int) -> Tensor | np.ndarray:
        values = np.asarray(array[start:stop])
        return (
            torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16) if is_bfloat16 else values
        )

    return read


def _joined(format_: str, rename: Mapping[str, str], pieces: Iterator[_Piece]) -> list[ForeignRows]:
    """Pieces of the same site one after the other."""
    by_name: dict[str, list[_Piece]] = {}
    for piece in pieces:
        if len(piece.shape) not in (2, 3):
            raise UserError(
                "an array of the wrong shape",
                where=piece.name,
                found=str(piece.shape),
                expected="(row, d) or (context, position, d)",
            )
        by_name.setdefault(piece.name, []).append(piece)
    return [
        _joined_site(format_, site_name(name, rename), parts)
        for name, parts in sorted(by_name.items())
    ]


def _joined_site(format_: str, name: str, parts: Sequence[_Piece]) -> ForeignRows:
    widths = {part.shape[-1] for part in parts}
    if len(widths) > 1:
        raise UserError(
            "the files of one site differ in width",
            where=name,
            found=", ".join(map(str, sorted(widths))),
        )
    bounds = np.cumsum([0, *(part.n_rows for part in parts)])
    contexts = {part.shape[1] for part in parts if len(part.shape) == 3}
    return ForeignRows(
        name=name,
        format=format_,
        n_rows=int(bounds[-1]),
        width=parts[0].shape[-1],
        read=spanning(bounds, [_piece_reader(part) for part in parts]),
        n_context=contexts.pop() if len(contexts) == 1 else None,
    )


def _piece_reader(piece: _Piece) -> ReadRows:
    return lambda start, stop: piece.read_all().reshape(-1, piece.shape[-1])[start:stop]
