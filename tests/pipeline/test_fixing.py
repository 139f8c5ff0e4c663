"""The command that an error names fixes the run that failed: same recipe, same folder, same
fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cli import run_command
from pipeline.cli.fixing import completed

GIVEN = [
    "atlas",
    "-r",
    "my runs/mine.toml",
    "--artifacts=/data",
    "--train.steps",
    "5",
    "--atlas.seed=1",
]


@pytest.mark.parametrize(
    ("fix", "arguments", "wanted"),
    [
        ("featureflow train", ["atlas"], "featureflow train"),
        (
            "featureflow train --recipe mine",
            GIVEN,
            "featureflow train --recipe 'my runs/mine.toml' --artifacts /data --train.steps 5",
        ),
        (
            "featureflow run --recipe mine --to collect",
            GIVEN,
            "featureflow run --recipe 'my runs/mine.toml' --artifacts /data --to collect",
        ),
        (
            "featureflow collect --force: sound shards are kept",
            ["train", "-rtiny", "--collect.seed", "3"],
            "featureflow collect --recipe tiny --collect.seed 3 --force: sound shards are kept",
        ),
        (
            "featureflow collect, then featureflow train",
            ["link", "--recipe=tiny"],
            "featureflow collect --recipe tiny, then featureflow train --recipe tiny",
        ),
        (
            "featureflow train, with more",
            ["steer", "-r", "a.toml"],
            "featureflow train --recipe a.toml, with more",
        ),
        ("featureflow atlas --help", GIVEN, "featureflow atlas --help"),
        ("make it again (featureflow steer plan)", GIVEN, "make it again (featureflow steer plan)"),
        ("featureflow recipes", GIVEN, "featureflow recipes"),
        ("use 8", GIVEN, "use 8"),
    ],
)
def test_a_mending_command_carries_recipe_folder_and_the_fields_up_to_its_stage(
    fix: str, arguments: list[str], wanted: str
) -> None:
    assert completed(fix, arguments) == wanted


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
    assert printed == [
        "featureflow",
        "run",
        "--recipe",
        str(recipe),
        "--artifacts",
        str(folder),
        "--to",
        "link",
    ]
    assert run_command(printed[1:]) == 2
    assert "nowhere: there is no model in this folder" in capsys.readouterr().err
