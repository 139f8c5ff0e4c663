"""The papers' experiments on the tiny run: joint edits are real edits, parts add up, sensible
operators are the identity where they should be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from featureflow.sites import Site, parse_site
from pipeline.artifact import Artifact
from pipeline.cli import app, run_command
from pipeline.context import RunContext
from pipeline.flow.activity import GROUPS, MEMBERS
from pipeline.lenses import knockouts, remainder, transitions
from pipeline.lenses.parts.joint_edits import (
    Change,
    Stage,
    clean_losses,
    draw_cases,
    prepare,
    run_changes,
)
from pipeline.lenses.parts.layers import contexts_of, fullest, layers_of, spread
from pipeline.run import Run
from pipeline.saes import FOLDER
from pipeline.stages import link, train
from sae import Sae, save_sae

TRIALS = {"n_pairs": 2, "n_targets": 28, "n_contexts": 6}


@pytest.fixture(scope="module")
def stages(run: Run) -> list[Stage]:
    contexts = contexts_of(run, 6)
    return [prepare(run, layer, contexts) for layer in fullest(layers_of(run))]


def test_layers_hold_the_first_choice_of_every_relation(run: Run) -> None:
    layers = layers_of(run)
    assert [layer.target.short for layer in layers] == ["L1", "L2", "L3"]
    relations = [set(layer.links) for layer in layers]
    assert relations == [{"residual", "mlp", "attention"}] * 2 + [{"residual"}]
    link = layers[0].links["mlp"]
    cosines = run.saes[layers[0].target].W_dec @ run.saes[link.source].W_dec.T
    known = np.flatnonzero(link.best >= 0)
    best = cosines.numpy()[known, link.best[known]]
    np.testing.assert_allclose(link.score[known], best, atol=1e-6)
    assert fullest(layers) == layers[:2]
    assert spread(list(range(10)), 2) == [2, 7]


def test_joint_edits_equal_full_runs_with_the_same_edits(run: Run, stages: list[Stage]) -> None:
    stage, model = stages[1], run.model
    layer, sites = stage.layer, tuple(run.saes)
    cases = draw_cases(stage, n_per_group=3, rng=np.random.default_rng(0))
    assert len(set(zip(cases.context, cases.position, strict=True))) == len(cases.latent), (
        "one feature a token"
    )
    assert (cases.position > 0).all()
    assert len(set(cases.group)) > 4
    for relation in layer.links:
        fires = np.array([relation in MEMBERS[GROUPS[group]] for group in cases.group])
        np.testing.assert_array_equal(fires, cases.strength[relation] > 0)
    changes = [
        Change(case=i, relations=tuple(layer.links), scale=-0.5) for i in range(len(cases.latent))
    ]
    after_all, losses = run_changes(stage, cases, changes, with_loss=True, batch_size=5)
    short, _ = run_changes(stage, cases, changes, batch_size=4)
    np.testing.assert_allclose(short, after_all, atol=1e-4)
    for i in range(len(changes)):
        context, position = int(cases.context[i]), int(cases.position[i])
        ids = torch.from_numpy(stage.contexts.ids[[context]])
        clean = model.activations(ids, sites)

        def adding(site: Site, latent: int, clean=clean, position=position):
            sae = run.saes[site]
            amount = (
                -1.5 * float(sae.encode(clean[site])[0, position, latent]) if latent >= 0 else 0.0
            )

            def add(value: torch.Tensor) -> torch.Tensor:
                value = value.clone()
                value[0, position] += amount * sae.W_dec[latent]
                return value

            return add

        edits = {
            link.source: adding(link.source, int(cases.predecessor[name][i]))
            for name, link in layer.links.items()
        }
        with model.edited(edits), model.recorded([layer.target]) as seen:
            log_p = model.logits(ids).float().log_softmax(-1)
        after = run.saes[layer.target].encode(seen[layer.target])[0, position, cases.latent[i]]
        assert after_all[i] == pytest.approx(float(after), abs=1e-4)
        loss = -log_p[0, :-1].gather(1, ids[0, 1:, None]).mean()
        assert losses[i] == pytest.approx(float(loss), abs=1e-4)


def test_scale_one_changes_neither_target_nor_loss(stages: list[Stage]) -> None:
    stage = stages[0]
    cases = draw_cases(stage, n_per_group=2, rng=np.random.default_rng(0))
    changes = [Change(case=i, relations=("residual",), scale=1.0) for i in range(len(cases.latent))]
    after, loss = run_changes(stage, cases, changes, with_loss=True)
    np.testing.assert_allclose(after, cases.before, rtol=1e-4)
    np.testing.assert_allclose(loss, clean_losses(stage)[cases.context], rtol=1e-5)


def test_knockouts_remove_every_subset_of_what_is_active(run: Run) -> None:
    trials = knockouts.look(run, knockouts.Config(**TRIALS)).tables["trials"]
    assert "nowhere" not in set(trials["group"])
    for key, group in trials.groupby(["target_site", "context", "position", "target_latent"]):
        members = set(group["group"].iloc[0].split("&"))
        assert len(group) == 2 ** len(members) - 1, key
        assert all(set(removed.split("&")) <= members for removed in group["removed"])


def test_parts_of_a_reading_add_up_and_are_the_models_own(run: Run) -> None:
    found = remainder.look(run, remainder.Config(n_exhaustive=6, **TRIALS))
    model, sites = run.model, tuple(run.saes)
    parts = found.tables["parts"]
    assert len(parts) > 10
    total = parts[list(remainder.PARTS[:-1])].sum(axis=1)
    np.testing.assert_allclose(total, 1.0, atol=1e-6)
    contexts = contexts_of(run, 6)
    for row in parts.head(8).itertuples():
        before, after = (parse_site(name) for name in (row.source_site, row.target_site))
        seen = model.activations(torch.from_numpy(contexts.ids[[row.context]]), sites)
        low, high = seen[before][0, row.position], seen[after][0, row.position]
        reader = run.saes[after].W_enc[row.target_latent]
        writer = run.saes[before]
        z = writer.encode(low)
        assert row.layer * row.before == pytest.approx(float(reader @ (high - low)), abs=1e-4)
        assert row.error * row.before == pytest.approx(
            float(reader @ (low - writer(low))), abs=1e-4
        )
        own = z[row.source_latent] * writer.W_dec[row.source_latent]
        assert row.predecessor * row.before == pytest.approx(float(reader @ own), abs=1e-4)
        edited = low - own
        if not row.success:

            def put(value: torch.Tensor, row=row, edited=edited) -> torch.Tensor:
                value = value.clone()
                value[0, row.position] = edited
                return value

            with model.edited({before: put}):
                changed = model.activations(
                    torch.from_numpy(contexts.ids[[row.context]]), (after,)
                )[after]
            added = changed[0, row.position] - edited
            assert row.layer_after * row.before == pytest.approx(float(reader @ added), abs=1e-3)


def test_the_best_of_all_is_at_least_as_good_on_every_target(run: Run) -> None:
    config = remainder.Config(n_exhaustive=6, **TRIALS)
    both = remainder.look(run, config).tables["same_targets"]
    assert len(both)
    assert (both["change_best"] >= both["change_top_1"] - 1e-5).all()


def test_an_sae_carried_onto_itself_is_explained_as_well_as_it_reconstructs(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sites with the same SAE and the same activations: every sensible operator is the
    identity."""
    first, second = parse_site("L0"), parse_site("L1")
    collect = run.artifact("collect")
    digests = {"collect": collect.digest}
    with Artifact.create(
        tmp_path / "train", kind="train", schema=1, config={}, inputs=digests
    ) as draft:
        for site in (first, second):
            save_sae(plain(run.saes[first]), draft.path / FOLDER / site.short)
    same = Artifact.open(tmp_path / "train", kind="train", schema=1)
    inputs = link.Inputs(collect=collect, train=same)
    linked = link.run(link.Config(n_null=100), inputs, tmp_path / "link", RunContext())
    twice = Run.of({"collect": collect, "train": same, "link": linked})
    real = transitions.rows_after_contexts(run, 400, 4)
    monkeypatch.setattr(transitions, "rows_after_contexts", lambda *_: lambda site: real(first))
    found = transitions.look(twice, transitions.Config())
    table = found.tables["operators"].set_index(["operator", "inference"])
    own = table.loc[("target's own reconstruction", "none"), "ev"]
    for operator in ("permutation decoder", "permutation full", "top-1 dec-dec", "top-1 enc-enc"):
        assert table.loc[(operator, "unscaled"), "ev"] == pytest.approx(own, abs=1e-6)
        assert table.loc[(operator, "folded"), "score"] == 1.0
    assert table.loc[("top-5 dec-dec", "unscaled"), "ev"] < own


def plain(sae: Sae) -> Sae:
    """The same SAE without a past."""
    return Sae(
        W_enc=sae.W_enc,
        b_enc=sae.b_enc,
        W_dec=sae.W_dec,
        b_dec=sae.b_dec,
        b_in=sae.b_in,
        activation=sae.activation,
    )


def common_options(artifacts: Path) -> list[str]:
    return ["--recipe", "tiny", "--artifacts", str(artifacts), "--threads", "1", "-q"]


@pytest.mark.slow
def test_starts_are_trained_once_and_compared(artifacts: Path) -> None:
    command = [
        "paper",
        "starts",
        "--layers",
        "3",
        "--steps",
        "40",
        "--targets",
        "20",
        *common_options(artifacts),
    ]
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0, made.output
    folder = artifacts / "tiny"
    tables = folder / "lenses" / "starts" / "tables"
    summary = pd.read_parquet(tables / "summary.parquet").set_index(["start", "matcher"])
    assert set(summary.index) == {
        (start, way)
        for start in ("independent", "shared", "chain")
        for way in (
            "cosine",
            "permutation",
            "pearson",
            "transport",
            "random active",
            "strongest active",
        )
    }
    by_pair = pd.read_parquet(tables / "by_pair.parquet")
    assert dict(by_pair.groupby("start")["relation"].first()) == {
        "independent": "independent",
        "shared": "same_start",
        "chain": "same_start",
    }
    assert by_pair.groupby("start").size().tolist() == [8, 8, 8]
    assert by_pair["above_null"].between(0, 1).all()
    steps = {
        start: sum(
            json.loads(path.read_text())["metadata"]["steps"]
            for path in (folder / "starts" / start).rglob("sae.json")
        )
        for start in ("independent", "shared", "chain")
    }
    assert set(steps.values()) == {120}
    trained = Artifact.open(folder / "starts" / "chain", kind=train.KIND, schema=train.SCHEMA)
    before = (trained.path / "manifest.json").stat().st_mtime_ns
    assert run_command([*command, "--force"]) == 0
    assert (trained.path / "manifest.json").stat().st_mtime_ns == before
    assert run_command(["paper", "starts", "--layers", "9", *common_options(artifacts)]) == 2


@pytest.mark.slow
def test_the_command_makes_an_artifact_once(artifacts: Path) -> None:
    common = common_options(artifacts)
    made = CliRunner().invoke(app, ["paper", "groups", *common])
    assert made.exit_code == 0
    assert "From nowhere" in made.output
    out = artifacts / "tiny" / "lenses" / "groups"
    Artifact.open(out, kind="lens", schema=1).verify()
    before = (out / "manifest.json").stat().st_mtime_ns
    assert CliRunner().invoke(app, ["paper", "groups", *common]).exit_code == 0
    assert (out / "manifest.json").stat().st_mtime_ns == before
    assert run_command(["paper", "groups", "--tokens", "0", *common]) == 2
