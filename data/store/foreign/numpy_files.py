"""`L3.npy`, or several a site: `L3-0.npy`, `L3-1.npy`, read by memory map."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.store.foreign.pieces import Piece, ReadRows, series_of, with_suffix
from featureflow.errors import UserError


def files_in(source: Path) -> list[Path]:
    return with_suffix(source, ".npy")


def iter_pieces(file: Path) -> Iterator[Piece]:
    try:
        values = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(
            "not an array that can be read", where=str(file), found=str(error)
        ) from error
    fields = series_of(file, may_be_all=False)
    name = Path(fields["series"]).name if "number" in fields else file.stem
    yield Piece(
        name=name,
        where=str(file),
        shape=values.shape,
        dtype=values.dtype.name,
        read=_rows_of(values),
        **fields,
    )


def _rows_of(values: np.ndarray) -> ReadRows:
    """In this machine's byte order, whatever the file's. Whole contexts are cut out before they are
    reshaped: an array in Fortran's order would be copied whole."""
    per_row = values.shape[1] if values.ndim == 3 else 1

    def read(start: int, stop: int) -> np.ndarray:
        first = start // per_row
        part = values[first : -(-stop // per_row)].reshape(-1, values.shape[-1])
        rows = part[start - first * per_row : stop - first * per_row]
        return rows.astype(values.dtype.newbyteorder("="), copy=False)

    return read
