"""The whole pipeline on the recipe `tiny`, by the command a user types; then every artifact is
opened and its meaning recomputed from what lies above it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data.model.language_model import LanguageModel
from data.store import ActivationStore
from featureflow.sites import parse_site
from pipeline.artifact import Artifact
from pipeline.cli import run_command
from pipeline.findings import open_finding, read_finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.held_out import choose_rows
from pipeline.run import Run
from pipeline.saes import FOLDER, Saes
from pipeline.stages import STAGES, StageName
from pipeline.stages.recipe import read_recipe

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "configs" / "tiny.toml")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    assert (
        run_command(["run", "--recipe", RECIPE, "--artifacts", str(folder), "--threads", "1"]) == 0
    )
    return folder / "tiny"


def opened(artifacts: Path, stage: str) -> Artifact:
    module = StageName(stage).module
    return Artifact.open(artifacts / stage, kind=module.KIND, schema=module.SCHEMA)


PLACES = [stage for stage in STAGES if stage != "lenses"]
PLACES += [f"lenses/{name}" for name in ("reconstruction", "loss-recovered")]


@pytest.mark.parametrize("place", PLACES)
def test_every_artifact_is_complete_and_undamaged(artifacts: Path, place: str) -> None:
    stage, _, lens = place.partition("/")
    artifact = open_finding(artifacts, lens) if lens else opened(artifacts, stage)
    artifact.verify()
    assert artifact.summary, "every stage has headline numbers"
    shown = (".png", "site/index.html")
    assert any(name.endswith(shown) for name in artifact.files), "every stage has something to see"


def test_stored_activations_are_those_of_the_model(artifacts: Path) -> None:
    store = ActivationStore.open(artifacts / "collect" / "store.zarr")
    model = LanguageModel.open(
        read_recipe(RECIPE, stages=("collect",)).configs["collect"].model, dtype="float32"
    )
    start = 3 * store.n_context
    ids = store.tokens().id[start : start + store.n_context].astype(np.int64)
    seen = model.activations(torch.from_numpy(ids)[None], store.sites)
    for site in store.sites:
        stored = store.read(site, start, start + store.n_context)
        np.testing.assert_allclose(stored, seen[site][0].numpy(), rtol=0.01, atol=0.01)


def test_dictionaries_explain_more_than_the_mean(artifacts: Path) -> None:
    store = ActivationStore.open(artifacts / "collect" / "store.zarr")
    dictionaries = Saes(opened(artifacts, "train").path / FOLDER)
    assert set(dictionaries) == set(store.sites)
    rows = store.kept_rows("validation")
    for site, sae in dictionaries.items():
        x = torch.from_numpy(store.read(site, 0, store.n_rows)[rows])
        unexplained = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
        assert float(unexplained) < 0.95, site
        assert int((sae.encode(x) > 0).sum(1).max()) <= 4


def measured(artifacts: Path) -> pd.DataFrame:
    return read_finding(open_finding(artifacts, "reconstruction")).tables["metrics"]


def test_evaluation_is_what_a_slow_recount_gives(artifacts: Path) -> None:
    table = measured(artifacts).set_index("site")
    store = ActivationStore.open(artifacts / "collect" / "store.zarr")
    dictionaries = Saes(opened(artifacts, "train").path / FOLDER)
    drawn = choose_rows(Run.open(artifacts), Sampled(), 1024, sites=store.sites)
    rows = np.concatenate(drawn)
    for site, sae in dictionaries.items():
        x = torch.from_numpy(store.read(site, 0, store.n_rows)[rows]).double()
        error = x - sae(x.float()).double()
        fvu = float(error.square().sum() / (x - x.mean(0)).square().sum())
        found = table.loc[site.short if site.short in table.index else site.name]
        assert found["fvu"] == pytest.approx(fvu, rel=1e-3)


def test_best_links_are_the_largest_cosines(artifacts: Path) -> None:
    edges = pd.read_parquet(artifacts / "link" / "edges.parquet")
    dictionaries = Saes(opened(artifacts, "train").path / FOLDER)
    residual = edges[(edges["relation"] == "residual") & (edges["rank"] == 0)]
    assert len(residual)
    for (source, target), group in residual.groupby(["source_site", "target_site"], observed=True):
        a, b = (dictionaries[parse_site(str(name))].W_dec for name in (source, target))
        cosine = torch.nn.functional.normalize(b, dim=1) @ torch.nn.functional.normalize(a, dim=1).T
        chosen = cosine.numpy()[group["target_latent"], group["source_latent"]]
        np.testing.assert_allclose(group["cosine"], chosen, atol=1e-5)


def test_the_graph_only_points_forward(artifacts: Path) -> None:
    edges = pd.read_parquet(artifacts / "link" / "edges.parquet")
    for source, target in (
        edges[["source_site", "target_site"]].drop_duplicates().itertuples(index=False)
    ):
        assert parse_site(str(source)).layer <= parse_site(str(target)).layer


def test_the_atlas_has_a_page_and_rows_for_every_feature(artifacts: Path) -> None:
    features = pd.read_parquet(artifacts / "describe" / "tables" / "features.parquet")
    n_expected = sum(
        sae.n_latents for sae in Saes(opened(artifacts, "train").path / FOLDER).values()
    )
    assert len(features) == n_expected
    assert (artifacts / "atlas" / "site" / "index.html").is_file()


def test_steering_left_samples_with_the_unsteered_text_beside(artifacts: Path) -> None:
    samples = pd.read_parquet(artifacts / "steer" / "samples.parquet")
    assert samples["arm"].nunique() > 2
    assert samples["unsteered"].str.len().gt(0).all()
    twins = samples.groupby(["prompt", "sample"])["unsteered"].nunique()
    assert (twins == 1).all(), "all arms have the same unsteered text beside them"


def test_the_front_page_links_to_what_is_there(artifacts: Path) -> None:
    page = (artifacts / "index.html").read_text()
    for place in PLACES:
        assert f'id="{place}"' in page
    for name in ("atlas/site/index.html",):
        assert name in page
        assert (artifacts / name).is_file()


def test_the_readme_s_table_is_made_of_the_artifacts(artifacts: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.headline", str(artifacts)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    metrics = measured(artifacts)
    assert f"**{np.median(metrics.fvu):.3f}**" in done.stdout
    described = opened(artifacts, "describe").summary
    assert f"**{described['holding_share']:.0%}**" in done.stdout
    chosen = json.loads((artifacts / "steer" / "features.json").read_text())["features"]
    assert all(f"`{each['feature']}`" in done.stdout for each in chosen)
    page = tmp_path / "results.md"
    begin, end = (
        "<!-- measured: begin (python -m benchmarks.headline) -->",
        "<!-- measured: end -->",
    )
    short = tmp_path / "short.md"
    for each in (page, short):
        each.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    write = [
        sys.executable,
        "-m",
        "benchmarks.headline",
        str(artifacts),
        "--write",
        "--readme",
        str(short),
        "--results",
        str(page),
    ]
    subprocess.run(write, cwd=ROOT, check=True)
    assert page.read_text() == f"before\n{begin}\n{done.stdout.rstrip()}\n{end}\nafter\n"
    cells = [line.split(" | ")[:3] for line in done.stdout.splitlines() if line.startswith("| ")]
    for line in short.read_text().splitlines()[4:-2]:
        assert line.rstrip(" |").split(" | ") in cells


def test_a_second_run_does_nothing_and_prints_the_same_numbers(
    artifacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {
        path: path.stat().st_mtime_ns
        for path in artifacts.rglob("*")
        if path.name == "manifest.json"
    }
    assert run_command(["run", "--recipe", RECIPE, "--artifacts", str(artifacts.parent)]) == 0
    text = capsys.readouterr().out
    assert text.count("up to date") == len(PLACES) + 1, "and the lens frontier, which draws nothing"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    summary = json.loads((artifacts / "collect" / "manifest.json").read_text())["summary"]
    assert f"{summary['n_tokens']:,}" in text


def test_a_changed_section_reruns_that_stage_and_nothing_above(
    artifacts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", "--recipe", RECIPE, "--artifacts", str(artifacts.parent), "--to", "evaluate"]
    assert run_command([*command, "--lenses.reconstruction.n_tokens", "512"]) == 0
    text = capsys.readouterr().out
    assert "collect: up to date" in text
    assert "train: up to date" in text
    assert "lenses/reconstruction: done" in text
    assert "lenses/loss-recovered: up to date" in text
    assert run_command(command) == 0, "and back, for the tests that follow"


def test_every_block_of_the_tutorial_runs(
    artifacts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, in one folder, the commands as a user's shell has them and the Python in one
    session."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(artifacts, tmp_path / "artifacts" / "tiny", symlinks=True)
    monkeypatch.chdir(tmp_path)
    session: dict[str, object] = {}
    blocks = re.findall(
        r"```(bash|python)\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), flags=re.DOTALL
    )
    assert len(blocks) >= 10
    for language, text in blocks:
        if language == "python":
            exec(compile(text, "docs/tutorial.md", "exec"), session)
            continue
        for line in text.strip().splitlines():
            program, *arguments = shlex.split(line)
            assert program == "featureflow"
            assert run_command(arguments) == 0, line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--collect.sites", '["resid_post:9"]'], "resid_post:9"),
        (["--collect.n_context", "100000", "--collect.shard_rows", "100000000"], "context"),
        (["--train.n_latents", "0"], "greater than 0"),
        (["--train.architecture.k", "1000"], "k"),
        (
            ["--collect.corpus", '{kind = "files", paths = ["no/such/file.txt"]}'],
            "no/such/file.txt",
        ),
        (["--collect.model", '{kind = "folder", path = "no/such/model"}'], "no/such/model"),
    ],
)
def test_bad_input_is_explained_and_nothing_is_left(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run_command(
            ["run", "--recipe", RECIPE, "--artifacts", str(tmp_path), "--to", "train", *arguments]
        )
        == 2
    )
    text = capsys.readouterr().err
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "tiny" / "train" / "manifest.json").exists()


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_dictionaries(
    artifacts: Path, tmp_path: Path
) -> None:
    """Kill -9 at growing moments until one run gets through; the weights are those of the
    undisturbed run."""
    command = [
        sys.executable,
        "-m",
        "pipeline",
        "run",
        "--recipe",
        RECIPE,
        "--artifacts",
        str(tmp_path),
        "--to",
        "train",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for attempt in range(12):
        with subprocess.Popen(
            [*command, "--threads", "1"], env=environment, stdout=subprocess.DEVNULL
        ) as process:
            deadline = time.monotonic() + 4 + 1.5 * attempt
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
        if process.returncode == 0:
            break
    else:
        pytest.fail("never got through")
    ours = Saes(opened(tmp_path / "tiny", "train").path / FOLDER)
    theirs = Saes(opened(artifacts, "train").path / FOLDER)
    for site, sae in ours.items():
        assert torch.equal(sae.W_dec, theirs[site].W_dec), site
