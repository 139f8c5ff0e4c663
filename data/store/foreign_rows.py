"""What readers of foreign activations share: named rows, names of sites, files in order, rows
across several pieces."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from featureflow.errors import UserError
from featureflow.sites import parse_site

ReadRows = Callable[[int, int], "Tensor | np.ndarray"]


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


def site_name(name: str, rename: Mapping[str, str]) -> str:
    """The store's name for a site: as renamed, and the long form where it is a site of a
    transformer."""
    wanted = rename.get(name, name)
    try:
        return parse_site(wanted).name
    except UserError:
        return wanted


def numbered(paths: Sequence[Path]) -> list[Path]:
    """Paths in the order of their names, numbers read as numbers: part-2 before part-10."""
    return sorted(
        paths,
        key=lambda p: [
            int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(p))
        ],
    )


def files_of(source: Path, suffix: str) -> list[Path]:
    if source.is_file():
        return [source] if source.suffix == suffix else []
    return numbered([path for path in source.rglob(f"*{suffix}") if path.is_file()])


def spanning(bounds: np.ndarray, readers: Sequence[ReadRows]) -> ReadRows:
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
