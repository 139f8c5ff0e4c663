"""`*.safetensors`; each tensor (row, d) or (context, position, d) is a site of that name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.store.foreign.pieces import Piece, rows_of, series_of, with_suffix
from featureflow.errors import UserError


def files_in(source: Path) -> list[Path]:
    return with_suffix(source, ".safetensors")


def iter_pieces(file: Path) -> Iterator[Piece]:
    try:
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            found = {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError("not a safetensors file", where=str(file), found=str(error)) from error
    for name, (shape, dtype) in found.items():
        yield Piece(
            name=name,
            where=str(file),
            shape=shape,
            dtype=dtype,
            read=rows_of(lambda name=name: _load(file, name)),
            **series_of(file),
        )


def _load(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor(name)
