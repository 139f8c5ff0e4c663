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

Cost: reading the names of installed packages, some milliseconds; a package is imported when its
group is asked for.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from featureflow.errors import Problem, UserError


def plugins(group: str) -> dict[str, Any]:
    """What packages add to `group`, loaded, by name. Raises UserError with every one that cannot be
    imported and every name that two packages use."""
    found: dict[str, Any] = {}
    problems = []
    for entry in entry_points(group=f"featureflow.{group}"):
        where = f"{entry.dist.name if entry.dist else '?'}: {entry.name} = {entry.value}"
        if entry.name in found:
            problems.append(Problem(what="the name is taken", where=where))
        try:
            found[entry.name] = entry.load()
        except Exception as error:  # a package of others may fail in any way
            text = f"{type(error).__name__}: {error}"
            problems.append(Problem(what="it cannot be imported", where=where, found=text))
    if problems:
        raise UserError(
            f"a package that adds to featureflow.{group} cannot be used",
            problems=tuple(problems),
            fix="correct the package, or uninstall it",
        )
    return found
