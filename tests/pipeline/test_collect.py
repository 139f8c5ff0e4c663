"""The collect stage: what is stored is what the model does, and a killed run ends with the same
bytes."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.model.language_model import LanguageModel
from data.model.spec import Random
from data.store import FLAG_BOS, ActivationStore
from data.store.collection import collect_on_cluster
from data.store.patterns import parse_sites
from data.text.corpus import BundledText
from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.cli import run_command
from pipeline.context import RunContext
from pipeline.run import Run
from pipeline.stages.collect import Config, Inputs, outside_digests, run

CONFIG = Config(
    model=Random(n_layers=3, d_model=16, n_heads=2, d_mlp=32),
    corpus=BundledText(),
    sites=("resid_post", "mlp_out:1"),
    n_context=32,
    n_tokens=3000,
    shard_rows=1024,
    chunk_rows=128,
    validation_fraction=0.2,
    batch_contexts=5,
)


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    return run(CONFIG, Inputs(), tmp_path_factory.mktemp("collected") / "collect", RunContext())


def test_the_store_holds_what_the_model_computes_for_its_tokens(collected):
    store = ActivationStore.open(collected.path / "store.zarr")
    model = LanguageModel.open(CONFIG.model)
    ids = torch.from_numpy(store.tokens().id.astype("int64")).reshape(-1, CONFIG.n_context)
    seen = model.activations(ids[:5], store.sites)
    for site in store.sites:
        expected = seen[site].flatten(0, 1).float().numpy()
        assert np.array_equal(store.read(site, 0, len(expected)), expected)


def test_no_document_is_in_both_splits_and_every_context_starts_with_bos(collected):
    store = ActivationStore.open(collected.path / "store.zarr")
    tokens = store.tokens()
    start = store.validation_start
    assert 0 < start < store.n_rows
    assert set(tokens.document[:start].tolist()).isdisjoint(tokens.document[start:].tolist())
    assert (tokens.flags[:: CONFIG.n_context] & FLAG_BOS).all()


def test_what_describes_the_run_is_recorded(collected):
    store = ActivationStore.open(collected.path / "store.zarr")
    assert store.provenance["model_fingerprint"] == LanguageModel.open(CONFIG.model).fingerprint
    assert collected.inputs == outside_digests(CONFIG)
    assert collected.summary["n_tokens"] == store.n_rows


class _Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(collected, tmp_path):
    def interrupt(label: str, done: int, total: int) -> None:
        if label == "collect" and done > 1500:
            raise _Interrupted

    with pytest.raises(_Interrupted):
        run(CONFIG, Inputs(), tmp_path / "collect", RunContext(progress=interrupt))
    assert not (tmp_path / "collect").exists()
    labels = []
    run(
        CONFIG,
        Inputs(),
        tmp_path / "collect",
        RunContext(progress=lambda label, done, total: labels.append((label, done))),
    )
    first = next(done for label, done in labels if label == "collect")
    assert first > 1024, "the finished shard was collected again"
    assert bytes_of(tmp_path / "collect" / "store.zarr") == bytes_of(collected.path / "store.zarr")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_with_a_scheduler_only_the_workers_need_the_device(collected, tmp_path, monkeypatch):
    """The tasks are run here and on the CPU, as the workers of another machine would on theirs."""
    opened, handed = [], []

    def opened_on(spec, *, device="cpu", **options):
        opened.append(device)
        return LanguageModel.open(spec, device=device, **options)

    def on_workers(writer, parts, *, model, machines, **options):
        handed.append((model.device, machines.scheduler))
        return collect_on_cluster(
            writer, parts, model=replace(model, device="cpu"), machines=RunContext(), **options
        )

    monkeypatch.setattr("pipeline.stages.collect.LanguageModel", SimpleNamespace(open=opened_on))
    monkeypatch.setattr("pipeline.stages.collect.collect_on_cluster", on_workers)
    far = RunContext(device="cuda:7", scheduler="tcp://elsewhere:8786")
    made = run(CONFIG, Inputs(), tmp_path / "collect", far)
    assert opened == ["cpu"]
    assert handed == [("cuda:7", "tcp://elsewhere:8786")]
    rows = [
        ActivationStore.open(each.path / "store.zarr").read("blocks.2.hook_resid_post", 0, 2000)
        for each in (made, collected)
    ]
    assert np.array_equal(*rows)


def test_a_text_file_that_changes_changes_the_digest(tmp_path):
    from data.text.corpus import TextFiles

    path = tmp_path / "text.txt"
    path.write_text("one text")
    config = CONFIG.replace(corpus=TextFiles(paths=(str(path),)))
    before = outside_digests(config)
    path.write_text("two text")
    assert outside_digests(config)["text"] != before["text"]
    assert outside_digests(config)["model"] == before["model"]


ALL = tuple(Site(layer, kind) for layer in range(6) for kind in ("mlp_out", "resid_post"))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["resid_post"], ["L0", "L1", "L2", "L3", "L4", "L5"]),
        (["mlp_out:0,5"], ["L0.mlp", "L5.mlp"]),
        (["resid_post:1-5/2"], ["L1", "L3", "L5"]),
        (["L2", "blocks.1.hook_mlp_out", "L2"], ["L1.mlp", "L2"]),
    ],
)
def test_patterns_name_sites_in_the_order_of_the_model(patterns, expected):
    assert [site.short for site in parse_sites(patterns, ALL)] == expected


def test_every_bad_pattern_is_reported():
    with pytest.raises(UserError) as caught:
        parse_sites(["L9", "mlp_out:x", "neurons"], ALL)
    assert len(caught.value.problems) == 3


def test_the_sites_that_there_are_are_listed_as_patterns_that_name_them():
    some = (*ALL[1::2], Site(2, "mlp_out"), Site(4, "mlp_out"), Site(3, "attn_out"))
    with pytest.raises(UserError) as caught:
        parse_sites(["L1.mlp"], some)
    (problem,) = caught.value.problems
    assert problem.expected == "resid_post:0-5, mlp_out:2,4, attn_out:3"
    patterns = problem.expected.split(", ")
    assert set(parse_sites(patterns, some)) == set(some)


def test_a_text_that_is_shorter_than_asked_is_said_to_be(tmp_path):
    few = CONFIG.replace(n_tokens=1000, sites=("L0",))
    assert "warnings.json" not in run(few, Inputs(), tmp_path / "few", RunContext()).files
    passages = few.replace(n_tokens=10_000_000, max_document_tokens=20)
    made = run(passages, Inputs(), tmp_path / "all", RunContext())
    (text,) = json.loads(made.file("warnings.json").read_text())
    assert (
        text == f"the text gave {made.summary['n_tokens']:,} of the 10,000,000 tokens asked for "
        "(n_tokens)"
    )


def test_an_imported_store_is_trained_on_from_the_command_line(tmp_path, capsys):
    """Three of 24 planted directions a row: the dictionary finds most of what varies."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(24, 32)) / np.sqrt(32)
    codes = np.zeros((4000, 24))
    np.put_along_axis(codes, rng.random(codes.shape).argsort(1)[:, :3], 1.0, 1)
    rows = ((codes * rng.uniform(1, 2, codes.shape)) @ directions).astype(np.float32)
    np.save(tmp_path / "L2.npy", rows)
    store = str(tmp_path / "store.zarr")
    imports = ["store", "import", str(tmp_path / "L2.npy"), store, "--dtype", "float32", "-q"]
    assert run_command(imports) == 0
    words = ["-r", "tiny", "-q", "--artifacts", str(tmp_path), "--collect.imported", store]
    words += ["--train.initialisation", "independent", "--train.steps", "300"]
    assert run_command(["run", "--to", "train", *words]) == 0
    assert "does not say its model" in capsys.readouterr().out
    opened = Run.open(tmp_path / "tiny")
    held_out = opened.store.kept_rows("validation")
    assert np.array_equal(opened.store.read(Site(2, "resid_post"), 0, 4000), rows)
    x = torch.from_numpy(rows[held_out])
    error = opened.saes[Site(2, "resid_post")](x) - x
    assert error.square().sum() < 0.4 * (x - x.mean(0)).square().sum()
    other = Config(imported=store).replace(model=Random(d_model=16, n_heads=2))
    assert outside_digests(other) == outside_digests(Config(imported=store))
    wrong = '{kind = "random", d_model = 16, n_heads = 2}'
    assert run_command(["run", "--to", "evaluate", *words, "--collect.model", wrong]) == 2
    assert "expected: a model of width 32" in capsys.readouterr().err
