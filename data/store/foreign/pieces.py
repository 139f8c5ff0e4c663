"""The arrays that a foreign source is made of, and how those of one site become one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featureflow.errors import Problem, UserError
from featureflow.sites import parse_site

ReadRows = Callable[[int, int], "Tensor | np.ndarray"]
_FLOATS = ("float16", "float32", "float64", "bfloat16", "F16", "F32", "F64", "BF16")


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
class Piece:
    """An array (row, d) or (context, position, d). `series` is the file's name without its number,
    `broken` what makes it unusable."""

    name: str
    where: str
    series: str
    shape: tuple[int, ...]
    dtype: str
    read: ReadRows
    number: int | None = None
    total: int | None = None
    token_ids: ReadRows | None = None
    broken: Problem | None = None

    @property
    def n_rows(self) -> int:
        return int(np.prod(self.shape[:-1]))

    @property
    def n_context(self) -> int | None:
        return self.shape[1] if len(self.shape) == 3 else None

    @cached_property
    def problem(self) -> Problem | None:
        where = f"{self.where}: {self.name}"
        if self.broken is not None:
            return self.broken
        if len(self.shape) not in (2, 3):
            what, expected = "an array of the wrong shape", "(row, d) or (context, position, d)"
            return Problem(what=what, where=where, found=str(self.shape), expected=expected)
        if self.dtype not in _FLOATS:
            what, expected = "not activations", "floating-point numbers"
            return Problem(what=what, where=where, found=self.dtype, expected=expected)
        if 0 in self.shape:
            return Problem(what="an empty array", where=where, found=str(self.shape))
        return None


def joined(format_: str, name: str, parts: Sequence[Piece]) -> ForeignRows:
    """One site, its parts in the order of their numbers."""
    parts = sorted(parts, key=lambda each: each.number or 0)
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


def site_name(name: str, rename: Mapping[str, str]) -> str:
    """The store's name for a site: as renamed, and the long form where it is a site of a
    transformer."""
    wanted = rename.get(name, name)
    try:
        return parse_site(wanted).name
    except UserError:
        return wanted


def numbered(source: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """The source, or what lies in it, in the order of names, numbers read as numbers: part-2 before
    part-10."""
    paths = [source, *source.rglob("*")] if source.is_dir() else [source]
    return sorted(
        (path for path in paths if wanted(path)),
        key=lambda path: [
            (0, int(part), "") if part.isdecimal() else (1, 0, part)
            for part in re.split(r"(\d+)", str(path))
        ],
    )


def with_suffix(source: Path, suffix: str) -> list[Path]:
    return numbered(source, lambda path: path.suffix.lower() == suffix and path.is_file())


def series_of(path: Path, *, may_be_all: bool = True) -> dict[str, Any]:
    """Series, number and total of a file, as fields of a piece; with `may_be_all` a name may be a
    number only."""
    match = re.fullmatch(
        rf"(.{'*' if may_be_all else '+'}?)[-_]{'?' if may_be_all else ''}(\d+)(?:-of-(\d+))?",
        path.stem,
    )
    if match is None:
        return {"series": str(path)}
    total = int(match[3]) if match[3] else None
    return {"series": str(path.parent / match[1]), "number": int(match[2]), "total": total}


def rows_of(load: Callable[[], Any]) -> ReadRows:
    """Reader of an array that `load` gives whole."""

    def read(start: int, stop: int) -> Tensor | np.ndarray:
        values = load()
        return values.reshape(-1, values.shape[-1])[start:stop]

    return read


def _spanning(bounds: np.ndarray, readers: Sequence[ReadRows]) -> ReadRows:
    """Rows across several pieces, whose borders are `bounds`."""

    def read(start: int, stop: int) -> Tensor | np.ndarray:
        parts = [
            reader(max(start, int(begin)) - int(begin), min(stop, int(end)) - int(begin))
            for reader, begin, end in zip(readers, bounds[:-1], bounds[1:], strict=True)
            if max(start, int(begin)) < min(stop, int(end))
        ]
        if len(parts) == 1:
            return parts[0]
        if isinstance(parts[0], Tensor):
            return torch.cat([torch.as_tensor(part) for part in parts])
        return np.concatenate([np.asarray(part) for part in parts])

    return read
