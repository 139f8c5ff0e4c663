"""Which code, on what, makes an artifact: the digest of this project's own files, versions of
packages, the commit."""

from __future__ import annotations

import hashlib
import platform
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

_ROOMS = ("featureflow", "sae", "data", "steering", "pipeline")
_PACKAGES = (
    "torch",
    "transformer-lens",
    "transformers",
    "zarr",
    "dask",
    "numpy",
    "safetensors",
    "pyarrow",
)


@cache
def code_digest() -> str:
    """sha256 over the Python files of this project, by name and bytes, shortened: which code is
    running."""
    root = Path(__file__).parent.parent
    hasher = hashlib.sha256()
    for path in sorted(file for room in _ROOMS for file in (root / room).rglob("*.py")):
        hasher.update(
            f"{path.relative_to(root).as_posix()}:".encode()
            + hashlib.sha256(path.read_bytes()).digest()
        )
    return hasher.hexdigest()[:16]


@cache
def made_by() -> dict[str, Any]:
    """What a manifest says about its making, all but the time."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "code": code_digest(),
        "commit": _commit(),
        "command": " ".join(Path(a).name for a in sys.argv[:1]),
        "machine": platform.machine(),
    }


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
