"""The pipeline is a graph of artifacts: what is current is left alone, a change reruns what lies
below it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import pipeline.stages.schedule
from featureflow.errors import UserError
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.stages.recipe import Recipe
from pipeline.stages.schedule import run_recipe, run_single, stages_above

WORLD = {"text": "v1"}


@dataclass(frozen=True, kw_only=True)
class Config:
    value: int = 1


@dataclass(frozen=True, kw_only=True)
class NoInputs:
    pass


@dataclass(frozen=True, kw_only=True)
class FromCollect:
    collect: Artifact


@dataclass(frozen=True, kw_only=True)
class FromBoth:
    collect: Artifact
    train: Artifact


@dataclass(frozen=True, kw_only=True)
class FromWhatIsThere:
    train: Artifact
    link: Artifact | None = None


def beside(root: Path, available: dict[str, Artifact]) -> dict[str, str]:
    notes = root / "notes.txt"
    return {"notes": notes.read_text()} if notes.is_file() else {}


def toy_stage(name: str, inputs_type: Any, log: list[str], outside: bool = False) -> Any:
    def run(config: Config, inputs: Any, out: Path, context: RunContext) -> Artifact:
        log.append(name)
        digests = {key: made.digest for key, made in vars(inputs).items() if made is not None}
        digests |= dict(WORLD) if outside else {}
        digests |= beside(out.parent, {}) if name == "atlas" else {}
        if config.value < 0:
            raise RuntimeError("fails")
        with Artifact.create(out, kind=name, schema=1, config=config, inputs=digests) as draft:
            (draft.path / "value.txt").write_text(str(config.value))
        return Artifact.open(out, kind=name, schema=1)

    module = SimpleNamespace(
        KIND=name, SCHEMA=1, Config=Config, Inputs=inputs_type, run=run, __name__=name
    )
    if outside:
        module.outside_digests = lambda config: dict(WORLD)
    if name == "atlas":
        module.digests_beside = beside
    return module


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    modules = {
        "collect": toy_stage("collect", NoInputs, calls, outside=True),
        "train": toy_stage("train", FromCollect, calls),
        "link": toy_stage("link", FromBoth, calls),
        "atlas": toy_stage("atlas", FromWhatIsThere, calls),
    }
    monkeypatch.setattr(
        pipeline.stages.schedule, "StageName", lambda name: SimpleNamespace(module=modules[name])
    )
    monkeypatch.setitem(WORLD, "text", "v1")
    return calls


def recipe(**values: int) -> Recipe:
    names = ("collect", "train", "link", "atlas")
    return Recipe(
        name="toy",
        description="",
        configs={name: Config(value=values.get(name, 1)) for name in names},
    )


def bring(tmp_path: Path, to: str, **values: int) -> None:
    run_recipe(recipe(**values), to=to, root=tmp_path, context=RunContext())


def test_only_what_a_stage_needs_is_above_it(log: list[str]) -> None:
    assert stages_above("link") == ("collect", "train", "link")
    assert stages_above("collect") == ("collect",)


def test_a_second_run_does_nothing(tmp_path: Path, log: list[str]) -> None:
    bring(tmp_path, "link")
    assert log == ["collect", "train", "link"]
    bring(tmp_path, "link")
    assert log == ["collect", "train", "link"]


def test_a_changed_section_reruns_that_stage_and_what_lies_below(
    tmp_path: Path, log: list[str]
) -> None:
    bring(tmp_path, "link")
    log.clear()
    bring(tmp_path, "link", train=2)
    assert log == ["train", "link"]


def test_a_changed_world_reruns_the_stage_that_reads_it(tmp_path: Path, log: list[str]) -> None:
    bring(tmp_path, "train")
    log.clear()
    WORLD["text"] = "v2"
    bring(tmp_path, "train")
    assert log == ["collect", "train"]


def test_a_lost_file_reruns_its_stage_alone(tmp_path: Path, log: list[str]) -> None:
    bring(tmp_path, "link")
    log.clear()
    (tmp_path / "train" / "value.txt").unlink()
    bring(tmp_path, "link")
    assert log == ["train"], "the digest of train is the same, so link stays current"


def test_a_failing_stage_keeps_the_old_artifact(tmp_path: Path, log: list[str]) -> None:
    bring(tmp_path, "train")
    with pytest.raises(RuntimeError):
        bring(tmp_path, "train", train=-1)
    assert (tmp_path / "train" / "value.txt").read_text() == "1"


def test_one_stage_alone_refuses_missing_and_outdated_inputs(
    tmp_path: Path, log: list[str]
) -> None:
    with pytest.raises(UserError, match="featureflow run --to collect"):
        run_single(recipe(), "train", root=tmp_path, context=RunContext())
    bring(tmp_path, "collect")
    with pytest.raises(UserError, match="another recipe"):
        run_single(recipe(collect=2), "train", root=tmp_path, context=RunContext())
    [made] = run_single(recipe(), "train", root=tmp_path, context=RunContext())
    assert made.artifact.kind == "train"


def alone(root: Path, stage: str, **values: int) -> Artifact:
    [made] = run_single(recipe(**values), stage, root=root, context=RunContext())
    return made.artifact


def test_a_whole_run_makes_what_a_stage_can_do_without(tmp_path: Path, log: list[str]) -> None:
    bring(tmp_path, "atlas")
    assert log == ["collect", "train", "link", "atlas"]


def test_one_stage_alone_goes_on_without_an_input_that_may_be_missing(
    tmp_path: Path, log: list[str]
) -> None:
    with pytest.raises(UserError, match="there is no artifact here"):
        alone(tmp_path, "atlas")
    bring(tmp_path, "train")
    assert set(alone(tmp_path, "atlas").inputs) == {"train"}
    bring(tmp_path, "link")
    assert set(alone(tmp_path, "atlas").inputs) == {"train", "link"}
    outdated = alone(tmp_path, "atlas", link=2)
    assert set(outdated.inputs) == {"train"}, "an outdated one is as good as missing"


def test_a_file_beside_the_artifacts_reruns_the_stage_that_shows_it(
    tmp_path: Path, log: list[str]
) -> None:
    bring(tmp_path, "atlas")
    (tmp_path / "notes.txt").write_text("new")
    log.clear()
    bring(tmp_path, "atlas")
    bring(tmp_path, "atlas")
    assert log == ["atlas"]


def test_force_runs_a_current_stage(tmp_path: Path, log: list[str]) -> None:
    bring(tmp_path, "train")
    log.clear()
    run_recipe(recipe(), to="train", root=tmp_path, context=RunContext(), force=("train",))
    assert log == ["train"]


def test_force_does_not_go_on_with_what_a_killed_run_left(tmp_path: Path, log: list[str]) -> None:
    bring(tmp_path, "collect")
    config = recipe().configs["collect"]
    with (
        pytest.raises(KeyboardInterrupt),
        Artifact.create(
            tmp_path / "collect", kind="collect", schema=1, config=config, inputs=WORLD
        ) as draft,
    ):
        (draft.path / "half.txt").write_text("half")
        raise KeyboardInterrupt
    [forced] = run_recipe(
        recipe(), to="collect", root=tmp_path, context=RunContext(), force=("collect",)
    )
    assert "half.txt" not in forced.artifact.files


def test_a_stage_does_not_run_on_an_input_whose_bytes_changed(
    tmp_path: Path, log: list[str]
) -> None:
    bring(tmp_path, "train")
    (tmp_path / "train" / "value.txt").write_text("2")
    with pytest.raises(UserError, match="checksum differs") as caught:
        bring(tmp_path, "link")
    assert str(caught.value.fix) == "featureflow train --force"
    assert log == ["collect", "train"]


def vary(tmp_path: Path, **values: int) -> None:
    """The run `wide`, a variant of the run `base` of the same recipe."""
    run_recipe(
        recipe(**values),
        to="link",
        root=tmp_path / "wide",
        context=RunContext(),
        shared=tmp_path / "base",
    )


def test_a_variant_shares_what_the_recipes_own_run_has_and_makes_the_rest(
    tmp_path: Path, log: list[str]
) -> None:
    bring(tmp_path / "base", "link")
    log.clear()
    vary(tmp_path, train=2)
    assert log == ["train", "link"]
    assert (tmp_path / "wide" / "collect").resolve() == tmp_path / "base" / "collect"
    assert (tmp_path / "base" / "train" / "value.txt").read_text() == "1"
    assert (tmp_path / "wide" / "train" / "value.txt").read_text() == "2"
    vary(tmp_path, train=2)
    assert log == ["train", "link"]


def test_a_shared_stage_that_is_made_anew_is_made_again_for_the_variant_alone(
    tmp_path: Path, log: list[str]
) -> None:
    bring(tmp_path / "base", "link")
    vary(tmp_path, train=2)
    bring(tmp_path / "base", "link", collect=3)
    log.clear()
    vary(tmp_path, train=2)
    assert log == ["collect"], "the digests of train and link are what they were"
    assert not (tmp_path / "wide" / "collect").is_symlink()
    assert (tmp_path / "wide" / "collect" / "value.txt").read_text() == "1"
    assert (tmp_path / "base" / "collect" / "value.txt").read_text() == "3"


def test_one_stage_of_a_variant_finds_its_inputs_in_the_recipes_own_run(
    tmp_path: Path, log: list[str]
) -> None:
    bring(tmp_path / "base", "collect")
    [made] = run_single(
        recipe(train=2),
        "train",
        root=tmp_path / "wide",
        context=RunContext(),
        shared=tmp_path / "base",
    )
    assert made.artifact.path == tmp_path / "wide" / "train"
    assert log == ["collect", "train"]
    with pytest.raises(UserError, match="there is no artifact here"):
        run_single(
            recipe(collect=2),
            "train",
            root=tmp_path / "else",
            context=RunContext(),
            shared=tmp_path / "base",
        )
