"""The train stage: each site gets its dictionary from the start the recipe asks for; a killed run
loses nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data.model.spec import Random
from data.store import ActivationStore, RowFilters
from data.text.corpus import BundledText
from featureflow.errors import UserError
from featureflow.sites import IN_LAYER, Site, parse_site
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.saes import FOLDER, Saes
from pipeline.stages import collect, train
from pipeline.training.plan import Chain, Independent, Override, Shared, plan_jobs, rate_at
from pipeline.training.reading import held_out_rows
from sae.architectures import BatchTopK, TopK
from sae.schedule import learning_rate_law

OLD_KINDS = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
COLLECT = collect.Config(
    model=Random(n_layers=3, d_model=16, n_heads=2, d_mlp=32),
    corpus=BundledText(),
    sites=("resid_post", "mlp_out:1"),
    n_context=32,
    n_tokens=4000,
    shard_rows=1024,
    chunk_rows=128,
    validation_fraction=0.2,
)
CONFIG = train.Config(
    architecture=TopK(k=4),
    n_latents=64,
    steps=60,
    batch_size=64,
    initialisation=Chain(next_steps=25, module_steps=30),
    record_every=10,
    checkpoint_every=8,
    precision="float32",
)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return collect.run(
        COLLECT, collect.Inputs(), tmp_path_factory.mktemp("store") / "collect", RunContext()
    )


@pytest.fixture(scope="module")
def trained(collected: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("trained") / "train"
    return train.run(CONFIG, train.Inputs(collect=collected), out, RunContext(n_threads=1))


def test_every_site_has_a_dictionary_that_says_where_it_comes_from(trained: Artifact) -> None:
    dictionaries = Saes(trained.path / FOLDER)
    assert [site.short for site in dictionaries] == ["L0", "L1.mlp", "L1", "L2"]
    starts = {site.short: sae.metadata["initialisation"] for site, sae in dictionaries.items()}
    parents = {name: start["parent"] for name, start in starts.items()}
    assert parents == {"L1": None, "L0": "L1", "L2": "L1", "L1.mlp": None}
    groups = {name: start["group"] for name, start in starts.items()}
    assert groups["L0"] == groups["L1"] == groups["L2"] != groups["L1.mlp"], (
        "a module has a start of its own"
    )
    steps = {site.short: sae.metadata["steps"] for site, sae in dictionaries.items()}
    assert steps == {
        site.short: sae.metadata["schedule"]["steps"] for site, sae in dictionaries.items()
    }
    assert steps == {"L1": 60, "L0": 25, "L2": 25, "L1.mlp": 30}
    assert trained.summary["n_dictionaries"] == 4
    assert 0 < trained.summary["fvu_median"] < 1


def test_the_curves_of_all_sites_are_recorded_and_fall(trained: Artifact) -> None:
    records = [
        json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()
    ]
    curve = [record["fvu"] for record in records if record["site"] == "L1"]
    assert [record["step"] for record in records if record["site"] == "L1"] == [
        10,
        20,
        30,
        40,
        50,
        60,
    ]
    assert curve[-1] < curve[0]


def test_dictionaries_are_over_raw_activations(trained: Artifact, collected: Artifact) -> None:
    from data.store import ActivationStore

    store = ActivationStore.open(collected.path / "store.zarr")
    rows = store.kept_rows("validation")
    for site, sae in Saes(trained.path / FOLDER).items():
        x = torch.from_numpy(store.read(site, 0, store.n_rows)[rows])
        fvu = float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())
        assert fvu == pytest.approx(sae.metadata["held_out_fvu"], rel=1e-3)
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


class _Killed(Exception):
    """The test's stand-in for a kill: raised between two steps, from the progress callback."""


@pytest.mark.parametrize("last_steps", [(3, 11, 40), (9, 59), (1,)])
def test_a_run_killed_at_any_step_ends_with_the_same_bytes(
    trained: Artifact, collected: Artifact, tmp_path: Path, last_steps: tuple[int, ...]
) -> None:
    inputs, out = train.Inputs(collect=collected), tmp_path / "train"
    for allowed in last_steps:
        seen = 0

        def kill(label: str, done: int, total: int, allowed: int = allowed) -> None:
            nonlocal seen
            seen += 1
            if seen > allowed:
                raise _Killed

        with pytest.raises(_Killed):
            train.run(CONFIG, inputs, out, RunContext(progress=kill, n_threads=1))
        assert not out.exists()
    again = train.run(CONFIG, inputs, out, RunContext(n_threads=1))
    for name in trained.files:
        if not name.endswith(".png"):
            assert (again.path / name).read_bytes() == (trained.path / name).read_bytes(), name


def test_two_threads_end_with_the_same_dictionaries(
    trained: Artifact, collected: Artifact, tmp_path: Path
) -> None:
    inputs = train.Inputs(collect=collected)
    again = train.run(CONFIG, inputs, tmp_path / "train", RunContext(n_threads=2))
    for site, sae in Saes(again.path / FOLDER).items():
        torch.testing.assert_close(
            sae.W_dec, Saes(trained.path / FOLDER)[site].W_dec, rtol=1e-3, atol=1e-4
        )


@pytest.mark.slow
def test_a_cluster_ends_with_the_same_dictionaries(
    trained: Artifact, collected: Artifact, tmp_path: Path
) -> None:
    context = RunContext(scheduler="local", n_workers=2, n_threads=2)
    again = train.run(CONFIG, train.Inputs(collect=collected), tmp_path / "train", context)
    for name in trained.files:
        if name.endswith(("sae.safetensors", ".jsonl")):
            assert (again.path / name).read_bytes() == (trained.path / name).read_bytes(), name


@pytest.mark.parametrize("initialisation", [Independent(), Shared()])
def test_starts_are_shared_or_not(
    collected: Artifact, tmp_path: Path, initialisation: Independent | Shared
) -> None:
    config = CONFIG.replace(
        initialisation=initialisation, steps=2, warmup_steps=0, learning_rate=1e-9
    )
    done = train.run(
        config, train.Inputs(collect=collected), tmp_path / "train", RunContext(n_threads=2)
    )
    saes = list(Saes(done.path / FOLDER).values())
    same = [torch.allclose(saes[0].W_dec, sae.W_dec, atol=1e-4) for sae in saes[1:]]
    groups = {sae.metadata["initialisation"]["group"] for sae in saes}
    assert all(same) == isinstance(initialisation, Shared)
    assert any(same) != isinstance(initialisation, Independent)
    assert len(groups) == (1 if isinstance(initialisation, Shared) else len(saes))


def test_overrides_and_calibration(collected: Artifact, tmp_path: Path) -> None:
    config = CONFIG.replace(
        sites=("resid_post",),
        initialisation=Independent(),
        overrides=(Override(sites=("L2",), architecture=BatchTopK(k=6), n_latents=96, steps=40),),
        max_rows_in_memory=100,
    )
    done = train.run(
        config, train.Inputs(collect=collected), tmp_path / "train", RunContext(n_threads=1)
    )
    saes = Saes(done.path / FOLDER)
    changed = saes[parse_site("L2")]
    assert (changed.n_latents, changed.activation.kind) == (96, "threshold")
    assert changed.metadata["held_out_l0"] == pytest.approx(6, rel=0.01)
    assert saes[parse_site("L0")].n_latents == 64


def test_impossible_choices_are_refused_together_and_nothing_is_written(
    collected: Artifact, tmp_path: Path
) -> None:
    inputs = train.Inputs(collect=collected)
    wide = CONFIG.replace(
        overrides=(Override(sites=("L2",), n_latents=32), Override(sites=("L0",), n_latents=2))
    )
    with pytest.raises(UserError) as caught:
        train.run(wide, inputs, tmp_path / "train", RunContext())
    assert all(
        text in str(caught.value)
        for text in ("L2", "a chain keeps one width", "k = 4 of 2 latents")
    )
    with pytest.raises(UserError, match="memory"):
        train.run(CONFIG.replace(n_latents=2_000_000_000), inputs, tmp_path / "train", RunContext())
    with pytest.raises(UserError, match="too few"):
        train.run(CONFIG.replace(batch_size=100_000), inputs, tmp_path / "other", RunContext())
    with pytest.raises(UserError):
        train.run(CONFIG.replace(sites=("L7",)), inputs, tmp_path / "train", RunContext())
    assert not (tmp_path / "train").exists()


def test_the_rows_that_set_thresholds_pass_the_filters_of_training(collected: Artifact) -> None:
    store = ActivationStore.open(collected.path / "store.zarr")
    site = store.sites[-1]
    config = train.Config(filters=RowFilters(max_norm_ratio=1.0))
    rows = held_out_rows([site], store, train.options_of(config, "cpu"))
    norms = np.linalg.norm(store.read(site, 0, store.n_rows).astype(np.float64), axis=1)
    assert len(rows)
    assert rows.min() >= store.validation_start
    assert (norms[rows] <= np.median(norms[store.tokens().flags == 0]) * 1.01).all()


@pytest.mark.parametrize(
    "initialisation", [Independent(), Shared(), Chain(), Chain(modules="random")]
)
def test_every_kind_of_site_can_be_trained(initialisation) -> None:
    """Seeds of the kinds that were there first stay as they were; all seeds differ where starts are
    independent. Only what adds to the stream starts from it."""
    sites = [Site(layer, kind) for layer in range(2) for kind in IN_LAYER]
    jobs = plan_jobs(
        sites,
        architecture=TopK(k=4),
        n_latents=64,
        steps=100,
        learning_rate=None,
        initialisation=initialisation,
        overrides=[],
        seed=3,
    )
    by_site = {job.site: job for job in jobs}
    assert set(by_site) == set(sites)
    if isinstance(initialisation, Independent):
        assert len({job.seed for job in jobs}) == len(jobs)
        assert [by_site[Site(1, kind)].seed for kind in OLD_KINDS] == [9, 10, 11, 12, 13]
    for job in jobs:
        if job.site.kind in ("z", "mlp_in", "mlp_normalized"):
            assert job.parent is None
            assert job.group != by_site[Site(0, "resid_post")].group or job.site.kind != "z"


def test_the_rate_follows_width_and_steps_and_a_follower_keeps_that_of_a_whole_run() -> None:
    assert learning_rate_law(2048, 3000) == pytest.approx(2.4e-3)
    assert learning_rate_law(8192, 3000) == pytest.approx(1.2e-3)
    assert learning_rate_law(2048, 24_000) == pytest.approx(1.2e-3)
    assert learning_rate_law(2048, 600) == pytest.approx(2.4e-3 * 5 ** (1 / 3))
    assert learning_rate_law(256, 100) == 4.8e-3, (
        "a short run gets at most twice as much, a narrow dictionary no more"
    )
    sites = [parse_site(f"L{layer}") for layer in range(3)]
    jobs = plan_jobs(
        sites,
        architecture=TopK(k=4),
        n_latents=2048,
        steps=24_000,
        learning_rate=None,
        initialisation=Chain(next_steps=200),
        overrides=[],
        seed=0,
    )
    assert [job.steps for job in jobs] == [24_000, 200, 200]
    assert {job.learning_rate for job in jobs} == {learning_rate_law(2048, 24_000)}
    assert rate_at(parse_site("L2.mlp"), 2048, 600) == learning_rate_law(2048, 600)
    assert rate_at(parse_site("L2.attn"), 2048, 600) == learning_rate_law(2048, 3000), (
        "more costs it its latents"
    )
    assert rate_at(parse_site("L2.attn"), 2048, 24_000) == learning_rate_law(2048, 24_000)
