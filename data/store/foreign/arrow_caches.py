"""SAELens' `CacheActivationsRunner`: `save_to_disk` of a data set; column `<hook>`: (context, d),
`token_ids`. The order of files is that of `state.json`; without one, that of names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data.store.foreign.pieces import Piece, ReadRows, series_of, with_suffix
from featureflow.errors import Problem, UserError

_TOKENS = ("token_ids", "tokens")
_END = b"\xff\xff\xff\xff\0\0\0\0"
_NAMES = {"halffloat": "float16", "float": "float32", "double": "float64"}


def files_in(source: Path) -> list[Path]:
    there = [path for path in with_suffix(source, ".arrow") if not path.name.startswith("cache-")]
    named = _named(source)
    return [*named, *(path for path in there if path not in named)] if there else []


def iter_pieces(file: Path) -> Iterator[Piece]:
    named = _named(file.parent)
    if named and file not in named:
        raise UserError("a file that the data set's state.json does not name", where=str(file))
    table = _table(file)
    fields = series_of(file)
    if named:
        fields = {"series": str(file.parent / "state.json"), "number": named.index(file)}
    elif fields.get("total") is None and len(files_in(file.parent)) == 1:
        fields = {"series": str(file)}
    ids = next((name for name in _TOKENS if name in table.schema.names), None)
    for name in (name for name in table.schema.names if name not in _TOKENS):
        broken, token_ids = None, None
        shape: tuple[int, ...] = (0, 0, 0)
        try:
            shape = _shape_of(table, name, depth=3)
            if ids is not None:
                if _shape_of(table, ids, depth=2) != shape[:2]:
                    raise ValueError(f"{ids} are of other contexts")
                token_ids = _rows_of(table, ids, shape[1], 1)
        except ValueError as error:
            what = "the column does not hold (context, d) arrays of one shape"
            broken = Problem(what=what, where=f"{file}: {name}", found=str(error))
        yield Piece(
            name=name,
            where=str(file),
            shape=shape,
            dtype="" if broken else _dtype_of(table, name),
            read=_rows_of(table, name, shape[1], shape[2]),
            token_ids=token_ids,
            broken=broken,
            **fields,
        )


def _named(folder: Path) -> list[Path]:
    state = folder / "state.json"
    if not state.is_file():
        return []
    try:
        entries = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
        return [folder / Path(entry["filename"]).name for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "not the state of a data set", where=str(state), found=repr(error)
        ) from error


def _table(file: Path) -> pa.Table:
    """Raises UserError for another file, and for a stream without its end: one that is cut between
    two batches reads without complaint."""
    found = "it is cut off: the mark of its end is missing"
    try:
        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        with file.open("rb") as stream:
            stream.seek(-len(_END), 2)
            if stream.read() == _END:
                return table
    except (pa.ArrowInvalid, OSError) as error:
        found = str(error)
    raise UserError("not an Arrow stream", where=str(file), found=found)


def _shape_of(table: pa.Table, column: str, *, depth: int) -> tuple[int, ...]:
    """The shape of a column of nested lists. Raises ValueError where they are ragged or null."""
    shape = [table.num_rows]
    chunks = [_storage(chunk) for chunk in table.column(column).chunks]
    while True:
        if any(chunk.null_count for chunk in chunks):
            raise ValueError("null among the rows" if len(shape) == 1 else "null among the numbers")
        if not chunks or not pa.types.is_nested(chunks[0].type):
            break
        lengths = {
            n for chunk in chunks for n in pc.unique(pc.list_value_length(chunk)).to_pylist()
        }
        if len(lengths) != 1:
            raise ValueError(f"lists of {sorted(map(str, lengths))} entries")
        shape.append(lengths.pop())
        chunks = [chunk.flatten() for chunk in chunks]
    if len(shape) != depth:
        raise ValueError(f"shape {tuple(shape)}")
    return tuple(shape)


def _dtype_of(table: pa.Table, column: str) -> str:
    kind = str(_numbers(table.column(column).chunk(0)).type)
    return _NAMES.get(kind, kind)


def _rows_of(table: pa.Table, column: str, n_context: int, width: int) -> ReadRows:
    def read(start: int, stop: int) -> np.ndarray:
        first, last = start // n_context, -(-stop // n_context)
        chunks = table.column(column).slice(first, last - first).chunks
        parts = [_numbers(chunk).to_numpy(zero_copy_only=False) for chunk in chunks]
        rows = np.concatenate(parts).reshape(-1, width)
        return rows[start - first * n_context : stop - first * n_context]

    return read


def _storage(chunk: Any) -> Any:
    """Without the type that `datasets` writes for arrays of two dimensions."""
    return getattr(chunk, "storage", chunk)


def _numbers(chunk: Any) -> Any:
    return pc.list_flatten(_storage(chunk), recursive=True)
