"""Named tensors from files that may be hostile: read without executing anything, then check names
and shapes.

1. `read_safetensors`, `read_npz`, `read_pt` turn one file into float32 tensors (and, for `.pt`, a
   few plain values). NumPy files are read with `allow_pickle=False`, torch files with
   `weights_only=True`.
2. `checked` names every missing, misshaped, non-floating or non-finite tensor at once; sizes such
   as `d_in` are written as words and must agree between tensors.
3. `read_json` and `read_yaml` read the description beside the weights; `write_tensors` writes
   weights.

Cost: one pass over the tensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from featureflow.errors import Problem, UserError
from featureflow.files import written_atomically

Shape = tuple[str | int, ...]
_LONGEST_HEADER = 100 << 20


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            json.loads(stream.read(min(length, _LONGEST_HEADER)), object_pairs_hook=_without_twins)
        return load_file(path)
    except (OSError, SafetensorError, ValueError, struct.error, RecursionError) as error:
        raise _unreadable(path, "safetensors", error) from error


def write_tensors(
    tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None
) -> None:
    """A safetensors file, written in one piece."""
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    with written_atomically(path) as beside:
        save_file(plain, beside, metadata=metadata)


def read_npz(path: Path) -> dict[str, Tensor]:
    """All arrays of a NumPy archive. An array of Python objects (a pickle) is refused."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            _without_twins([(name, None) for name in archive.files])
            return {name: torch.from_numpy(np.array(archive[name])) for name in archive.files}
    except Exception as error:  # the readers of damaged archives raise almost anything
        raise _unreadable(path, "a NumPy archive of plain arrays", error) from error


def read_pt(path: Path) -> dict[str, Any]:
    """The mapping in a torch file: tensors and plain values. Anything that would execute on load is
    refused."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # torch's restricted reader raises almost anything on random bytes
        raise _unreadable(path, "a torch file of tensors and plain values only", error) from error
    if not isinstance(found, Mapping):
        raise UserError(
            "not a mapping of names to tensors", where=str(path), found=type(found).__name__
        )
    return {str(name): value for name, value in found.items()}


def _is_zip(path: Path) -> bool:
    """Whether torch can map the file instead of reading it."""
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object."""
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=_without_twins)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise _unreadable(path, "a JSON object", error) from error
    if not isinstance(found, dict):
        raise UserError("not a JSON object", where=str(path), found=type(found).__name__)
    return found


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping of plain values."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise _unreadable(path, "a YAML mapping", error) from error
    if not isinstance(found, dict):
        raise UserError("not a YAML mapping", where=str(path), found=type(found).__name__)
    return found


def _without_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping, when no name comes twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twins = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"twice in the file: {', '.join(twins)}")
    return found


def lowered(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The same tensors by names in lower case. Raises UserError when two share one."""
    try:
        return _without_twins([(name.lower(), tensor) for name, tensor in tensors.items()])
    except ValueError as error:
        raise UserError("two tensors of one name", where=str(where), found=str(error)) from error


def checked(
    tensors: Mapping[str, Any],
    shapes: Mapping[str, Shape],
    *,
    where: Path,
    sizes: Mapping[str, int] | None = None,
    optional: frozenset[str] = frozenset(),
    only: bool | frozenset[str] = False,
) -> dict[str, Tensor]:
    """The named tensors as float32, when every one has its shape; else one UserError with all
    problems.

    A size written as a word takes its value from `sizes`, or from the first tensor that has it.
    With `only`, other tensors (or those named) are problems too: what would be dropped might change
    what the file computes.
    """
    known = dict(sizes or {})
    problems: list[Problem] = []
    for name, shape in shapes.items():
        if name not in tensors:
            if name not in optional:
                problems.append(
                    Problem(what="missing tensor", where=name, expected=_written(shape, known))
                )
            continue
        problems += _problems_of(name, tensors[name], shape, known)
    if only:
        others = set(tensors) - set(shapes)
        unknown = sorted(others if only is True else others & only)
        problems += [
            Problem(what="a tensor that this kind does not have", where=n) for n in unknown
        ]
    if problems:
        raise UserError(
            f"{where} does not hold the tensors of its format", problems=tuple(problems)
        )
    return {name: tensors[name].detach().float().contiguous() for name in shapes if name in tensors}


def _problems_of(name: str, tensor: Any, shape: Shape, known: dict[str, int]) -> Iterator[Problem]:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = str(tensor.dtype) if isinstance(tensor, Tensor) else type(tensor).__name__
        yield Problem(what="not a floating-point tensor", where=name, found=kind)
        return
    if tensor.ndim == len(shape):
        for word, size in zip(shape, tensor.shape, strict=True):
            if isinstance(word, str):
                known.setdefault(word, size)
    expected = tuple(known.get(word, -1) if isinstance(word, str) else word for word in shape)
    if tuple(tensor.shape) != expected or 0 in tensor.shape:
        yield Problem(
            what="shape", where=name, expected=_written(shape, known), found=str(list(tensor.shape))
        )
    elif not torch.isfinite(tensor.float()).all():
        yield Problem(what="NaN or infinity", where=name)


def _written(shape: Shape, known: Mapping[str, int]) -> str:
    words = [
        f"{word}={known[word]}" if isinstance(word, str) and word in known else str(word)
        for word in shape
    ]
    return "[" + ", ".join(words) + "]"


def _unreadable(path: Path, expected: str, error: Exception) -> UserError:
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        "the file cannot be read, or holds something that is not plain data",
        where=str(path),
        expected=expected,
        found=first[:300],
        fix="download it again, or convert it to safetensors where it was made",
    )
