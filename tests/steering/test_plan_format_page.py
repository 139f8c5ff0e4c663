"""The example in docs/formats.md is a plan, and the page names every key, edit and scope there
is."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import steering.edits
import steering.scopes
from steering.plan import Node, Plan
from steering.plan_files import read_plan

PAGE = (
    (Path(__file__).parents[2] / "docs" / "formats.md")
    .read_text(encoding="utf-8")
    .split("## Steering plan")[1]
)


def test_the_example_is_read(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(re.search(r"```toml\n(.*?)```", PAGE, re.S)[1])
    plan = read_plan(path)
    assert [node.at for node in plan.nodes] == ["L11/377", "L12/402"]


def test_every_key_edit_and_scope_is_on_the_page():
    keys = {f.name for cls in (Plan, Node) for f in dataclasses.fields(cls)} - {"vectors"}
    unions = (
        *typing.get_args(steering.edits.FeatureEdit),
        *typing.get_args(steering.edits.DirectionEdit),
    )
    kinds = {cls.kind for cls in (*unions, *typing.get_args(steering.scopes.Scope))}
    assert not {word for word in keys | kinds if f"`{word}`" not in PAGE}
