"""Recipes: one TOML file, one section per stage, parsed once into the stages' frozen configs.

1. read the TOML (a name is looked up in `configs/`, anything else is a path);
2. lay command-line overrides (`--train.steps 500`) over it, each value read as TOML;
3. walk the stages' `Config` dataclasses beside the document. A union of dataclasses is chosen by
   its `kind`; leaves are checked strictly by pydantic, bounds from `Annotated` included;
4. report every problem at once, with its place and, for a misspelt key, the nearest right one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError

from featureflow.errors import Problem, UserError
from pipeline.stages import STAGES, StageName

_TOP_LEVEL = ("description",)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A validated recipe: `configs[stage]` is that stage's `Config`."""

    name: str
    description: str
    configs: Mapping[str, Any]


def recipe_path(name_or_path: str) -> Path:
    """The file of a recipe: a path that exists, or `configs/<name>.toml` here or beside the
    installed package."""
    candidates = [Path(name_or_path)] if name_or_path.endswith(".toml") else []
    folders = (Path("configs"), Path(__file__).parents[2] / "configs")
    candidates += [folder / f"{name_or_path}.toml" for folder in folders]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = sorted({p.stem for folder in folders if folder.is_dir() for p in folder.glob("*.toml")})
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
        fix="featureflow recipes",
    )


def read_recipe(
    name_or_path: str, overrides: Mapping[str, str] | None = None, stages: Sequence[str] = STAGES
) -> Recipe:
    """Parse a recipe for the given stages. Raises UserError with every problem of every section."""
    path = recipe_path(name_or_path)
    document = _read_toml(path)
    problems = _apply_overrides(document, overrides or {})
    problems += [
        _unknown_key(key, (*STAGES, *_TOP_LEVEL), str(path))
        for key in document
        if key not in (*STAGES, *_TOP_LEVEL)
    ]
    configs: dict[str, Any] = {}
    for stage in stages:
        config_type = StageName(stage).module.Config
        configs[stage] = _parse_dataclass(config_type, document.get(stage, {}), stage, problems)
    if problems:
        named = {
            (problem.where or "").split(".")[0].split("[")[0].rstrip(":") for problem in problems
        }
        command = next((stage for stage in STAGES if named == {stage}), "run")
        raise UserError(
            f"recipe {path} cannot be used",
            problems=tuple(problems),
            fix=f"featureflow {command} --help",
        )
    return Recipe(name=path.stem, description=document.get("description", ""), configs=configs)


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
            place[leaf] = _read_value(text)
    return problems


def _read_value(text: str) -> Any:
    """A command-line value as TOML would read it; what TOML cannot read is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _parse_dataclass(cls: Any, raw: Any, where: str, problems: list[Problem]) -> Any:
    if not isinstance(raw, dict):
        problems.append(
            Problem(what="not a section", where=where, expected="a table", found=_show(raw))
        )
        return None
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    before = len(problems)
    problems.extend(_unknown_key(key, fields, where) for key in raw if key not in fields)
    values = {}
    for name, field in fields.items():
        if name in raw:
            values[name] = _parse_value(hints[name], raw[name], f"{where}.{name}", problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(
                Problem(what="missing", where=f"{where}.{name}", expected=_show_type(hints[name]))
            )
    if len(problems) > before:
        return None
    try:
        return cls(**values)
    except (ValueError, UserError) as error:
        found = error.problems if isinstance(error, UserError) else (Problem(what=str(error)),)
        problems.extend(
            dataclasses.replace(p, where=where if p.where is None else f"{where}: {p.where}")
            for p in found
        )
        return None


def _parse_value(hint: Any, raw: Any, where: str, problems: list[Problem]) -> Any:
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if dataclasses.is_dataclass(bare):
        return _parse_dataclass(bare, raw, where, problems)
    if get_origin(bare) in (Union, types.UnionType):
        choices = {
            kind: c for c in get_args(bare) if dataclasses.is_dataclass(c) for kind in _kinds(c)
        }
        if choices and isinstance(raw, (dict, str)):
            return _parse_choice(choices, raw, where, problems)
    if get_origin(bare) is tuple and get_args(bare)[1:] == (Ellipsis,) and isinstance(raw, list):
        return tuple(
            _parse_value(get_args(bare)[0], item, f"{where}[{i}]", problems)
            for i, item in enumerate(raw)
        )
    if get_origin(bare) in (dict, Mapping) and isinstance(raw, dict):
        return {
            key: _parse_value(get_args(bare)[1], item, f"{where}.{key}", problems)
            for key, item in raw.items()
        }
    return _parse_leaf(hint, raw, where, problems)


def _parse_choice(choices: Mapping[str, Any], raw: Any, where: str, problems: list[Problem]) -> Any:
    """One of several dataclasses, named by `kind`; the bare name stands for a choice with all its
    defaults."""
    table = {"kind": raw} if isinstance(raw, str) else raw
    kind = table.get("kind", next(iter(choices)) if len(choices) == 1 else None)
    if kind not in choices:
        what = "missing key" if kind is None else "no such kind"
        problems.append(
            Problem(
                what=what,
                where=f"{where}.kind",
                expected=" | ".join(choices),
                found=None if kind is None else _show(kind),
            )
        )
        return None
    return _parse_dataclass(choices[str(kind)], table, where, problems)


def _kinds(choice: Any) -> tuple[str, ...]:
    hint = typing.get_type_hints(choice).get("kind")
    return get_args(hint) if get_origin(hint) is Literal else (choice.__name__.lower(),)


def _parse_leaf(hint: Any, raw: Any, where: str, problems: list[Problem]) -> Any:
    try:
        return TypeAdapter(hint).validate_json(json.dumps(raw, default=str), strict=True)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            place = where + "".join(
                f"[{p}]" if isinstance(p, int) else f".{p}"
                for p in detail["loc"]
                if isinstance(p, int)
            )
            problems.append(
                Problem(
                    what=detail["msg"], where=place, expected=_show_hint(hint), found=_show(raw)
                )
            )
        return None


def _unknown_key(key: str, known: Sequence[str] | Mapping[str, Any], where: str) -> Problem:
    near = difflib.get_close_matches(key, list(known), n=1)
    expected = f"did you mean {near[0]!r}?" if near else ", ".join(known)
    return Problem(what="unknown key", where=f"{where}.{key}", expected=expected)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _show_type(hint: Any) -> str:
    """A type in words: `list of str`, `table of str`, `int or none`; a dataclass by its fields."""
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(bare) is Literal:
        return " | ".join(repr(choice) for choice in get_args(bare))
    if get_origin(bare) is tuple:
        return f"list of {_show_type(get_args(bare)[0])}"
    if get_origin(bare) in (dict, Mapping):
        return f"table of {_show_type(get_args(bare)[1])}"
    if get_origin(bare) in (Union, types.UnionType):
        return " or ".join(
            "none" if each is type(None) else _show_type(each) for each in get_args(bare)
        )
    if dataclasses.is_dataclass(bare):
        return "{" + ", ".join(f.name for f in dataclasses.fields(bare)) + "}"
    return bare.__name__ if isinstance(bare, type) else str(bare).replace("typing.", "")


def describe_fields(cls: Any, prefix: str) -> list[tuple[str, str, str, str]]:
    """Rows (field, type, default, meaning) of a config dataclass, choices unfolded; the source of
    every `--help`."""
    rows = []
    hints = typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        place = f"{prefix}.{field.name}"
        rows.append((place, _show_hint(hint), _show_default(field), _doc_of(hint)))
        bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        if get_origin(bare) is tuple and dataclasses.is_dataclass(get_args(bare)[0]):
            rows += _describe_entries(get_args(bare)[0], place)
        options = get_args(bare) if get_origin(bare) in (Union, types.UnionType) else (bare,)
        for option in options:
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                tag = f"{place}" if len(options) == 1 else f"{place}({_kinds(option)[0]})"
                rows += [
                    row for row in describe_fields(option, tag) if not row[0].endswith(".kind")
                ]
    return rows


def _describe_entries(cls: Any, place: str) -> list[tuple[str, str, str, str]]:
    """Rows of what one entry of a list of tables may say; choices inside are those of the fields
    above."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = [f for f in dataclasses.fields(cls) if f.init]
    return [
        (f"{place}[].{f.name}", _show_hint(hints[f.name]), _show_default(f), _doc_of(hints[f.name]))
        for f in fields
    ]


def _show_hint(hint: Any) -> str:
    bare = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    if get_origin(bare) in (Union, types.UnionType):
        kinds = [
            _kinds(o)[0] if dataclasses.is_dataclass(o) else _show_type(o) for o in get_args(bare)
        ]
        return " | ".join("none" if kind == "NoneType" else kind for kind in kinds)
    bounds = (
        [_show_bound(b) for b in get_args(hint)[1:] if type(b).__name__ in _BOUND_SIGNS]
        if hint is not bare
        else []
    )
    return " ".join([_show_type(bare), *bounds])


_BOUND_SIGNS = {
    "Gt": ("gt", ">"),
    "Ge": ("ge", "≥"),
    "Lt": ("lt", "<"),
    "Le": ("le", "≤"),
    "MinLen": ("min_length", "length ≥"),
}


def _show_bound(bound: Any) -> str:
    attribute, sign = _BOUND_SIGNS[type(bound).__name__]
    return f"{sign} {getattr(bound, attribute)}"


def _show_default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if dataclasses.is_dataclass(value):
        return str(getattr(value, "kind", type(value).__name__))
    return json.dumps(value, default=str) if value is not None else "none"


def _doc_of(hint: Any) -> str:
    for note in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
        if type(note).__name__ == "Doc":
            return str(note.documentation)
    return ""
