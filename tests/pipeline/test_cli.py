"""The command line turns options into configs and failures into messages; a stage behind it is a
stand-in here."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
import torch

import pipeline.cli
from featureflow.errors import Problem, UserError
from pipeline.cli import run_command
from pipeline.cli.given import parse_overrides
from pipeline.cli.options import run_context, run_folder
from pipeline.console import show_number, table
from pipeline.stages import STAGES


def test_overrides_in_both_spellings() -> None:
    assert parse_overrides(["--train.steps", "500", "--link.top_k=3", "--collect.note", "--x"]) == {
        "train.steps": "500",
        "link.top_k": "3",
        "collect.note": "--x",
    }


@pytest.mark.parametrize("words", [["--train.steps"], ["stray"], ["--unknown"]])
def test_a_word_that_is_no_override_is_refused(words: list[str]) -> None:
    with pytest.raises(click.UsageError):
        parse_overrides(words)


@pytest.mark.parametrize("stage", [*STAGES, "evaluate", "run"])
def test_help_explains_every_field(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([stage, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Fields of [" in text
    section = {"run": "collect", "evaluate": "lenses"}.get(stage, stage)
    assert f"--{section}." in text


@pytest.mark.parametrize(
    "command",
    [["train", "--recipe", "no-such"], ["atlas", "--recipe", "no-such", "--atlas.x", "1"]],
)
def test_an_unknown_recipe_is_an_error_with_its_mending_and_no_traceback(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(command) == 2
    text = capsys.readouterr().err
    assert "no recipe 'no-such'" in text
    assert "featureflow recipes" in text
    assert "Traceback" not in text


def test_unknown_commands_and_stages_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["trian"]) == 2
    assert run_command(["run", "--to", "trian"]) == 2
    assert "'collect', 'train'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("bad width", where="train.n_latents", fix="use 8"), 2, "use 8"),
        (KeyboardInterrupt(), 130, "run the same command again"),
        (OSError(28, "No space left on device", "artifacts/x"), 3, "No space left on device"),
        (MemoryError(), 3, "out of memory"),
        (ZeroDivisionError("oops"), 1, "internal error: ZeroDivisionError: oops"),
    ],
)
def test_every_failure_has_an_exit_code_and_a_message(
    error: BaseException,
    code: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> int:
        raise error

    monkeypatch.setattr(pipeline.cli, "app", fail)
    assert run_command([]) == code
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text
    assert run_command([], debug=True) == code
    if code in (1, 2, 3):
        assert "Traceback" in capsys.readouterr().err


def test_all_problems_of_an_error_are_printed() -> None:
    problems = (Problem(what="a", where="x", expected="1", found="2"), Problem(what="b"))
    text = str(UserError("two things are wrong", problems=problems, fix="do this"))
    assert text.splitlines() == [
        "two things are wrong",
        "x: a",
        "    expected: 1",
        "    found:    2",
        "b",
        "    to fix:   do this",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (123456.7, "123,457"),
        ((0.1, 0.25), "[0.1, 0.25]"),
        (True, "True"),
        ({"a": 1}, "a 1"),
    ],
)
def test_numbers_read_as_people_write_them(value: object, text: str) -> None:
    assert show_number(value) == text


def test_tables_align() -> None:
    assert table([("a", "1"), ("long", "2")]) == ["a     1", "long  2"]


def test_cores_are_counted_where_the_system_has_no_affinity(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    found = run_context(device="cpu", threads=0, scheduler=None, workers=0, progress=None)
    assert found.n_threads == os.cpu_count()


@pytest.mark.parametrize(
    ("out", "reason"), [("p.txt", "no form of a plan"), ("no/where/p.toml", "no folder")]
)
def test_where_a_plan_is_written_is_looked_at_before_anything_is_loaded(
    out: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are no artifacts here: a complaint about them would mean that they were looked for
    first."""
    assert (
        run_command(
            ["steer", "plan", "L1/2", "--artifacts", str(tmp_path), "--out", str(tmp_path / out)]
        )
        == 2
    )
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/x", "wide.toml"])
def test_the_name_of_a_run_is_one_folder(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["run", "-r", "tiny", "--name", name]) == 2
    assert "one folder" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["run1.5", "run1.5.toml", "recipes/run1.5.toml"])
def test_tools_look_where_the_run_wrote(recipe: str) -> None:
    """A run is named after its file without `.toml`, and by `--name`; a dot in the name stays."""
    assert run_folder(Path("artifacts"), recipe) == Path("artifacts/run1.5")
    assert run_folder(Path("artifacts"), recipe, "mine.2") == Path("artifacts/mine.2")


@pytest.mark.parametrize(
    "words",
    [["lens", "groups"], ["flow", "trunks"], ["atlas", "validate"], ["verify"], ["trace", "Hi"]],
)
def test_every_tool_takes_the_name_of_a_run(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([*words, "-r", "tiny", "--name", "mine", "--artifacts", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert str(tmp_path / "mine") in told
    assert "--name mine" in told or "mine/atlas" in told


def test_the_list_of_commands_says_what_each_does_and_each_is_there(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_command(["--help"]) == 0
    listed = capsys.readouterr().out.partition("Commands:")[2]
    context = click.Context(pipeline.cli.app)
    names = pipeline.cli.app.list_commands(context)
    assert [line.split()[0] for line in listed.splitlines() if line[:3].strip()] == names
    for name in names:
        assert pipeline.cli.app.get_command(context, name).name == name


def test_recipes_are_listed_with_what_they_say_of_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.toml").write_text('description = "mine, not theirs"\n')
    monkeypatch.chdir(tmp_path)
    assert run_command(["recipes"]) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    found = {name: rest for name, *rest in lines}
    assert found["tiny"] == ["mine, not theirs"]
    assert "laptop" in found
