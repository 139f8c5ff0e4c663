"""What other packages add: one mechanism for every extension point.

A package names a thing in an entry point group of its `pyproject.toml`, and nothing else changes:

    [project.entry-points."featureflow.matchers"]
    nearest = "mine.matching:nearest"

    architectures   a Settings with a `kind` (sae/architectures/base.py), its activation beside it
    matchers        a function of a pair of dictionaries (pipeline/flow/matchers.py)
    edits           a class of steering/edits.py
    exports         a function that writes a run for another tool
    formats         a module with FORMATS (sae/formats/base.py)
    lenses          a module with Config and look (pipeline/lenses/base.py)

Cost: reading the names of installed packages, some milliseconds, once for each search path; a
package is imported when its group is asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from featureflow.errors import UserError


def loaders(group: str) -> dict[str, Callable[[], Any]]:
    """How to load what packages add to `group`, by name. Raises UserError for a name that two of
    them use; a loader for a package that cannot be imported."""
    found: dict[str, Callable[[], Any]] = {}
    for entry in _entries(group, tuple(sys.path)):
        if entry.name in found:
            raise _unusable(entry, f"another package adds {entry.name!r}")
        found[entry.name] = partial(_loaded, entry)
    return found


def plugins(group: str) -> dict[str, Any]:
    """What packages add to `group`, loaded, by name. Raises UserError."""
    return {name: load() for name, load in loaders(group).items()}


@lru_cache
def _entries(group: str, search_path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """What the packages in `sys.path` name, which must be `search_path`."""
    return tuple(entry_points(group=f"featureflow.{group}"))


def _loaded(entry: EntryPoint) -> Any:
    try:
        return entry.load()
    except Exception as error:  # a package of others may fail in any way
        raise _unusable(entry, f"{type(error).__name__}: {error}") from error


def _unusable(entry: EntryPoint, found: str) -> UserError:
    package = entry.dist.name if entry.dist else "?"
    return UserError(
        f"a package that adds to {entry.group} cannot be used",
        where=f"{package}: {entry.name} = {entry.value}",
        found=found,
        fix="correct the package, or uninstall it",
    )
