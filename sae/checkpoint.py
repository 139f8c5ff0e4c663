"""A training run's whole state in one safetensors file: tensors in its body, plain JSON in its
header, written in one piece: a kill leaves the old state or the new one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from featureflow.errors import UserError
from sae.formats.tensors import write_tensors

_STATE = "state"


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(tensors, path, metadata={_STATE: json.dumps(state, allow_nan=False)})


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the state. Raises UserError when the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()[_STATE])
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        fix = "delete it to start this site again"
        raise UserError(
            "the checkpoint cannot be read", where=str(path), found=str(error), fix=fix
        ) from error
