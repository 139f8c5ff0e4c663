"""A run is opened once; parts that do not belong together, and another model, are refused with the
command."""

from __future__ import annotations

import pickle
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from data.model.language_model import LanguageModel
from data.model.spec import Folder, Random
from data.text.corpus import BundledText
from featureflow.errors import UserError
from featureflow.sites import parse_site
from pipeline.artifact import SCHEMAS, Artifact
from pipeline.context import RunContext
from pipeline.describe.asking import read_text
from pipeline.findings import Finding, write_finding
from pipeline.lenses import loss_recovered
from pipeline.run import Run
from pipeline.serve.live import LiveAtlas
from pipeline.stages import collect, describe, steer
from sae import load_sae
from tests.pipeline.small_run import DESCRIBE, SmallRun


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
    assert Run.open(tmp_path).artifacts == wanted
    assert Run.open(tmp_path).need("train", "link") == {s: wanted[s] for s in ("train", "link")}
    assert Run.of(wanted).artifact("link") == wanted["link"]


def test_a_folder_without_a_run_names_the_runs_beside_it(tmp_path: Path) -> None:
    a_run(tmp_path / "laptop")
    with pytest.raises(UserError, match="there is no run here") as caught:
        Run.open(tmp_path / "desktop")
    assert caught.value.problems[0].found == "runs beside it: laptop"
    assert str(caught.value.fix) == "featureflow run"


def test_dictionaries_made_anew_do_not_belong_to_the_earlier_graph(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    made(tmp_path, "train", 2, {"collect": run["collect"]})
    opened = Run.open(tmp_path)
    opened.need("collect", "train")
    with pytest.raises(UserError) as caught:
        opened.artifact("link")
    (problem,) = caught.value.problems
    assert problem.where == str(tmp_path / "link")
    assert problem.found == run["train"].digest[:12]
    assert str(caught.value.fix) == "featureflow run --to link"
    assert not opened.has("link")


def test_what_lies_beneath_is_compared_too(tmp_path: Path) -> None:
    """The atlas names the graph alone; that graph is of an earlier train artifact."""
    run = a_run(tmp_path)
    made(tmp_path, "atlas", 1, {"link": run["link"]})
    made(tmp_path, "train", 2, {"collect": run["collect"]})
    with pytest.raises(UserError) as caught:
        Run.open(tmp_path).artifact("atlas")
    assert caught.value.problems[0].where == str(tmp_path / "link")


def test_all_that_is_missing_is_named_before_anything_is_compared(tmp_path: Path) -> None:
    a_run(tmp_path)
    run = Run.open(tmp_path)
    with pytest.raises(UserError, match="there is no artifact here") as caught:
        run.need("collect", "train", "link", "atlas")
    assert str(caught.value.fix) == "featureflow run --to atlas"
    with pytest.raises(UserError) as caught:
        run.need("collect", "steer", "atlas")
    assert [Path(str(problem.where)).name for problem in caught.value.problems] == [
        "steer",
        "atlas",
    ]
    with pytest.raises(UserError, match="there is no stage 'shop'"):
        run.artifact("shop")


def test_a_part_is_opened_without_the_parts_beneath_that_were_not_copied(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    shutil.rmtree(tmp_path / "collect")
    assert Run.open(tmp_path).artifact("link") == run["link"]


def test_the_front_page_keeps_the_stages_that_were_not_run_and_still_belong(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    anew = made(tmp_path, "train", 2, {"collect": run["collect"]})
    kept = {"collect": run["collect"], "train": anew}
    assert Run.open(tmp_path).artifacts == kept, "link is of the earlier train"
    (tmp_path / "link" / "manifest.json").unlink()
    assert Run.open(tmp_path).artifacts == kept


def test_the_parts_of_a_run_are_those_of_its_artifacts(inputs: steer.Inputs) -> None:
    run = Run.open(inputs.collect.path.parent)
    assert [site.short for site in run.saes] == ["L0", "L1", "L2", "L3", "L4"]
    site = parse_site("L3")
    assert run.saes[site] is run.saes[site]
    on_disk = load_sae(inputs.train.path / "dictionaries" / "L3")
    torch.testing.assert_close(run.saes[site].W_dec, on_disk.W_dec)
    assert run.saes.description(site)["n_latents"] == on_disk.n_latents
    assert set(run.graph.sites) == set(run.saes)
    assert len(run.tokens.id) == run.store.n_rows == 8192
    assert run.model.fingerprint == run.store.provenance["model_fingerprint"]
    (batch,) = run.held_out(100)(site)
    assert batch.shape == (100, 32)


def test_saes_keep_as_many_as_asked_and_travel_without_weights(inputs: steer.Inputs) -> None:
    saes = Run.open(inputs.collect.path.parent).saes
    (first, second, *_) = saes
    unkept = saes.keeping(0)
    assert unkept[first] is not unkept[first]
    one = saes.keeping(1)
    held = one[first]
    assert one[first] is held
    one[second]
    assert one[first] is not held
    assert len(pickle.dumps(saes)) < 4000
    travelled = pickle.loads(pickle.dumps(saes))  # noqa: S301  # our own bytes
    torch.testing.assert_close(travelled[first].W_dec, saes[first].W_dec)
    with pytest.raises(KeyError):
        saes[parse_site("L9")]


def test_a_changed_model_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    spec = Random(n_layers=2, d_model=16, n_heads=2, d_mlp=32)
    model = LanguageModel.open(spec)
    model.hf.save_pretrained(folder)
    model.tokenizer.save(folder)
    config = collect.Config(
        model=Folder(path=folder),
        corpus=BundledText(),
        n_context=16,
        n_tokens=512,
        shard_rows=512,
        chunk_rows=512,
    )
    collect.run(config, collect.Inputs(), tmp_path / "run" / "collect", RunContext(n_threads=1))
    assert Run.open(tmp_path / "run").model.n_layers == 2
    with torch.no_grad():
        model.hf.get_output_embeddings().weight[3, 0] += 1.0
    model.hf.save_pretrained(folder)
    with pytest.raises(UserError, match="not the model that the activations were") as caught:
        _ = Run.open(tmp_path / "run").model
    assert "featureflow collect --force" in str(caught.value)


CONSUMERS = {
    "live page": lambda run, out: LiveAtlas(run),
    "atlas read": lambda run, out: read_text(run.model, run.features, run.saes, "The river"),
    "plan": lambda run, out: run.plan("L1/3"),
    "lens": lambda run, out: loss_recovered.look(run, loss_recovered.Config(n_tokens=64)),
    "describe": lambda run, out: describe.run(
        DESCRIBE,
        describe.Inputs(**run.need("collect", "train", "link")),
        out / "describe",
        run.context,
    ),
}


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_every_consumer_refuses_another_model(
    small_run: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, consumer: str
) -> None:
    """The model's fingerprint is that of other weights."""
    monkeypatch.setattr(LanguageModel, "fingerprint", "0" * 64)
    run = Run.open(small_run.root, context=RunContext(n_threads=1))
    with pytest.raises(UserError, match="not the model that the activations were"):
        CONSUMERS[consumer](run, tmp_path)


def test_the_front_door_opens_a_run_from_any_folder(inputs: steer.Inputs, tmp_path: Path) -> None:
    """In a folder with a `data/` of its own, as a script would: chain, plan and samples."""
    (tmp_path / "data").mkdir()
    (tmp_path / "script.py").write_text(
        f"""
import featureflow as ff
run = ff.Run.open({str(inputs.collect.path.parent)!r})
alive = run.graph.nodes.query("alive and kind == 'resid_post' and layer == 2")["latent"]
feature = f"L2/{{alive.iloc[0]}}"
print([str(step.feature) for step in run.graph.chain(feature)].index(feature))
plan = run.plan(feature, dose=0.02)
samples = run.sample("I think", [None, plan], n_new_tokens=3)
print(len(samples), round(plan.dose, 2), samples[0].text != "")
"""
    )
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    place, made = done.stdout.splitlines()
    assert int(place) >= 0
    assert made == "2 0.02 True"


def test_a_finding_is_read_back_and_refused_once_its_inputs_changed(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    finding = Finding(
        tables={"depth": pd.DataFrame({"site": ["L0", "L1"], "score": [0.25, 0.5]})},
        text="A concept is read at half the depth.",
        headline={"median_depth": 0.5, "unknown": float("nan")},
        figure=lambda: Figure(),
        columns=pd.DataFrame({"feature": ["L0/1"], "score": [0.5]}),
    )
    with Artifact.create(
        tmp_path / "lenses" / "depth",
        kind="lens",
        schema=1,
        config={},
        inputs={"train": run["train"].digest},
    ) as draft:
        write_finding(finding, draft.path, name="depth", title="depth of a concept")
    found = Run.open(tmp_path).lens("depth")
    pd.testing.assert_frame_equal(found.tables["depth"], finding.tables["depth"])
    assert found.columns is not None
    pd.testing.assert_frame_equal(found.columns, finding.columns)
    assert (found.text.strip(), found.headline) == (finding.text, finding.headline)
    folder = tmp_path / "lenses" / "depth"
    assert {"figure.png", "figure.svg"} <= {path.name for path in folder.iterdir()}
    assert pd.read_csv(folder / "tables" / "depth.csv")["score"].tolist() == [0.25, 0.5]
    made(tmp_path, "train", 2, {"collect": run["collect"]})
    with pytest.raises(UserError, match="do not belong together") as caught:
        Run.open(tmp_path).lens("depth")
    assert str(caught.value.fix) == "featureflow lens depth"
    for name in ("../link", "other", ".."):
        with pytest.raises(UserError):
            Run.open(tmp_path).lens(name)


def test_a_finding_whose_columns_name_no_features_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="columns without a feature"):
        finding = Finding(tables={}, text="", columns=pd.DataFrame({"latent": [1]}))
        write_finding(finding, tmp_path, name="depth", title="depth of a concept")
