"""A lens is one new file, wherever it lies: found, asked for with its own options, kept as an
artifact. What is wrong with one is said at once."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner

from featureflow.errors import UserError
from pipeline.cli import app, run_command
from pipeline.findings import read_finding
from pipeline.lenses import base
from pipeline.lenses.base import add_folder, find_lens, fitting, kept, lens_names, run_lens
from pipeline.run import Run
from pipeline.stages.recipe import read_recipe

WIDTHS = '''"""How many latents has each SAE? Read off the descriptions; costs nothing."""

from __future__ import annotations

from typing import Annotated

import pandas as pd
from annotated_types import Ge
from typing_extensions import Doc

from pipeline.findings import Finding
from pipeline.lenses.base import LensConfig
from pipeline.run import Run

TITLE = "latents of every SAE"
NEEDS = ("train",)


class Config(LensConfig):
    """What is counted."""

    n_most: Annotated[int, Ge(1), Doc("sites at most")] = 100
    sites: Annotated[tuple[str, ...], Doc("only these")] = ()


def look(run: Run, config: Config) -> Finding:
    wanted = [site for site in run.saes if site.short in config.sites or not config.sites]
    rows = [
        {"site": site.short, "n_latents": run.saes.description(site)["n_latents"]}
        for site in wanted[: config.n_most]
    ]
    table = pd.DataFrame(rows)
    columns = pd.DataFrame({"feature": [f"{row['site']}/0" for row in rows], "first": True})
    text = f"{len(rows)} SAEs were counted."
    return Finding(tables={"widths": table}, text=text, headline={"n": len(rows)}, columns=columns)
'''


@pytest.fixture(autouse=True)
def nothing_added(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_added", [])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "sae_widths.py").write_text(WIDTHS)
    return tmp_path / "elsewhere"


def options(artifacts: Path) -> list[str]:
    return ["--recipe", "tiny", "--artifacts", str(artifacts), "--threads", "1", "-q"]


def test_a_lens_of_another_package_is_a_command_with_its_own_options(
    folder: Path, artifacts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `pip install` of a package with an entry point leaves on the path."""
    about = folder / "widths-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: widths\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[featureflow.lenses]\nsae-widths = sae_widths\n")
    monkeypatch.syspath_prepend(str(folder))
    listed = CliRunner().invoke(app, ["lens", "list"])
    assert "latents of every SAE" in listed.output
    explained = CliRunner().invoke(app, ["lens", "sae-widths", "--help"]).output
    assert "--n-most, --most VALUE" in explained
    assert "sites at most <int ≥ 1>  [default: 100]" in explained
    made = CliRunner().invoke(app, ["lens", "sae-widths", "--most", "3", *options(artifacts)])
    assert made.exit_code == 0, made.output
    assert "3 SAEs were counted." in made.output
    place = artifacts / "tiny" / "lenses" / "sae-widths"
    assert json.loads((place / "finding.json").read_text()) == {
        "name": "sae-widths",
        "title": "latents of every SAE",
        "headline": {"n": 3},
        "figure": False,
        "columns": [{"name": "feature", "kind": "feature"}, {"name": "first", "kind": "number"}],
        "tables": {
            "widths": {
                "rows": 3,
                "columns": [
                    {"name": "site", "kind": "site"},
                    {"name": "n_latents", "kind": "number"},
                ],
            }
        },
    }
    assert pd.read_csv(place / "tables" / "widths.csv")["n_latents"].tolist() == [64] * 3
    one = ["lens", "sae-widths", "--sites", '["L1", "L2.mlp"]', *options(artifacts)]
    assert run_command(one) == 0
    table = pd.read_parquet(place / "tables" / "widths.parquet")
    assert table["site"].tolist() == ["L1", "L2.mlp"]


def test_a_recipe_names_lenses_and_their_options(
    folder: Path, artifacts: Path, tmp_path: Path
) -> None:
    add_folder(folder)
    tiny = (Path(__file__).parents[3] / "configs" / "tiny.toml").read_text()
    assert "[lenses.reconstruction]" in tiny
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        tiny + '\n[lenses]\nnames = ["frontier"]\n\n[lenses.sae-widths]\nn_most = 2\n'
    )
    common = ["--recipe", str(recipe), *options(artifacts)[2:]]
    made = CliRunner().invoke(app, ["lenses", *common])
    assert made.exit_code == 0, made.output
    for name in ("sae-widths", "frontier", "reconstruction", "loss-recovered"):
        assert f"lenses/{name}: " in made.output
    again = CliRunner().invoke(app, ["lenses", *common])
    assert again.output.count("up to date") == 4
    assert "2 SAEs were counted" in CliRunner().invoke(app, ["lens", "sae-widths", *common]).output
    recipe.write_text(tiny + "\n[lenses.sae-widths]\nn_mots = 2\nsites = 3\n\n[lenses.sae-wides]\n")
    wrong = CliRunner().invoke(app, ["lenses", *common])
    assert isinstance(wrong.exception, UserError)
    told = str(wrong.exception)
    assert "lenses.sae-widths.n_mots" in told
    assert "lenses.sae-widths.sites" in told
    assert "did you mean 'sae-widths'" in told


def test_a_recipe_with_the_section_of_before_learns_its_new_names(tmp_path: Path) -> None:
    recipe = tmp_path / "old.toml"
    recipe.write_text("[evaluate]\nn_tokens = 512\nn_ce_sites = 2\n")
    with pytest.raises(UserError) as caught:
        read_recipe(str(recipe), stages=("collect",))
    found = {problem.where: problem.expected for problem in caught.value.problems}
    assert found == {
        "evaluate.n_tokens": "lenses.reconstruction.n_tokens",
        "evaluate.n_ce_sites": "lenses.loss-recovered.n_sites",
    }


def test_a_lens_in_a_file_is_looked_through_by_its_path(folder: Path, artifacts: Path) -> None:
    command = ["lens", str(folder / "sae_widths.py"), *options(artifacts)]
    assert "8 SAEs were counted." in CliRunner().invoke(app, command).output
    missing = CliRunner().invoke(app, ["lens", "nowhere/lens.py", *options(artifacts)])
    assert "there is no such file" in str(missing.exception)


def test_what_a_lens_lacks_is_named(folder: Path) -> None:
    (folder / "half.py").write_text("TITLE = 'half'\nNEEDS = 'collect'\n")
    add_folder(folder)
    assert {"half", "sae-widths", "groups"} <= set(lens_names())
    with pytest.raises(UserError, match="lacks NEEDS, Config, look, a docstring"):
        find_lens("half")
    with pytest.raises(UserError, match="no lens 'group'") as caught:
        find_lens("group")
    assert "'groups'" in str(caught.value)
    (folder / "groups.py").write_text(WIDTHS)
    with pytest.raises(UserError, match="two lenses are named 'groups'"):
        lens_names()


def test_wrong_options_are_all_reported(artifacts: Path) -> None:
    command = ["lens", "groups", "--tokens", "0", "--n-contexts", "many", *options(artifacts)]
    wrong = CliRunner().invoke(app, command)
    assert isinstance(wrong.exception, UserError)
    assert len(wrong.exception.problems) == 2
    assert "greater than or equal to 1" in str(wrong.exception)
    assert run_command(["lens", "groups", "--pairs", "3", *options(artifacts)]) == 2


def test_a_lens_that_another_needs_looks_first_and_its_change_is_seen(run: Run) -> None:
    find = find_lens("reconstruction")
    first = run_lens("reconstruction", run, find.Config(n_tokens=300, n_resamples=20))
    frontier = run_lens("frontier", run)
    assert frontier.inputs == {"reconstruction": first.digest}
    assert {"frontier", "reconstruction"} <= set(fitting(run))
    run_lens("reconstruction", run, find.Config(n_tokens=301, n_resamples=20))
    assert "frontier" not in fitting(run), "it was made from another reconstruction"
    with pytest.raises(UserError, match="do not belong together"):
        run.lens("frontier")
    assert run_lens("frontier", run).digest != frontier.digest
    assert read_finding(fitting(run)["frontier"]).headline == {"n_compared": 0, "n_on_frontier": 0}


def test_nothing_is_kept_outside_a_look() -> None:
    counted: list[int] = []
    assert kept("x", lambda: counted.append(1) or 5) == 5
    assert kept("x", lambda: counted.append(1) or 6) == 6
    assert len(counted) == 2


def test_the_page_lists_every_lens() -> None:
    page = (Path(__file__).parents[3] / "docs" / "lenses.md").read_text()
    listed = CliRunner().invoke(app, ["lens", "list", "--markdown"]).output
    table = page.partition("<!-- lenses: begin -->\n")[2].partition("<!-- lenses: end -->")[0]
    assert table == listed
