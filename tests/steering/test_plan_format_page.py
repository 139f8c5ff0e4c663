"""The example in docs/formats.md is a plan, and the page names every key, edit and scope there
is."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from featureflow.settings import kinds_of
from steering.edits import edits
from steering.plan import Node, Plan
from steering.plan_files import read_plan
from steering.scopes import Scope

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
    keys = {f.name for f in dataclasses.fields(Plan)} - {"vectors"} | set(Node.model_fields)
    kinds = {*edits(), *kinds_of(Scope)}
    assert not {word for word in keys | kinds if f"`{word}`" not in PAGE}
