"""A run whose stages were made from different dictionaries is refused, with the artifact that is
out of date."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from featureflow.errors import UserError
from pipeline.artifact import SCHEMAS, Artifact
from pipeline.opened_run import open_run, whole_run


def made(root: Path, stage: str, value: int, inputs: Mapping[str, Artifact]) -> Artifact:
    """An artifact that holds one number."""
    digests = {name: artifact.digest for name, artifact in inputs.items()}
    with Artifact.create(
        root / stage, kind=stage, schema=SCHEMAS[stage], config={"v": value}, inputs=digests
    ):
        pass
    return Artifact.open(root / stage, kind=stage, schema=SCHEMAS[stage])


def a_run(root: Path) -> dict[str, Artifact]:
    run: dict[str, Artifact] = {}
    for stage in ("collect", "train", "link"):
        run[stage] = made(root, stage, 1, run)
    return run


def test_a_run_of_one_piece_is_opened(tmp_path: Path) -> None:
    wanted = a_run(tmp_path)
    assert open_run(tmp_path, ("collect", "train", "link")) == wanted


def test_dictionaries_made_anew_do_not_belong_to_the_earlier_graph(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    made(tmp_path, "train", 2, {"collect": run["collect"]})
    open_run(tmp_path, ("collect", "train"))
    with pytest.raises(UserError) as caught:
        open_run(tmp_path, ("collect", "train", "link"))
    (problem,) = caught.value.problems
    assert problem.where == str(tmp_path / "link")
    assert problem.found == run["train"].digest[:12]
    assert caught.value.fix == "featureflow run --to link"


def test_a_missing_stage_is_named_before_anything_is_compared(tmp_path: Path) -> None:
    a_run(tmp_path)
    with pytest.raises(UserError, match="there is no artifact here") as caught:
        open_run(tmp_path, ("collect", "train", "link", "atlas"))
    assert caught.value.fix == "featureflow run --to atlas"


def test_the_front_page_keeps_the_stages_that_were_not_run_and_still_belong(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    assert whole_run(tmp_path, [run["collect"]]) == [*run.values()]
    anew = made(tmp_path, "train", 2, {"collect": run["collect"]})
    assert whole_run(tmp_path, [run["collect"], anew]) == [run["collect"], anew], (
        "link is of the earlier train"
    )
    (tmp_path / "link" / "manifest.json").unlink()
    assert whole_run(tmp_path, [run["collect"], anew]) == [run["collect"], anew]
