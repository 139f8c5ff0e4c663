"""What training tells while it runs: one line a layer with its numbers, trackers, and where a bad
row lies."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn

from data.model.spec import Random
from data.store import ActivationStore
from data.text.corpus import BundledText
from featureflow.errors import UserError
from pipeline.artifact import Artifact, canonical_json
from pipeline.console import Bars, tell_finished
from pipeline.context import RunContext
from pipeline.stages import collect, train
from pipeline.training import trackers
from pipeline.training.plan import Independent
from sae.architectures import TopK

CONFIG = train.Config(
    architecture=TopK(k=4),
    n_latents=32,
    sites=("L0", "L1"),
    initialisation=Independent(),
    steps=20,
    batch_size=64,
    record_every=10,
    precision="float32",
)
LINE = r"train L0 · loss [\d.]+  FVU 0\.\d{3}  L0 4\.0  dead \d+  [\d,]+ tokens/s"


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    config = collect.Config(
        model=Random(n_layers=2, d_model=16, n_heads=2, d_mlp=32),
        corpus=BundledText(),
        n_context=32,
        n_tokens=2048,
        shard_rows=512,
        chunk_rows=128,
        validation_fraction=0.2,
        dtype="float32",
    )
    return collect.run(
        config, collect.Inputs(), tmp_path_factory.mktemp("store") / "collect", RunContext()
    )


def _train(
    collected: Artifact, out: Path, config: train.Config = CONFIG, **context: object
) -> Artifact:
    return train.run(
        config, train.Inputs(collect=collected), out, RunContext(**{"n_threads": 1, **context})
    )


def test_the_progress_line_of_a_layer_has_its_numbers(
    collected: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reported: list[tuple[str, int, int]] = []
    _train(collected, tmp_path / "train", progress=lambda *call: reported.append(call))
    assert reported[0] == ("train L0", 1, 20)
    assert re.fullmatch(LINE, reported[19][0])
    assert reported[19][1:] == (20, 20)
    for call in reported:
        tell_finished(*call)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines] == [["train", "L0"], ["train", "L1"]]


def test_a_layer_keeps_one_bar_while_its_numbers_change() -> None:
    console = Console(width=120, force_terminal=False, record=True)
    progress = Progress(TextColumn("{task.description}"), console=console)
    bars = Bars(progress=progress)
    bars._since["train L0"] = -10.0
    for step in (1, 2, 3):
        bars(f"train L0 · loss {step}", step, 3)
    assert len(progress.tasks) == 1
    assert progress.tasks[0].description == "train L0 · loss 3"
    assert "train L0  loss 3" in console.export_text()


def test_tensorboard_is_told_the_curves(collected: Artifact, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records: list[dict] = []
    config = CONFIG.replace(log_to=("tensorboard",))
    done = _train(
        collected, tmp_path / "train", config, metrics=lambda record: records.append(dict(record))
    )
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    reported = [(event.step, event.value) for event in events.Scalars("L1/fvu")]
    wanted = [(r["step"], r["fvu"]) for r in records if r["site"] == "L1" and "fvu" in r]
    assert reported == [(step, pytest.approx(fvu)) for step, fvu in wanted]
    assert len(reported) == 2
    assert events.Scalars("L0/tokens_per_second")
    assert not any("tensorboard" in name for name in done.files)


def test_wandb_is_told_the_curves_offline(
    collected: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    _train(collected, tmp_path / "train", CONFIG.replace(log_to=("wandb",)))
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    written = file.read_bytes()  # a log of protocol buffers, in which names are plain
    for name in (b"L0/fvu", b"L0/step", b"L1/loss", b"L1/tokens_per_second", b"batch_size"):
        assert name in written, name


def test_a_tracker_that_is_not_installed_is_named(
    collected: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        _train(collected, tmp_path / "train", CONFIG.replace(log_to=("wandb",)))
    assert not list(tmp_path.iterdir())


def test_whom_training_tells_is_no_part_of_what_it_makes() -> None:
    assert canonical_json(CONFIG.replace(log_to=("wandb",))) == canonical_json(CONFIG)
    assert canonical_json(CONFIG.replace(seed=1)) != canonical_json(CONFIG)


@pytest.mark.parametrize("max_rows_in_memory", [100, 1_000_000])
def test_nan_in_a_batch_names_the_shard_and_the_row(
    collected: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_rows_in_memory: int
) -> None:
    store, read = ActivationStore.open(collected.path / "store.zarr"), ActivationStore.read_stored
    bad = int(store.kept_rows("train")[700])

    def spoiled(self: ActivationStore, site: object, first_chunk: int, out: np.ndarray) -> None:
        read(self, site, first_chunk, out)
        place = bad - first_chunk * self.chunk_rows
        if 0 <= place < len(out):
            out[place, 3] = np.nan

    monkeypatch.setattr(ActivationStore, "read_stored", spoiled)
    config = CONFIG.replace(steps=200, max_rows_in_memory=max_rows_in_memory)
    with pytest.raises(UserError, match="NaN") as caught:
        _train(collected, tmp_path / "train", config)
    assert f"L0 row {bad} (shard {bad // 512})" in str(caught.value).replace("L0, ", "L0 ")
    assert not (tmp_path / "train").exists()
