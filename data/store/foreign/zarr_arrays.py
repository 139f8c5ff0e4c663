"""Zarr arrays (versions 2 and 3), of any codec, in a group or alone; every chunk must have been
written."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch import Tensor
from zarr.core.sync import sync

from data.store.foreign.pieces import Piece, ReadRows, numbered
from featureflow.errors import Problem, UserError

_MARKS = ("zarr.json", ".zgroup", ".zarray")


def files_in(source: Path) -> list[Path]:
    """The outermost groups and arrays."""
    marked = numbered(source, lambda path: any((path / mark).is_file() for mark in _MARKS))
    return [path for path in marked if not any(other in path.parents for other in marked)]


def iter_pieces(file: Path) -> Iterator[Piece]:
    """What lies in the folder counts, not what consolidated metadata remember."""
    for name, array in sorted(_arrays_of(file).items()):
        is_bfloat16 = array.attrs.get("logical_dtype") == "bfloat16"
        yield Piece(
            name=name,
            where=str(file),
            series=str(file / name),
            shape=array.shape,
            dtype="bfloat16" if is_bfloat16 else array.dtype.name,
            read=_rows_of(array, is_bfloat16),
            broken=_incomplete(file, name, array),
        )


def _arrays_of(file: Path) -> dict[str, zarr.Array[Any]]:
    """Raises UserError for what cannot be read, and for folders inside that are neither group nor
    array: zarr passes over them with a warning."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            opened = zarr.open(file, mode="r", use_consolidated=False)
            if isinstance(opened, zarr.Array):
                return {file.stem: opened}
            members = dict(opened.members(max_depth=None))
        except (ValueError, KeyError, TypeError, OSError, RuntimeError) as error:
            raise UserError(
                "not a Zarr group or array that can be read", where=str(file), found=str(error)
            ) from error
    strange = [str(each.message) for each in said if "not recognized" in str(each.message)]
    problems = tuple(
        Problem(what="neither group nor array", where=str(file), found=text) for text in strange
    )
    if problems:
        raise UserError(f"{file.name} is damaged", problems=problems)
    return {name: each for name, each in members.items() if isinstance(each, zarr.Array)}


def _incomplete(file: Path, name: str, array: zarr.Array[Any]) -> Problem | None:
    if not (missing := _unwritten_chunks(array)):
        return None
    return Problem(
        what="chunks that were never written would be read as zeros",
        where=f"{file}: {name}",
        found=f"{missing} of {array.nchunks}",
        expected="all of them (Zarr's write_empty_chunks where zeros are meant)",
    )


def _unwritten_chunks(array: Any) -> int:
    """Files that are missing and, in shards, inner chunks that their index marks as missing."""
    if array.shards is None:
        return int(array.nchunks - array.nchunks_initialized)
    missing = 0
    per_shard = [shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True)]
    for shard in np.ndindex(*(-(-n // s) for n, s in zip(array.shape, array.shards, strict=True))):
        inside = [
            -(-min(s, n - i * s) // c)
            for n, s, c, i in zip(array.shape, array.shards, array.chunks, shard, strict=True)
        ]
        place = array.store_path / array.metadata.encode_chunk_key(shard)
        index = sync(array.metadata.codecs[0]._load_shard_index_maybe(place, tuple(per_shard)))
        wanted = np.ndindex(*inside)
        missing += (
            int(np.prod(inside))
            if index is None
            else sum(index.offsets_and_lengths[each][0] == 2**64 - 1 for each in wanted)
        )
    return missing


def _rows_of(array: zarr.Array[Any], is_bfloat16: bool) -> ReadRows:
    per_row = array.shape[1] if array.ndim == 3 else 1

    def read(start: int, stop: int) -> Tensor | np.ndarray:
        first, last = start // per_row, -(-stop // per_row)
        try:
            values = np.asarray(array[first:last]).reshape(-1, array.shape[-1])
        except Exception as error:  # each codec has errors of its own
            where, found = str(array.store_path), str(error)
            raise UserError("a chunk cannot be read", where=where, found=found) from error
        values = values[start - first * per_row : stop - first * per_row]
        if is_bfloat16:
            return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
        return values.astype(values.dtype.newbyteorder("="), copy=False)

    return read
