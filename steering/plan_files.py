"""Plan files: TOML or JSON (vectors beside them in `<name>.safetensors`), or one safetensors file
with the plan inside.

    read_plan("cooking.toml")      write_plan(plan, "cooking.safetensors")

A file is checked as a whole: unknown and missing keys, wrong types and impossible values are all
reported together. A file of vectors lies in the plan's own folder and is named by the plan's file
name, so no path in a plan can lead elsewhere.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from featureflow.errors import Command, Problem, UserError
from steering.choice import FromFile
from steering.edits import Edit
from steering.plan import Node, Plan
from steering.scopes import Scope

SCHEMA = 1
_SUFFIXES = (".toml", ".json", ".safetensors")


class _Document(FromFile):
    """What a plan file holds: a Plan without its vectors, and the version of the format."""

    schema: int
    nodes: tuple[Node, ...]
    edit: Annotated[Edit, Discriminator("kind")]
    scope: Annotated[Scope, Discriminator("kind")]
    strength: float
    skip_first: int = 1
    dose: float | None = None
    name: str = ""
    note: str = ""
    model: str = ""
    digests: dict[str, str] = dataclasses.field(default_factory=dict)


def write_plan(plan: Plan, path: str | Path) -> Path:
    """Write by suffix. Returns the path; vectors of a .toml or .json plan go to
    `<stem>.safetensors` beside it."""
    path = Path(path)
    document = plan_document(plan)
    tensors = {
        name: tensor.detach().float().cpu().contiguous() for name, tensor in plan.vectors.items()
    }
    match _suffix(path):
        case ".safetensors":
            save_file(tensors, path, metadata={"plan": json.dumps(document, ensure_ascii=False)})
            return path
        case ".json":
            path.write_text(
                json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
            )
        case _:
            path.write_text(_toml(document), encoding="utf-8")
    if tensors:
        save_file(tensors, path.with_suffix(".safetensors"))
    return path


def read_plan(path: str | Path) -> Plan:
    """Read and check. Raises UserError with every problem."""
    path = Path(path)
    suffix = _suffix(path)
    if not path.is_file():
        raise UserError(
            "there is no such plan",
            where=str(path),
            fix=Command("steer", "plan", "L12/402", "--out", "PLAN.toml"),
        )
    if suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        text = path.read_text(encoding="utf-8")
        document = tomllib.loads(text) if suffix == ".toml" else json.loads(text)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"the plan is not {suffix[1:].upper()}", where=str(path), found=str(error)
        ) from error
    beside = path.with_suffix(".safetensors")
    return plan_of_document(
        document, where=str(path), vectors=_tensors(beside) if beside.is_file() else {}
    )


def plan_document(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values, without its vectors."""
    document = {
        "schema": SCHEMA,
        **{f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name != "vectors"},
    }
    document["edit"], document["scope"] = (
        dataclasses.asdict(plan.edit),
        dataclasses.asdict(plan.scope),
    )
    document["digests"] = dict(plan.digests)
    document["nodes"] = [_without_none(dataclasses.asdict(node)) for node in plan.nodes]
    return _without_none(document)


def plan_of_document(
    document: Any, *, where: str = "plan", vectors: Mapping[str, Tensor] | None = None
) -> Plan:
    """Parse JSON values into a Plan."""
    try:
        parsed = _adapter().validate_python(document)
    except ValidationError as error:
        raise UserError(
            f"{where} is not a steering plan", problems=tuple(map(_problem, error.errors()))
        ) from error
    if parsed.schema != SCHEMA:
        raise UserError(
            "written by another version",
            where=where,
            expected=f"schema {SCHEMA}",
            found=str(parsed.schema),
        )
    fields = {
        f.name: getattr(parsed, f.name) for f in dataclasses.fields(parsed) if f.name != "schema"
    }
    return Plan(**fields, vectors=dict(vectors or {}))


@cache
def _adapter() -> TypeAdapter[_Document]:
    return TypeAdapter(_Document)


def _problem(error: Any) -> Problem:
    where = ".".join(str(part) for part in error["loc"])
    return Problem(what=str(error["msg"]).lower(), where=where, found=repr(error["input"])[:80])


def _read_safetensors(path: Path) -> Plan:
    try:
        with safe_open(path, framework="pt") as stream:
            text = (stream.metadata() or {}).get("plan")
    except (SafetensorError, OSError) as error:
        raise UserError(
            "the plan is not a safetensors file", where=str(path), found=str(error)
        ) from error
    if text is None:
        raise UserError(
            "this safetensors file holds no plan", where=str(path), expected="metadata key `plan`"
        )
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError("the plan inside is not JSON", where=str(path), found=str(error)) from error
    return plan_of_document(document, where=str(path), vectors=_tensors(path))


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            "the plan's vectors cannot be read", where=str(path), found=str(error)
        ) from error


def _suffix(path: Path) -> str:
    if path.suffix not in _SUFFIXES:
        raise UserError("a plan file ends in .toml, .json or .safetensors", where=str(path))
    return path.suffix


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _toml(document: Mapping[str, Any]) -> str:
    """TOML for the flat shape of a plan: plain keys first, then tables, then the list of nodes."""
    plain = {key: value for key, value in document.items() if not isinstance(value, (dict, list))}
    tables = {key: value for key, value in document.items() if isinstance(value, dict)}
    parts = ["\n".join(f"{key} = {_toml_value(value)}" for key, value in plain.items())]
    parts += [_toml_table(f"[{key}]", value) for key, value in tables.items() if value]
    parts += [_toml_table("[[nodes]]", node) for node in document["nodes"]]
    return "\n\n".join(parts) + "\n"


def _toml_table(head: str, table: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            head,
            *(
                f"{_toml_key(key)} = {_toml_value(value)}"
                for key, value in table.items()
                if value is not None
            ),
        ]
    )


def _toml_key(key: str) -> str:
    return (
        key
        if key.replace("_", "").replace("-", "").isalnum() and key.isascii()
        else _toml_value(key)
    )


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
