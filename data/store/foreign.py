"""Readers of activations that others have stored: a folder or file in, named sites whose rows are
read a part at a time out.

1. Every file is taken apart into pieces: an array (row, d) or (context, position, d), the site it
   says it is, and the number of its file in a series (`L3-0.npy`, `part-00001-of-00004`).
2. Pieces of one site follow each other in the order of their numbers.
3. Everything that is missing or does not fit together is collected and raised as one error: chunks
   never written, gaps in a series, a part without one of the sites, sites of different length,
   arrays of another rank or kind, files of another format. Nothing is dropped or joined unsaid;
   `ignore` names what may be left out.

Nothing is unpickled; `datasets` is not needed for SAELens' caches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featureflow.errors import Problem, UserError
from featureflow.files import is_lfs_pointer, lfs_problem
from featureflow.sites import parse_site

ReadRows = Callable[[int, int], "Tensor | np.ndarray"]
_NUMBERED = re.compile(r"(?P<stem>.*?)[-_]?(?P<number>\d+)(?:-of-(?P<total>\d+))?")
_NUMBERED_NAME = re.compile(r"(?P<stem>.+?)[-_](?P<number>\d+)(?:-of-(?P<total>\d+))?")
_NOT_READ = (".pt", ".pth", ".npz", ".h5", ".hdf5", ".bin", ".pkl", ".parquet")
_FLOATS = ("float16", "float32", "float64", "bfloat16", "F16", "F32", "F64", "BF16")
_TOKEN_COLUMNS = ("token_ids", "tokens")


@dataclass(frozen=True, kw_only=True)
class ForeignRows:
    """One site of a foreign source: `read(start, stop)` gives (row, width); `token_ids` likewise,
    if there are any."""

    name: str
    format: str
    n_rows: int
    width: int
    read: ReadRows
    n_context: int | None = None
    token_ids: Callable[[int, int], np.ndarray] | None = None


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """An array of a source. `series` is the file's name without its number."""

    name: str
    where: str
    series: str
    number: int | None
    total: int | None
    shape: tuple[int, ...]
    dtype: str
    read: ReadRows
    token_ids: ReadRows | None = None

    @property
    def n_rows(self) -> int:
        return int(np.prod(self.shape[:-1]))

    @property
    def n_context(self) -> int | None:
        return self.shape[1] if len(self.shape) == 3 else None


def find_foreign(
    source: Path, rename: Mapping[str, str], *, ignore: Sequence[str] = ()
) -> list[ForeignRows]:
    """The sites of a source, in the order of their names. Raises UserError with everything that is
    missing or does not fit together."""
    if not source.exists():
        raise UserError("there is nothing here to import", where=str(source))
    problems: list[Problem] = []
    readers = {
        "saelens": (_iter_arrow, _arrow_files(source, problems)),
        "zarr": (_iter_zarr, [source] if (source / "zarr.json").is_file() else []),
        "safetensors": (_iter_safetensors, _files_of(source, ".safetensors")),
        "npy": (_iter_npy, _files_of(source, ".npy")),
    }
    present = [name for name, (_, files) in readers.items() if files]
    if not present:
        raise UserError(
            "nothing here can be imported",
            where=str(source),
            expected="SAELens' cached activations (*.arrow), *.safetensors, *.npy or a Zarr group",
        )
    read, files = readers[present[0]]
    pointers = [path for path in files if path.is_file() and is_lfs_pointer(path)]
    problems += [lfs_problem(path) for path in pointers]
    files = [path for path in files if path not in pointers]
    problems += [
        Problem(what=f"files of another format beside {present[0]}", where=str(file))
        for name in present[1:]
        for file in readers[name][1]
    ]
    problems += _problems_of_other_files(source)
    pieces = [piece for piece in read(files, problems) if piece.name not in ignore] if files else []
    sites = _joined(present[0], pieces, rename, problems)
    if not sites and not problems:
        problems.append(Problem(what="there are no activations here", where=str(source)))
    if problems:
        raise UserError(
            f"{source.name} is incomplete or does not fit together",
            problems=tuple(problems),
            fix="complete it, or move what is no activation elsewhere; --ignore NAME leaves an "
            "array out",
        )
    return sites


def _joined(
    format_: str, pieces: Sequence[_Piece], rename: Mapping[str, str], problems: list[Problem]
) -> list[ForeignRows]:
    by_name: dict[str, list[_Piece]] = {}
    for piece in pieces:
        if problem := _problem_of_piece(piece):
            problems.append(problem)
        else:
            by_name.setdefault(piece.name, []).append(piece)
    problems += [
        Problem(what="no array of this name to rename", where=name)
        for name in rename
        if name not in {piece.name for piece in pieces}
    ]
    problems += _problems_of_names(by_name, rename)
    problems += _problems_of_series(by_name)
    problems += _problems_between_sites(by_name)
    if problems:
        return []
    return [
        _site(format_, _site_name(name, rename), sorted(parts, key=lambda each: each.number or 0))
        for name, parts in sorted(by_name.items())
    ]


def _site(format_: str, name: str, parts: Sequence[_Piece]) -> ForeignRows:
    bounds = np.cumsum([0, *(part.n_rows for part in parts)])
    ids = [part.token_ids for part in parts if part.token_ids is not None]
    read_ids = _spanning(bounds, ids) if len(ids) == len(parts) else None
    return ForeignRows(
        name=name,
        format=format_,
        n_rows=int(bounds[-1]),
        width=parts[0].shape[-1],
        read=_spanning(bounds, [part.read for part in parts]),
        n_context=parts[0].n_context,
        token_ids=None
        if read_ids is None
        else lambda start, stop: np.asarray(read_ids(start, stop)).reshape(-1),
    )


def _problem_of_piece(piece: _Piece) -> Problem | None:
    where = f"{piece.where}: {piece.name}"
    if len(piece.shape) not in (2, 3):
        return Problem(
            what="an array of the wrong shape",
            where=where,
            found=str(piece.shape),
            expected="(row, d) or (context, position, d)",
        )
    if piece.dtype not in _FLOATS:
        return Problem(
            what="not activations",
            where=where,
            found=piece.dtype,
            expected="floating-point numbers",
        )
    if 0 in piece.shape:
        return Problem(what="an empty array", where=where, found=str(piece.shape))
    return None


def _problems_of_names(
    by_name: Mapping[str, Sequence[_Piece]], rename: Mapping[str, str]
) -> Iterator[Problem]:
    sites: dict[str, list[str]] = {}
    for name in by_name:
        sites.setdefault(_site_name(name, rename), []).append(name)
    for site, names in sites.items():
        if len(names) > 1:
            yield Problem(what="two arrays of one site", where=site, found=", ".join(names))


def _problems_of_series(by_name: Mapping[str, Sequence[_Piece]]) -> Iterator[Problem]:
    """Each site is one file, or the whole of one numbered series; all sites of a series are in each
    of its files."""
    series: dict[str, dict[int, set[str]]] = {}
    totals: dict[str, set[int | None]] = {}
    for name, parts in by_name.items():
        if len({part.series for part in parts}) > 1 or len({part.number for part in parts}) != len(
            parts
        ):
            files = ", ".join(sorted(part.where for part in parts))
            yield Problem(what="one site in files that are no series", where=name, found=files)
            continue
        if len({part.shape[-1] for part in parts}) > 1:
            widths = sorted({part.shape[-1] for part in parts})
            found = ", ".join(map(str, widths))
            yield Problem(what="the files of one site differ in width", where=name, found=found)
        if len({part.dtype for part in parts}) > 1:
            found = ", ".join(sorted({part.dtype for part in parts}))
            yield Problem(what="the files of one site differ in dtype", where=name, found=found)
        for part in parts:
            is_by_layer = len(parts) == 1 and _is_of_its_layer(part)
            if part.number is not None and not is_by_layer:
                series.setdefault(part.series, {}).setdefault(part.number, set()).add(name)
                totals.setdefault(part.series, set()).add(part.total)
    for name, numbers in series.items():
        yield from _problems_of_numbers(name, numbers, totals[name])


def _problems_of_numbers(
    series: str, present: Mapping[int, set[str]], totals: set[int | None]
) -> Iterator[Problem]:
    first, last = min(0 if 0 in present else 1, min(present)), max(present)
    stated = totals - {None}
    if stated:
        last = max(last, first + max(each for each in stated if each is not None) - 1)
    missing = [str(each) for each in range(first, last + 1) if each not in present]
    if missing:
        yield Problem(
            what="parts of a numbered series are missing",
            where=series,
            found=f"{len(present)} parts",
            expected=f"also {', '.join(missing[:12])}" + (" …" if len(missing) > 12 else ""),
        )
    sites = set().union(*present.values())
    for number, names in sorted(present.items()):
        for name in sorted(sites - names):
            yield Problem(what=f"part {number} has no rows of this site", where=f"{series}: {name}")


def _problems_between_sites(by_name: Mapping[str, Sequence[_Piece]]) -> Iterator[Problem]:
    """Rows must be the same tokens at every site."""
    lengths = {name: sum(part.n_rows for part in parts) for name, parts in by_name.items()}
    if len(set(lengths.values())) > 1:
        for name, n in lengths.items():
            what = f"the sites differ in length, rows must be the same tokens: {n} rows"
            yield Problem(what=what, where=name)
        return
    contexts = {
        part.n_context for parts in by_name.values() for part in parts if part.n_context is not None
    }
    if len(contexts) > 1:
        found = ", ".join(map(str, sorted(contexts)))
        yield Problem(what="contexts of different length", found=f"{found} positions")
    by_number: dict[int, dict[str, int]] = {}
    for name, parts in by_name.items():
        if len(parts) > 1:
            for part in parts:
                by_number.setdefault(part.number or 0, {})[name] = part.n_rows
    for number, rows in sorted(by_number.items()):
        if len(set(rows.values())) > 1:
            found = ", ".join(f"{name} {n}" for name, n in rows.items())
            yield Problem(what=f"part {number} has other rows at each site", found=found)


def _is_of_its_layer(piece: _Piece) -> bool:
    """`layer_12.safetensors` with the site of layer 12 is no part 12 of a series."""
    try:
        return parse_site(piece.name).layer == piece.number
    except UserError:
        return False


def _problems_of_other_files(source: Path) -> list[Problem]:
    if not source.is_dir():
        return []
    files = [path for path in source.rglob("*") if path.suffix in _NOT_READ and path.is_file()]
    return [
        Problem(what="a file that is not read here", where=str(path)) for path in _numbered(files)
    ]


def _series_of(path: Path, pattern: re.Pattern[str]) -> tuple[str, str, int | None, int | None]:
    """The site a file is named after, its series, and its number and their total, if it has any."""
    match = pattern.fullmatch(path.stem)
    if match is None:
        return path.stem, str(path), None, None
    stem, total = match["stem"], match["total"]
    return stem, str(path.parent / stem), int(match["number"]), int(total) if total else None


def _iter_npy(files: Sequence[Path], problems: list[Problem]) -> Iterator[_Piece]:
    """`L3.npy`, or several a site: `L3-0.npy`, `L3-1.npy`, read by memory map."""
    for path in files:
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError) as error:
            problems.append(
                Problem(what="not an array that can be read", where=str(path), found=str(error))
            )
            continue
        name, series, number, total = _series_of(path, _NUMBERED_NAME)
        yield _Piece(
            name=name,
            where=str(path),
            series=series,
            number=number,
            total=total,
            shape=values.shape,
            dtype=str(values.dtype),
            read=_rows_of(lambda values=values: values),
        )


def _iter_safetensors(files: Sequence[Path], problems: list[Problem]) -> Iterator[_Piece]:
    from safetensors import SafetensorError, safe_open

    for path in files:
        _, series, number, total = _series_of(path, _NUMBERED)
        try:
            with safe_open(path, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                found = {
                    name: (tuple(each.get_shape()), each.get_dtype())
                    for name, each in slices.items()
                }
        except (SafetensorError, OSError) as error:
            problems.append(
                Problem(what="not a safetensors file", where=str(path), found=str(error))
            )
            continue
        for name, (shape, dtype) in found.items():
            yield _Piece(
                name=name,
                where=str(path),
                series=series,
                number=number,
                total=total,
                shape=shape,
                dtype=dtype,
                read=_rows_of(lambda path=path, name=name: _load_tensor(path, name)),
            )


def _load_tensor(path: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as opened:
        return opened.get_tensor(name)


def _rows_of(load: Callable[[], Any]) -> ReadRows:
    def read(start: int, stop: int) -> Tensor | np.ndarray:
        values = load()
        return values.reshape(-1, values.shape[-1])[start:stop]

    return read


def _iter_zarr(files: Sequence[Path], problems: list[Problem]) -> Iterator[_Piece]:
    """Arrays of a group, of any codec; every chunk must have been written."""
    import zarr

    (source,) = files
    opened = zarr.open(source, mode="r")
    if isinstance(opened, zarr.Group):
        arrays = dict(opened.members(max_depth=None))
    else:
        arrays = {source.stem: opened}
    for name, array in sorted(arrays.items()):
        if not isinstance(array, zarr.Array):
            continue
        if missing := _unwritten_chunks(array):
            problems.append(
                Problem(
                    what="chunks that were never written would be read as zeros",
                    where=f"{source}: {name}",
                    found=f"{missing} of {array.nchunks}",
                    expected="all of them (Zarr's write_empty_chunks where zeros are meant)",
                )
            )
        is_bfloat16 = array.attrs.get("logical_dtype") == "bfloat16"
        yield _Piece(
            name=name,
            where=str(source),
            series=name,
            number=None,
            total=None,
            shape=array.shape,
            dtype="bfloat16" if is_bfloat16 else str(array.dtype),
            read=_zarr_reader(array, is_bfloat16),
        )


def _unwritten_chunks(array: Any) -> int:
    """Files that are missing and, in shards, inner chunks that their index marks as missing."""
    if array.shards is None:
        return int(array.nchunks - array.nchunks_initialized)
    from zarr.core.sync import sync

    missing = 0
    per_shard = [shard // chunk for shard, chunk in zip(array.shards, array.chunks, strict=True)]
    for shard in np.ndindex(*(-(-n // s) for n, s in zip(array.shape, array.shards, strict=True))):
        inside = [
            -(-min(s, n - i * s) // c)
            for n, s, c, i in zip(array.shape, array.shards, array.chunks, shard, strict=True)
        ]
        key = array.metadata.encode_chunk_key(shard)
        index = sync(
            array.metadata.codecs[0]._load_shard_index_maybe(
                array.store_path / key, tuple(per_shard)
            )
        )
        wanted = np.ndindex(*inside)
        missing += (
            int(np.prod(inside))
            if index is None
            else sum(index.offsets_and_lengths[each][0] == 2**64 - 1 for each in wanted)
        )
    return missing


def _zarr_reader(array: Any, is_bfloat16: bool) -> ReadRows:
    width = array.shape[-1]
    per_row = array.shape[1] if array.ndim == 3 else 1

    def read(start: int, stop: int) -> Tensor | np.ndarray:
        first, last = start // per_row, -(-stop // per_row)
        values = np.asarray(array[first:last]).reshape(-1, width)
        values = values[start - first * per_row : stop - first * per_row]
        if is_bfloat16:
            return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
        return values

    return read


def _arrow_files(source: Path, problems: list[Problem]) -> list[Path]:
    """The files of a data set in the order that its `state.json` gives; of names without one."""
    files = [path for path in _files_of(source, ".arrow") if not path.name.startswith("cache-")]
    state = source / "state.json"
    if not files or not state.is_file():
        return files
    named = [
        source / entry["filename"]
        for entry in json.loads(state.read_text(encoding="utf-8"))["_data_files"]
    ]
    problems += [
        Problem(what="files of the data set are missing", where=str(path))
        for path in named
        if not path.is_file()
    ]
    problems += [
        Problem(what="a file that the data set's state.json does not name", where=str(path))
        for path in files
        if path not in named
    ]
    return [path for path in named if path.is_file()]


def _iter_arrow(files: Sequence[Path], problems: list[Problem]) -> Iterator[_Piece]:
    """SAELens' `CacheActivationsRunner`: `save_to_disk` of a data set; column `<hook>`: (context,
    d), `token_ids`."""
    import pyarrow as pa

    in_order = (files[0].parent / "state.json").is_file() if files else False
    for place, path in enumerate(files):
        try:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
        except (pa.ArrowInvalid, OSError) as error:
            problems.append(Problem(what="not an Arrow stream", where=str(path), found=str(error)))
            continue
        _, series, number, total = _series_of(path, _NUMBERED)
        if in_order or (len(files) == 1 and total is None):
            series, number, total = str(path.parent), place, None
        names = [name for name in table.schema.names if name not in _TOKEN_COLUMNS]
        ids = next((name for name in _TOKEN_COLUMNS if name in table.schema.names), None)
        for name in names:
            try:
                shape = _arrow_shape(table, name)
                token_ids = None
                if ids is not None:
                    if _arrow_shape(table, ids) != shape[:2]:
                        raise ValueError(f"{ids} are of other contexts")
                    token_ids = _arrow_rows(table, ids, shape[1], 1)
            except ValueError as error:
                where = f"{path}: {name}"
                what = "the column does not hold (context, d) arrays of one shape"
                problems.append(Problem(what=what, where=where, found=str(error)))
                continue
            yield _Piece(
                name=name,
                where=str(path),
                series=series,
                number=number,
                total=total,
                shape=shape,
                dtype=_arrow_dtype(table, name),
                read=_arrow_rows(table, name, shape[1], shape[2]),
                token_ids=token_ids,
            )


def _arrow_shape(table: Any, column: str) -> tuple[int, ...]:
    """The shape of a column of nested lists. Raises ValueError where they are ragged or null."""
    import pyarrow.compute as pc

    shape = [table.num_rows]
    chunks = [_storage(chunk) for chunk in table.column(column).chunks]
    if any(chunk.null_count for chunk in chunks):
        raise ValueError("rows are null")
    while chunks and _is_list(chunks[0]):
        lengths = {
            n for chunk in chunks for n in pc.unique(pc.list_value_length(chunk)).to_pylist()
        }
        if len(lengths) != 1 or None in lengths:
            raise ValueError(f"lists of {sorted(map(str, lengths))} entries")
        shape.append(lengths.pop())
        chunks = [chunk.flatten() for chunk in chunks]
        if any(chunk.null_count for chunk in chunks):
            raise ValueError("entries are null")
    if len(shape) != (2 if column in _TOKEN_COLUMNS else 3):
        raise ValueError(f"shape {tuple(shape)}")
    return tuple(shape)


def _arrow_dtype(table: Any, column: str) -> str:
    array = _storage(table.column(column).chunk(0))
    while _is_list(array):
        array = array.flatten()
    return {"halffloat": "float16", "float": "float32", "double": "float64"}.get(
        str(array.type), str(array.type)
    )


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


def _storage(chunk: Any) -> Any:
    return getattr(chunk, "storage", chunk)


def _flat(array: Any) -> np.ndarray:
    while _is_list(array):
        array = array.flatten()
    return array.to_numpy(zero_copy_only=False)


def _is_list(array: Any) -> bool:
    import pyarrow as pa

    kind = array.type
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _site_name(name: str, rename: Mapping[str, str]) -> str:
    """The store's name for a site: as renamed, and the long form where it is a site of a
    transformer."""
    wanted = rename.get(name, name)
    try:
        return parse_site(wanted).name
    except UserError:
        return wanted


def _files_of(source: Path, suffix: str) -> list[Path]:
    if source.is_file():
        return [source] if source.suffix == suffix else []
    return _numbered([path for path in source.rglob(f"*{suffix}") if path.is_file()])


def _numbered(paths: Sequence[Path]) -> list[Path]:
    """Paths in the order of their names, numbers read as numbers: part-2 before part-10."""
    return sorted(
        paths,
        key=lambda p: [
            (0, int(part), "") if part.isdecimal() else (1, 0, part)
            for part in re.split(r"(\d+)", str(p))
        ],
    )


def _spanning(bounds: np.ndarray, readers: Sequence[ReadRows]) -> ReadRows:
    """Rows across several pieces, whose borders are `bounds`."""

    def read(start: int, stop: int) -> Tensor | np.ndarray:
        parts = []
        for reader, begin, end in zip(readers, bounds[:-1], bounds[1:], strict=True):
            low, high = max(start, int(begin)), min(stop, int(end))
            if low < high:
                parts.append(reader(low - int(begin), high - int(begin)))
        if len(parts) == 1:
            return parts[0]
        if isinstance(parts[0], Tensor):
            return torch.cat([torch.as_tensor(part) for part in parts])
        return np.concatenate([np.asarray(part) for part in parts])

    return read
