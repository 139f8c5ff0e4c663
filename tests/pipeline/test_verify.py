"""`featureflow verify` names every damaged file and every stage that was made from others than
those beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from pipeline.artifact import SCHEMAS, Artifact
from pipeline.cli import run_command


def made(root: Path, stage: str, inputs: Mapping[str, str], text: str = "abcd") -> str:
    """An artifact with one file; its digest."""
    with Artifact.create(
        root / stage, kind=stage, schema=SCHEMAS[stage], config={"text": text}, inputs=inputs
    ) as draft:
        (draft.path / "file.txt").write_text(text)
        return draft.digest


@pytest.fixture
def run(tmp_path: Path) -> Path:
    root = tmp_path / "laptop"
    made(root, "link", {"train": made(root, "train", {})})
    return root


def verify(run: Path, *options: str) -> int:
    return run_command(["verify", "--artifacts", str(run.parent), *options])


def test_a_whole_run_is_sound(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(run) == 0
    assert f"{run}: sound" in capsys.readouterr().out


def test_bytes_changed_in_place_are_found_but_not_by_the_quick_look(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "train" / "file.txt").write_text("abXd")
    assert verify(run, "--quick") == 0
    assert verify(run) == 2
    text = capsys.readouterr().err
    assert f"{run}/train/file.txt: checksum differs" in text
    assert f"featureflow train --artifacts {run.parent} --force" in text


def test_a_stage_made_anew_leaves_those_after_it_behind(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(run, "train", {}, text="efgh")
    assert verify(run) == 2
    assert f"{run}/link: made from another train artifact" in capsys.readouterr().err


def test_no_run_and_an_unfinished_one_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(tmp_path / "laptop") == 2
    assert "there is no run here" in capsys.readouterr().err
    (tmp_path / "laptop" / "train").mkdir(parents=True)
    assert verify(tmp_path / "laptop") == 2
    assert "unfinished: it has no manifest" in capsys.readouterr().err
