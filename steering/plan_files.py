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
from typing import Annotated, Any, Union

import tomli_w
from pydantic import Field, create_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from featureflow.errors import Command, Problem, UserError
from featureflow.settings import ByKind, Settings
from steering.edits import Edit, edits
from steering.plan import Node, Plan
from steering.scopes import Scope

SCHEMA = 1
_SUFFIXES = (".toml", ".json", ".safetensors")


class _Document(Settings):
    """What a plan file holds: a Plan without its vectors."""

    nodes: tuple[Node, ...]
    scope: Scope
    strength: float
    skip_first: int = 1
    dose: float | None = None
    name: str = ""
    note: str = ""
    model: str = ""
    digests: dict[str, str] = Field(default_factory=dict)


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
            path.write_text(tomli_w.dumps(document), encoding="utf-8")
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
    names = [f.name for f in dataclasses.fields(plan) if f.name != "vectors"]
    document = {"schema": SCHEMA, **{name: getattr(plan, name) for name in names}}
    for name, choice in (("edit", plan.edit), ("scope", plan.scope)):
        document[name] = choice.model_dump(mode="json", exclude_none=True)
    document["digests"] = dict(plan.digests)
    document["nodes"] = [node.model_dump(exclude_none=True) for node in plan.nodes]
    return {key: value for key, value in document.items() if value is not None}


def plan_of_document(
    document: Any, *, where: str = "plan", vectors: Mapping[str, Tensor] | None = None
) -> Plan:
    """Parse JSON values into a Plan. Raises UserError with every problem."""
    schema = document.get("schema") if isinstance(document, Mapping) else SCHEMA
    if schema not in (None, SCHEMA):
        raise UserError(
            "written by another version",
            where=where,
            expected=f"schema {SCHEMA}",
            found=str(schema),
        )
    problems: list[Problem] = []
    if schema is None:
        problems.append(Problem(what="missing", where="plan.schema", expected=str(SCHEMA)))
    elif isinstance(document, Mapping):
        document = {key: value for key, value in document.items() if key != "schema"}
    parsed = _document_type(tuple(edits().values())).read(document, "plan", problems)
    if parsed is None or problems:
        raise UserError(f"{where} is not a steering plan", problems=tuple(problems))
    return Plan(**dict(parsed), vectors=dict(vectors or {}))


@cache
def _document_type(edit_types: tuple[type[Edit], ...]) -> type[_Document]:
    """With the edits that are registered now."""
    union: Any = Union[edit_types]  # noqa: UP007
    return create_model("_PlanFile", __base__=_Document, edit=(Annotated[union, ByKind()], ...))


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
