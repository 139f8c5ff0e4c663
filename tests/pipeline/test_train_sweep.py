"""Sweeps and transcoders: one reading of the batches for all dictionaries of a site, each what it
would be alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from data.model.spec import Random
from data.store import ActivationStore
from data.text.corpus import BundledText
from featureflow.errors import UserError
from featureflow.sites import parse_site
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.lenses import loss_recovered, reconstruction
from pipeline.lenses.frontier import frontier_of
from pipeline.run import Run
from pipeline.saes import FOLDER, Saes
from pipeline.stages import collect, train
from pipeline.training.batch_jobs import Transcoders, Variant
from pipeline.training.plan import Chain
from sae import load_sae
from sae.architectures import BatchTopK, JumpRelu, TopK

COLLECT = collect.Config(
    model=Random(n_layers=3, d_model=16, n_heads=2, d_mlp=32, scale=3.0),
    corpus=BundledText(),
    sites=("resid_post", "resid_mid:1", "mlp_out:1"),
    n_context=32,
    n_tokens=4000,
    shard_rows=1024,
    chunk_rows=128,
    validation_fraction=0.2,
    model_dtype="float32",
    dtype="float32",
)
CONFIG = train.Config(
    architecture=TopK(k=4),
    n_latents=64,
    sites=("resid_post",),
    steps=40,
    batch_size=64,
    initialisation=Chain(next_steps=25),
    record_every=10,
    checkpoint_every=8,
    precision="float32",
)
SWEEP = (
    Variant(name="k6", architecture=BatchTopK(k=6)),
    Variant(name="wide", sites=("L2",), n_latents=96, architecture=JumpRelu(target_l0=5)),
)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return collect.run(
        COLLECT, collect.Inputs(), tmp_path_factory.mktemp("store") / "collect", RunContext()
    )


def _train(collected: Artifact, out: Path, config: train.Config, **context: object) -> Artifact:
    return train.run(
        config, train.Inputs(collect=collected), out, RunContext(**{"n_threads": 1, **context})
    )


@pytest.fixture(scope="module")
def swept(collected: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return _train(
        collected, tmp_path_factory.mktemp("swept") / "train", CONFIG.replace(sweep=SWEEP)
    )


def _weights(artifact: Artifact, place: str) -> bytes:
    return (artifact.path / place / "sae.safetensors").read_bytes()


def test_each_dictionary_of_a_sweep_is_what_it_would_be_alone(
    swept: Artifact, collected: Artifact, tmp_path: Path
) -> None:
    alone = _train(collected, tmp_path / "base", CONFIG)
    other = _train(collected, tmp_path / "other", CONFIG.replace(architecture=BatchTopK(k=6)))
    for site in ("L0", "L1", "L2"):
        assert _weights(swept, f"dictionaries/{site}") == _weights(alone, f"dictionaries/{site}"), (
            site
        )
        assert _weights(swept, f"variants/k6/{site}") == _weights(other, f"dictionaries/{site}"), (
            site
        )
    start = CONFIG.replace(sites=("L2",), architecture=JumpRelu(target_l0=5), n_latents=96)
    wide = _train(collected, tmp_path / "wide", start)
    assert _weights(swept, "variants/wide/L2") == _weights(wide, "dictionaries/L2")
    assert not (swept.path / "variants" / "wide" / "L1").exists()
    assert (
        load_sae(swept.path / "variants" / "k6" / "L0").metadata["initialisation"]["parent"] == "L1"
    )
    assert (
        load_sae(swept.path / "variants" / "wide" / "L2").metadata["initialisation"]["parent"]
        is None
    )


def test_a_sweep_reads_each_activation_once(
    collected: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, read = [], ActivationStore.read

    def counted(self: ActivationStore, site: object, start: int, stop: int) -> np.ndarray:
        rows.append(stop - start)
        return read(self, site, start, stop)

    monkeypatch.setattr(ActivationStore, "read", counted)
    _train(collected, tmp_path / "one", CONFIG)
    alone, rows = sum(rows), []
    _train(collected, tmp_path / "three", CONFIG.replace(sweep=SWEEP))
    assert 0 < sum(rows) == alone


class _Killed(Exception):
    """Raised from the progress callback, in place of a kill between two steps."""


@pytest.mark.parametrize("seed", [0, 1])
def test_a_sweep_killed_at_random_steps_ends_with_the_same_bytes(
    swept: Artifact, collected: Artifact, tmp_path: Path, seed: int
) -> None:
    generator, out = np.random.default_rng(seed), tmp_path / "train"
    for _ in range(3):
        left = int(generator.integers(1, 90))

        def kill(label: str, done: int, total: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise _Killed

        with pytest.raises(_Killed):
            _train(collected, out, CONFIG.replace(sweep=SWEEP), progress=kill)
    again = _train(collected, out, CONFIG.replace(sweep=SWEEP))
    assert again.files.keys() == swept.files.keys()
    for name in swept.files:
        if not name.endswith(".png"):
            assert (again.path / name).read_bytes() == (swept.path / name).read_bytes(), name


def test_the_variant_in_use_is_what_later_stages_see(
    swept: Artifact, collected: Artifact, tmp_path: Path
) -> None:
    used = _train(collected, tmp_path / "train", CONFIG.replace(sweep=SWEEP[:1], used="k6"))
    assert {sae.activation.kind for sae in Saes(used.path / FOLDER).values()} == {"threshold"}
    assert _weights(used, "dictionaries/L0") == _weights(swept, "variants/k6/L0")
    assert _weights(used, "variants/base/L0") == _weights(swept, "dictionaries/L0")


def test_evaluation_reports_the_frontier(
    swept: Artifact, collected: Artifact, tmp_path: Path
) -> None:
    run = Run.of({"collect": collected, "train": swept})
    few = {"n_resamples": 20}
    found = reconstruction.look(
        run, reconstruction.Config(n_tokens=400, n_pca_tokens=400, **few)
    ).tables
    rows = found["metrics"]
    at = {site: set(part["source"]) for site, part in rows.groupby("site")}
    assert at == {"L0": {"train", "variants/k6"}, "L1": {"train", "variants/k6"}} | {
        "L2": {"train", "variants/k6", "variants/wide"}
    }
    config = loss_recovered.Config(n_tokens=64, sites=("L2",), **few)
    losses = loss_recovered.look(run, config).tables["losses"]
    assert losses["kl_spliced"].notna().sum() == len(losses) == 3
    frontier = frontier_of(rows)
    assert len(frontier) == len(rows)
    assert frontier["on_frontier"].any()


def test_the_frontier_holds_what_no_other_dictionary_beats() -> None:
    points = [
        ("A", None, 10, 0.5),
        ("A", None, 20, 0.3),
        ("A", None, 20, 0.4),
        ("A", None, 30, 0.3),
    ]
    others = [("A", "A.mid", 1, 0.9), ("B", None, 5, 0.1)]
    rows = pd.DataFrame([*points, *others], columns=["site", "reads", "l0", "fvu"])
    rows = rows.assign(source="s", architecture="topk", n_latents=4, fvu_low=0.0, fvu_high=1.0)
    found = frontier_of(rows)
    assert list(zip(found["l0"], found["fvu"], found["on_frontier"], strict=True)) == [
        (10, 0.5, True),
        (20, 0.3, True),
        (20, 0.4, False),
        (30, 0.3, False),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": (Variant(name="a"), Variant(name="a"))}, "two variants of one name"),
        ({"sweep": SWEEP, "used": "k7"}, "no such variant"),
        ({"sweep": SWEEP, "used": "wide"}, "trained at all sites"),
        ({"sweep": (Variant(name="a", n_latents=2),)}, "k = 4 of 2 latents"),
        ({"transcoders": Transcoders(sites=("L2",))}, "not an MLP output"),
        ({"transcoders": Transcoders(sites=("mlp_out:1",), reads="resid_pre")}, "L1.pre"),
    ],
)
def test_impossible_sweeps_are_refused(
    collected: Artifact, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _train(collected, tmp_path / "train", CONFIG.replace(**changes))
    assert not (tmp_path / "train").exists()


@pytest.mark.parametrize("name", ["", "../up", "base", "a/b", ".hidden"])
def test_a_variant_cannot_leave_its_folder(name: str) -> None:
    with pytest.raises(ValueError, match=r"cannot be called|at least 1 character"):
        Variant(name=name)


@pytest.fixture(scope="module")
def transcoded(collected: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    choice = Transcoders(
        architecture=TopK(k=4), n_latents=64, steps=150, skip=True, learning_rate=5e-3
    )
    out = tmp_path_factory.mktemp("transcoded") / "train"
    return _train(
        collected,
        out,
        CONFIG.replace(sites=("L1",), steps=5, transcoders=choice, max_rows_in_memory=100),
    )


def _held_out(collected: Artifact) -> tuple[torch.Tensor, torch.Tensor]:
    store = ActivationStore.open(collected.path / "store.zarr")
    rows = store.kept_rows("validation")
    return tuple(
        torch.from_numpy(store.read(parse_site(s), 0, store.n_rows)[rows])
        for s in ("L1.mid", "L1.mlp")
    )


def test_a_transcoder_predicts_the_mlp_from_its_input(
    transcoded: Artifact, collected: Artifact
) -> None:
    sae = load_sae(transcoded.path / "transcoders" / "L1.mlp")
    x, y = _held_out(collected)
    fvu = float((sae(x) - y).square().sum() / (y - y.mean(0)).square().sum())
    assert sae.metadata["reads"] == "blocks.1.hook_resid_mid"
    assert sae.W_skip is not None
    assert fvu == pytest.approx(sae.metadata["held_out_fvu"], rel=1e-3)
    assert fvu < 0.8
    assert [site.short for site in Saes(transcoded.path / FOLDER)] == ["L1"], (
        "later stages do not take it for an SAE"
    )
    curves = [
        json.loads(line) for line in (transcoded.path / "metrics.jsonl").read_text().splitlines()
    ]
    assert {record.get("of") for record in curves} == {None, "transcoders"}


def test_a_transcoder_is_evaluated_on_what_it_reads(
    transcoded: Artifact, collected: Artifact, tmp_path: Path
) -> None:
    run, few = Run.of({"collect": collected, "train": transcoded}), {"n_resamples": 20}
    config = reconstruction.Config(n_tokens=10_000, n_pca_tokens=0, **few)
    rows = reconstruction.look(run, config).tables["metrics"].set_index("source")
    spliced = loss_recovered.Config(n_tokens=200, sites=("L1.mlp",), **few)
    losses = loss_recovered.look(run, spliced).tables["losses"].set_index("source")
    sae, (x, y) = load_sae(transcoded.path / "transcoders" / "L1.mlp"), _held_out(collected)
    fvu = float((sae(x) - y).double().square().sum() / (y - y.mean(0)).double().square().sum())
    row = rows.loc["transcoders"]
    assert (row["site"], row["reads"]) == ("L1.mlp", "L1.mid")
    assert row["fvu"] == pytest.approx(fvu, rel=1e-4)
    lost = losses.loc["transcoders"]
    assert lost["kl_spliced"] < lost["kl_mean"], (
        "the model loses less by the prediction than by the mean"
    )
