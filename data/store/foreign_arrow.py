"""SAELens' cached activations: a Hugging Face data set on disk, read as plain Arrow without the
`datasets` package."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.store.foreign_rows import ForeignRows, ReadRows, files_of, site_name, spanning
from featureflow.errors import UserError


def read_arrow(source: Path, rename: Mapping[str, str]) -> list[ForeignRows]:
    """SAELens' `CacheActivationsRunner`: `save_to_disk` of a data set; column `<hook>`: (context,
    d), `token_ids`."""
    files = [path for path in files_of(source, ".arrow") if not path.name.startswith("cache-")]
    if not files:
        return []
    files = _arrow_files_in_order(source, files)
    tables = [_open_arrow(path) for path in files]
    columns = [name for name in tables[0].schema.names if name not in ("token_ids", "tokens")]
    has_ids = "token_ids" in tables[0].schema.names
    found = []
    for column in columns:
        n_context, width = _arrow_shape(tables[0], column, source)
        bounds = np.cumsum([0, *(table.num_rows * n_context for table in tables)])
        found.append(
            ForeignRows(
                name=site_name(column, rename),
                format="saelens",
                n_rows=int(bounds[-1]),
                width=width,
                read=spanning(
                    bounds, [_arrow_rows(table, column, n_context, width) for table in tables]
                ),
                n_context=n_context,
                token_ids=_arrow_ids(tables, bounds, n_context) if has_ids else None,
            )
        )
    return found


def _arrow_files_in_order(source: Path, files: list[Path]) -> list[Path]:
    """The order that `state.json` of the data set gives; the order of names without one."""
    state = source / "state.json"
    if not state.is_file():
        return files
    named = [
        source / entry["filename"]
        for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]
    ]
    if missing := [path.name for path in named if not path.is_file()]:
        raise UserError(
            "files of the data set are missing", where=str(source), found=", ".join(missing)
        )
    return named


def _open_arrow(path: Path) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except pa.ArrowInvalid as error:
        raise UserError("not an Arrow stream", where=str(path), found=str(error)) from error


def _arrow_shape(table: Any, column: str, source: Path) -> tuple[int, int]:
    """(context, width) of a column of two-dimensional arrays; their rows are all alike."""
    first = _storage(table.column(column).slice(0, 1).chunk(0)) if table.num_rows else None
    try:
        rows = first[0].as_py()  # type: ignore[index]
        return len(rows), len(rows[0])
    except (TypeError, IndexError) as error:
        raise UserError(
            "the column does not hold (context, d) arrays", where=f"{source}: {column}"
        ) from error


def _storage(chunk: Any) -> Any:
    return getattr(chunk, "storage", chunk)


def _arrow_rows(table: Any, column: str, n_context: int, width: int) -> ReadRows:
    def read(start: int, stop: int) -> np.ndarray:
        first, last = start // n_context, -(-stop // n_context)
        values = [
            _flat(_storage(chunk))
            for chunk in table.column(column).slice(first, last - first).chunks
        ]
        rows = np.concatenate(values).reshape(-1, width)
        return rows[start - first * n_context : stop - first * n_context]

    return read


def _flat(array: Any) -> np.ndarray:
    import pyarrow as pa

    while (
        pa.types.is_list(array.type)
        or pa.types.is_large_list(array.type)
        or pa.types.is_fixed_size_list(array.type)
    ):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False)


def _arrow_ids(
    tables: Sequence[Any], bounds: np.ndarray, n_context: int
) -> Callable[[int, int], np.ndarray]:
    readers = [_arrow_rows(table, "token_ids", n_context, 1) for table in tables]
    read = spanning(bounds, readers)
    return lambda start, stop: np.asarray(read(start, stop)).reshape(-1)
