"""The command that an error names fixes the run that failed: same recipe, same folder, same
fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from featureflow.errors import Command, Fix, UserError
from pipeline.cli import run_command, stage_commands

GIVEN = ["-r", "my runs/mine.toml", "--artifacts=/data", "--train.steps", "5", "--atlas.seed=1"]
MINE = "--recipe 'my runs/mine.toml' --artifacts /data"


@pytest.mark.parametrize(
    ("fix", "arguments", "wanted"),
    [
        (Command("train"), ["atlas"], "featureflow train"),
        (Command("train"), ["atlas", *GIVEN], f"featureflow train {MINE} --train.steps 5"),
        (Command("run", to="collect"), ["atlas", *GIVEN], f"featureflow run {MINE} --to collect"),
        (
            Command("collect", force=True, note="sound shards are kept"),
            ["train", "-rtiny", "--collect.seed", "3"],
            "featureflow collect --recipe tiny --collect.seed 3 --force: sound shards are kept",
        ),
        (
            (Command("collect"), Command("train")),
            ["link", "--recipe=tiny"],
            "featureflow collect --recipe tiny, then featureflow train --recipe tiny",
        ),
        (
            ("stop one of them", Command("train")),
            ["steer", "--name", "mine"],
            "stop one of them, then featureflow train --name mine",
        ),
        (Command("lens", "depth"), ["atlas", "-r", "a"], "featureflow lens depth --recipe a"),
        (Command("train", "--help"), ["atlas", *GIVEN], "featureflow train --help"),
        (Command("recipes"), ["atlas", *GIVEN], "featureflow recipes"),
        ("use 8", ["atlas", *GIVEN], "use 8"),
    ],
)
def test_a_fixing_command_carries_recipe_folder_and_the_fields_up_to_its_stage(
    fix: Fix,
    arguments: list[str],
    wanted: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise UserError("broken", fix=fix)

    monkeypatch.setattr(stage_commands, "read_recipe", fail)
    assert run_command(arguments) == 2
    assert capsys.readouterr().err.partition("to fix:")[2].strip() == wanted


def test_the_printed_command_can_be_copied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command of the error, run as printed, gives no error of its own kind: it finds the recipe
    and the folder."""
    recipe = tmp_path / "own.toml"
    recipe.write_text('[collect]\nmodel = {kind = "folder", path = "nowhere"}\n')
    folder = tmp_path / "out"
    command = ["flow", "trunks", "-r", str(recipe), "--artifacts", str(folder)]
    assert run_command(command) == 2
    printed = capsys.readouterr().err.partition("to fix:")[2].split()
    assert printed == ["featureflow", "run", "--recipe", str(recipe), "--artifacts", str(folder)]
    assert run_command(printed[1:]) == 2
    assert "nowhere: there is no model in this folder" in capsys.readouterr().err
