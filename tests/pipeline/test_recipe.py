"""A recipe is parsed once, strictly, and every problem is reported with its place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, Self

import pytest
from annotated_types import Gt, MinLen
from pydantic import model_validator
from typing_extensions import Doc

import pipeline.stages.recipe
from featureflow.errors import UserError
from featureflow.settings import ByKind, Settings, describe
from pipeline.stages import STAGES, StageName
from pipeline.stages.recipe import read_recipe, recipe_path


class TopK(Settings):
    k: Annotated[int, Gt(0), Doc("active latents a token")]
    kind: Literal["topk"] = "topk"


class Relu(Settings):
    l1: float = 5.0
    kind: Literal["relu"] = "relu"


class Config(Settings):
    architecture: Annotated[TopK | Relu, ByKind(), Doc("which latents are kept")] = Relu()
    steps: Annotated[int, Gt(0), Doc("optimizer steps")] = 4
    sites: tuple[str, ...] = ()
    others: Annotated[tuple[TopK, ...], MinLen(1), Doc("more")] = (TopK(k=1),)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.steps == 13:
            raise ValueError("13 steps bring bad luck")
        return self


@pytest.fixture
def toy_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Toy:
        def __init__(self, name: str) -> None:
            self.module = SimpleNamespace(Config=Config)

    monkeypatch.setattr(pipeline.stages.recipe, "StageName", Toy)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.usefixtures("toy_stages")
def test_sections_and_overrides_become_frozen_configs(tmp_path: Path) -> None:
    path = write(
        tmp_path, '[train]\nsteps = 9\narchitecture = {kind = "topk", k = 2}\nsites = ["a"]\n'
    )
    recipe = read_recipe(
        path,
        {"train.architecture.k": "8", "train.sites": '["b", "c"]', "collect.architecture": "relu"},
        ("collect", "train"),
    )
    assert recipe.configs["train"] == Config(architecture=TopK(k=8), steps=9, sites=("b", "c"))
    assert recipe.configs["collect"] == Config(architecture=Relu())


@pytest.mark.usefixtures("toy_stages")
def test_all_problems_of_all_sections_come_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "[train]\nstps = 3\nsteps = -1\n[collect]\nsteps = 13\n"
        "[link]\nsteps = '5'\narchitecture = {kind = 'gated'}\n[trian]\n",
    )
    with pytest.raises(UserError) as caught:
        read_recipe(path, {"nonsense": "1"}, ("collect", "train", "link"))
    text = str(caught.value)
    for expected in (
        "train.stps",
        "did you mean 'steps'",
        "greater than 0",
        "13 steps bring bad luck",
        "link.steps",
        "topk | relu",
        "trian",
        "--nonsense",
    ):
        assert expected in text, expected


@pytest.mark.usefixtures("toy_stages")
@pytest.mark.parametrize(
    "text",
    [
        "[train\n",
        "train = 3\n",
        "[train]\nsteps = true\n",
        "[train]\nsites = [1]\n",
        "[train.architecture]\nkind = 'topk'\n",
    ],
)
def test_what_is_not_a_recipe_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError):
        read_recipe(write(tmp_path, text), {}, ("train",))


@pytest.mark.usefixtures("toy_stages")
def test_types_are_named_in_words_and_the_help_of_the_stage_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_recipe(
            write(tmp_path, ""), {"train.sites": "L3", "train.steps": "-1"}, ("collect", "train")
        )
    assert {problem.expected for problem in caught.value.problems} == {"int > 0", "list of str"}
    assert str(caught.value.fix) == "featureflow train --help"
    with pytest.raises(UserError) as caught:
        read_recipe(
            write(tmp_path, ""), {"train.stpes": "1", "colect.steps": "1"}, ("collect", "train")
        )
    assert str(caught.value.fix) == "featureflow run --help"


def test_a_recipe_beside_is_named_when_its_name_is_nearly_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pythia-mine.toml").write_text("")
    for nearly in ("pythia-mine", "pythia-mien.toml"):
        with pytest.raises(UserError, match="did you mean pythia-mine") as caught:
            recipe_path(nearly)
    assert "tiny" in str(caught.value)
    with pytest.raises(UserError, match="did you mean laptop"):
        recipe_path("lptop")


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="no recipe 'lptop'"):
        recipe_path("lptop")


@pytest.mark.usefixtures("toy_stages")
def test_the_fields_of_tables_in_a_list_are_explained() -> None:
    rows = {place: (kind, meaning) for place, kind, _, meaning in describe(Config, "train")}
    assert rows["train.others"] == ("list of {k, kind} length ≥ 1", "more")
    assert rows["train.others[].k"] == ("int > 0", "active latents a token")


def test_every_field_of_every_stage_is_explained() -> None:
    for stage in STAGES:
        rows = describe(StageName(stage).module.Config, stage)
        missing = [place for place, _, _, meaning in rows if not meaning]
        assert rows, f"{stage} has no fields"
        assert not missing, f"without a line of documentation: {missing}"


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "configs").glob("*.toml")), ids=lambda p: p.stem
)
def test_every_shipped_recipe_parses(path: Path) -> None:
    recipe = read_recipe(str(path))
    assert set(recipe.configs) == set(STAGES)
    assert recipe.description


def test_settings_that_moved_are_named_with_their_new_place(tmp_path: Path) -> None:
    path = tmp_path / "old.toml"
    path.write_text('[atlas]\ntitle = "mine"\nmin_f1 = 0.7\n[describe]\nmin_firings = 3\n')
    with pytest.raises(UserError) as raised:
        read_recipe(str(path), {"atlas.seed": "3"}, ("atlas",))
    found = {problem.where: (problem.what, problem.expected) for problem in raised.value.problems}
    moved = "this setting moved"
    assert found == {
        "atlas.min_f1": (moved, "describe.min_f1"),
        "atlas.seed": (moved, "describe.seed"),
        "describe.min_firings": (moved, "describe.min_active"),
    }


@pytest.mark.usefixtures("toy_stages")
def test_half_a_character_and_a_list_of_wrong_entries_are_one_problem_each(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_recipe(write(tmp_path, ""), {"train.sites": "\udcff"}, ("train",))
    assert "half a character" in str(caught.value)
    text = "[train]\nothers = [{kind = 'topk', k = 0}, {k = 1, x = 2}]\n"
    with pytest.raises(UserError) as caught:
        read_recipe(write(tmp_path, text), {}, ("train",))
    assert [p.where for p in caught.value.problems] == ["train.others[0].k", "train.others[1].x"]
