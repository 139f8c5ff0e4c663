"""The base of every config and of every small choice inside one: frozen pydantic models.

1. `Settings` has no key but its fields and cannot be changed; `replace` gives a checked copy.
2. A choice is a union of Settings told apart by `kind`, each with its own fields only:
   `Schedule = Annotated[Constant | Linear, ByKind()]`. A kind alone stands for its defaults.
3. `Settings.read` turns a table (of a recipe, a plan, the command line) into a model and reports
   every problem at once, with its place and in words.
4. `describe` lists the fields with type, bounds, default and meaning: the source of every `--help`.

A field is `Annotated[type, bounds of annotated_types, Doc("one line, with units")]`. One that
changes no result is `Field(exclude=True)`: no digest has it.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from operator import or_
from typing import Annotated, Any, Literal, NamedTuple, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Discriminator, GetCoreSchemaHandler, ValidationError
from pydantic_core import CoreSchema, PydanticUndefined

from featureflow.errors import Problem, UserError
from featureflow.plugins import plugins


class Settings(BaseModel):
    """A frozen model; an unknown key is an error, not a silent default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return type(self)(**{**dict(self), **changes})

    @classmethod
    def read(cls, raw: object, where: str, problems: list[Problem]) -> Self | None:
        """The model that `raw` describes, types taken strictly. Otherwise None, and every problem
        is added to `problems`, with its place below `where`."""
        if not isinstance(raw, Mapping):
            what = "not a section"
            problems.append(Problem(what=what, where=where, expected="a table", found=_show(raw)))
            return None
        try:
            text = json.dumps(_with_kinds(cls, raw), default=str)
            return cls.model_validate_json(text, strict=True)
        except ValidationError as error:
            details = error.errors(include_url=False)
            found = [_problem(cls, where, each) for each in details if not _follows(each, details)]
            problems += {problem.where: problem for problem in found}.values()
        except UserError as error:
            problems += error.problems
        return None


class ByKind:
    """Marks a union of Settings as a choice: told apart by `kind`, which a recipe may give alone.
    Packages add to it under the entry point group (featureflow/plugins.py), if one is named."""

    def __init__(self, group: str | None = None) -> None:
        self.group = group

    def members(self, union: Any) -> tuple[Any, ...]:
        """The types of the union, and those of other packages."""
        return (*get_args(union), *(plugins(self.group).values() if self.group else ()))

    def __get_pydantic_core_schema__(self, union: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choice = reduce(or_, self.members(union))
        return handler.generate_schema(Annotated[choice, Discriminator("kind")])


def kinds_of(choice: Any) -> dict[str, type[Settings]]:
    """The members of a choice by their `kind`; empty for a type that is none."""
    return {kind: c for c in _members(choice) if _is_settings(c) for kind in _kinds(c)}


class Field(NamedTuple):
    """A field in words, as `--help` prints it."""

    place: str
    type: str
    default: str
    meaning: str


def describe(cls: type[Settings], prefix: str) -> Iterator[Field]:
    """Every field below `prefix`. `field(kind).x` belongs to one kind of a choice, `field[].x` to
    each table of a list."""
    for name, hint in _hints(cls).items():
        place = f"{prefix}.{name}"
        yield Field(place, _show_hint(hint), _show_default(cls, name), _meaning(hint))
        bare = _bare(hint)
        if get_origin(bare) is tuple and _is_settings(get_args(bare)[0]):
            # choices inside an entry are those of the fields above
            yield from (
                field
                for field in describe(get_args(bare)[0], f"{place}[]")
                if "." not in field.place.removeprefix(f"{place}[].")
            )
        members = [member for member in _members(hint) if _is_settings(member)]
        for member in members:
            tag = place if len(_members(hint)) == 1 else f"{place}({_kinds(member)[0]})"
            yield from (f for f in describe(member, tag) if not f.place.endswith(".kind"))


def unknown_key(key: str, known: Iterable[str], where: str) -> Problem:
    """The problem that nothing has this name, with the nearest that is there."""
    near = difflib.get_close_matches(key, list(known), n=1)
    expected = f"did you mean {near[0]!r}?" if near else ", ".join(known)
    return Problem(what="unknown key", where=f"{where}.{key}", expected=expected)


def _with_kinds(hint: Any, raw: Any) -> Any:
    """The document with `{kind = …}` in place of a kind that stands alone."""
    kinds = kinds_of(hint) if len(_members(hint)) > 1 else {}
    if isinstance(raw, str) and kinds:
        return {"kind": raw}
    if isinstance(raw, Mapping):
        hint = kinds.get(str(raw.get("kind")), hint)
        return {key: _with_kinds(_step(hint, key, "")[0], value) for key, value in raw.items()}
    if isinstance(raw, list):
        return [_with_kinds(_step(hint, i, "")[0], value) for i, value in enumerate(raw)]
    return raw


def _problem(cls: type[Settings], where: str, detail: Any) -> Problem:
    """pydantic's error in words. Its place is walked beside the types, so that the names which
    pydantic gives to the members of a union are left out."""
    if detail["type"] == "json_invalid":
        return Problem(what="a text holds half a character (a lone surrogate)", where=where)
    hint: Any = cls
    *parents, last = detail["loc"] or (None,)
    for part in parents:
        hint, where = _step(hint, part, where)
    if detail["type"] == "extra_forbidden":
        return unknown_key(str(last), _hints(_members(hint)[0]), where)
    if last is not None:
        hint, where = _step(hint, last, where)
    if detail["type"].startswith("union_tag"):
        kind = detail["input"].get("kind") if isinstance(detail["input"], Mapping) else None
        what, found = ("missing key", None) if kind is None else ("no such kind", _show(kind))
        expected = " | ".join(kinds_of(hint))
        return Problem(what=what, where=f"{where}.kind", expected=expected, found=found)
    if detail["type"] == "value_error":
        return Problem(what=str(detail["ctx"]["error"]), where=where)
    if detail["type"] == "missing":
        return Problem(what="missing", where=where, expected=_show_hint(hint))
    found = _show(detail["input"])
    return Problem(what=detail["msg"], where=where, expected=_show_hint(hint), found=found)


def _follows(detail: Any, details: Sequence[Any]) -> bool:
    """Whether a list is called too short only because its entries are wrong."""
    n = len(detail["loc"])
    below = (other["loc"] for other in details if len(other["loc"]) > n)
    return detail["type"] == "too_short" and any(loc[:n] == detail["loc"] for loc in below)


def _step(hint: Any, part: str | int, where: str) -> tuple[Any, str]:
    """The type and the place one step down; a step that only names a member of a union stays."""
    members = _members(hint)
    if isinstance(part, int):
        item = next((get_args(m)[0] for m in members if get_origin(m) is tuple), hint)
        return item, f"{where}[{part}]"
    if len(members) > 1 and part in kinds_of(hint):
        return kinds_of(hint)[part], where
    for member in members:
        if _is_settings(member) and part in member.model_fields:
            return _hints(member)[part], f"{where}.{part}"
        if get_origin(member) in (dict, Mapping):
            return get_args(member)[1], f"{where}.{part}"
    return hint, where


def _hints(cls: type[Settings]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    return {name: hints[name] for name in cls.model_fields}


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _notes(hint: Any) -> tuple[Any, ...]:
    return get_args(hint)[1:] if get_origin(hint) is Annotated else ()


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, none left out; the type itself where it is no union."""
    bare = _bare(hint)
    if get_origin(bare) not in (Union, types.UnionType):
        return (bare,)
    choice = next((n for n in _notes(hint) if isinstance(n, ByKind)), ByKind())
    found = [member for each in choice.members(bare) for member in _members(each)]
    return tuple(member for member in found if member is not types.NoneType)


def _is_settings(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, Settings)


def _kinds(choice: type[Settings]) -> tuple[str, ...]:
    hint = _hints(choice).get("kind")
    return get_args(hint) if get_origin(hint) is Literal else (choice.__name__.lower(),)


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _show_hint(hint: Any) -> str:
    """A type with its bounds in words: `int > 0`, `list of str`, `topk | batch_topk | none`."""
    bare = _bare(hint)
    if get_origin(bare) in (Union, types.UnionType):
        kinds = [_kinds(m)[0] if _is_settings(m) else _show_type(m) for m in _members(hint)]
        return " | ".join([*kinds, *(["none"] if types.NoneType in get_args(bare) else [])])
    return " ".join([_show_type(bare), *filter(None, map(_show_bound, _notes(hint)))])


def _show_type(hint: Any) -> str:
    bare = _bare(hint)
    if get_origin(bare) is Literal:
        return " | ".join(repr(choice) for choice in get_args(bare))
    if get_origin(bare) is tuple:
        return f"list of {_show_type(get_args(bare)[0])}"
    if get_origin(bare) in (dict, Mapping):
        return f"table of {_show_type(get_args(bare)[1])}"
    if get_origin(bare) in (Union, types.UnionType):
        return " or ".join(_show_type(each) for each in get_args(bare))
    if _is_settings(bare):
        return "{" + ", ".join(bare.model_fields) + "}"
    if bare is types.NoneType:
        return "none"
    return bare.__name__ if isinstance(bare, type) else str(bare).replace("typing.", "")


_BOUND_SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "min_length": "length ≥"}


def _show_bound(note: Any) -> str:
    found = [(sign, getattr(note, name, None)) for name, sign in _BOUND_SIGNS.items()]
    return " ".join(f"{sign} {value}" for sign, value in found if value is not None)


def _show_default(cls: type[Settings], name: str) -> str:
    value = cls.model_fields[name].get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, Settings):
        return str(getattr(value, "kind", type(value).__name__))
    return "none" if value is None else json.dumps(value, default=str)


def _meaning(hint: Any) -> str:
    notes = (str(n.documentation) for n in _notes(hint) if hasattr(n, "documentation"))
    return next(notes, "")
