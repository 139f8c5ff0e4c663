"""Public names of a package that are imported when they are first used (PEP 562).

A package lists them once, as imports under `if TYPE_CHECKING`. Type checkers read them there, and
so does `lazy_names`.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazy_names(package: str, file: str) -> tuple[Callable[[str], Any], list[str]]:
    """`__getattr__` and `__all__` of a package whose `__init__.py` is `file`."""
    body = ast.parse(Path(file).read_text(encoding="utf-8")).body
    homes = {
        alias.name: line.module
        for block in body
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for line in block.body
        if isinstance(line, ast.ImportFrom) and line.module
        for alias in line.names
    }

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return get, sorted(homes)
