"""Recipes: one TOML file, one section per stage, parsed once into the stages' frozen configs.

1. read the TOML (a name is looked up in `configs/`, anything else is a path);
2. lay command-line overrides (`--train.steps 500`) over it, each value read as TOML;
3. let each stage's `Config` read its section (featureflow/settings.py), and report every problem
   of all of them at once, with its place and, for a misspelt key, the nearest right one.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featureflow.errors import Command, Problem, UserError
from featureflow.settings import unknown_key
from pipeline.stages import MOVED, STAGES, StageName, section_of

_TOP_LEVEL = ("description",)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A validated recipe: `configs[stage]` is that stage's `Config`."""

    name: str
    description: str
    configs: Mapping[str, Any]


def known_recipes() -> dict[str, Path]:
    """The recipes that can be named: those in `configs/` here, then those of the package."""
    paths = [path for folder in _folders() for path in sorted(folder.glob("*.toml"))]
    return {path.stem: path for path in reversed(paths)}


def description_of(path: Path) -> str:
    """What a recipe says of itself."""
    return _read_toml(path).get("description", "")


def _folders() -> tuple[Path, ...]:
    package = Path(__file__).parents[1]  # a wheel has the recipes inside, a checkout beside it
    return Path("configs"), package / "configs", package.parent / "configs"


def recipe_path(name_or_path: str) -> Path:
    """The file of a recipe: a path that exists, or `configs/<name>.toml` here or with the installed
    package."""
    candidates = [Path(name_or_path)] if name_or_path.endswith(".toml") else []
    candidates += [folder / f"{name_or_path}.toml" for folder in _folders()]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted(known_recipes())
    beside = [str(p) for p in Path(name_or_path).parent.glob("*.toml")]
    near = difflib.get_close_matches(
        name_or_path, [*known, *beside, *(b.removesuffix(".toml") for b in beside)], n=1
    )
    meant = (
        f"; did you mean {near[0] if near[0] in (*known, *beside) else near[0] + '.toml'}?"
        if near
        else ""
    )
    raise UserError(
        f"there is no recipe {name_or_path!r}",
        expected=f"one of {', '.join(known)}, or the path of a .toml file{meant}",
        fix=Command("recipes"),
    )


def read_recipe(
    name_or_path: str, overrides: Mapping[str, str] | None = None, stages: Sequence[str] = STAGES
) -> Recipe:
    """Parse a recipe for the given stages. Raises UserError with every problem of every section."""
    path = recipe_path(name_or_path)
    document = _read_toml(path)
    problems = _apply_overrides(document, overrides or {})
    problems += _moved(document)
    problems += [
        unknown_key(key, (*STAGES, *_TOP_LEVEL), str(path))
        for key in document
        if key not in (*STAGES, *_TOP_LEVEL)
    ]
    configs: dict[str, Any] = {}
    for stage in stages:
        section, config_type = section_of(stage), StageName(stage).module.Config
        configs[stage] = config_type.read(document.get(section, {}), section, problems)
    if problems:
        named = {
            (problem.where or "").split(".")[0].split("[")[0].rstrip(":") for problem in problems
        }
        command = next((stage for stage in STAGES if named == {stage}), "run")
        raise UserError(
            f"recipe {path} cannot be used",
            problems=tuple(problems),
            fix=Command(command, "--help"),
        )
    return Recipe(name=path.stem, description=document.get("description", ""), configs=configs)


def lens_options(name_or_path: str, lens: str) -> dict[str, Any]:
    """What a recipe says of a lens; nothing for a run that no recipe has the name of."""
    try:
        document = _read_toml(recipe_path(name_or_path))
    except UserError:
        return {}
    return document.get("lenses", {}).get(lens, {})


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError("the recipe is not TOML", where=str(path), found=str(error)) from error


def _apply_overrides(document: dict[str, Any], overrides: Mapping[str, str]) -> list[Problem]:
    problems = []
    for dotted, text in overrides.items():
        *parents, leaf = dotted.split(".")
        place: Any = document
        for parent in parents:
            place = place.setdefault(parent, {}) if isinstance(place, dict) else None
        if not parents or not isinstance(place, dict):
            problems.append(
                Problem(
                    what="not a place in a recipe",
                    where=f"--{dotted}",
                    expected="--<stage>.<field>",
                )
            )
        else:
            place[leaf] = value_of(text)
    return problems


def _moved(document: dict[str, Any]) -> list[Problem]:
    """Settings of earlier recipes, taken out of the document, each with its new place."""
    found = []
    for old, new in MOVED.items():
        stage, field = old.split(".")
        section = document.get(stage)
        if isinstance(section, dict) and section.pop(field, None) is not None:
            found.append(Problem(what="this setting moved", where=old, expected=new))
            if not section and stage not in STAGES:
                del document[stage]
    return found


def value_of(text: str) -> Any:
    """A command-line value as TOML would read it; what TOML cannot read is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
