"""The papers' experiments on a small random model: joint edits are real edits, every experiment
gives its tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner

from data.model.language_model import LanguageModel
from data.model.spec import Random
from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.artifact import Artifact
from pipeline.cli.paper import paper_commands
from pipeline.flow.activity import GROUPS, MEMBERS
from pipeline.flow.causal import Contexts
from pipeline.flow.link import link_dictionaries
from pipeline.flow.options import LinkOptions
from pipeline.lenses.paper import EXPERIMENTS, FIGURE, REPORT, run_experiment, write_finding
from pipeline.lenses.paper.firings import Change, clean_losses, draw_firings, prepare, run_changes
from pipeline.lenses.paper.remainder import PARTS, remainder
from pipeline.lenses.paper.subject import Effort, Subject, fullest, layers_of, spread
from sae import Sae
from sae.activations import TopKActivation

D, N = 32, 48
SITES = [Site(layer, "resid_post") for layer in range(3)] + [
    Site(layer, kind) for layer in (1, 2) for kind in ("mlp_out", "attn_out")
]
EFFORT = Effort(n_pairs=2, n_targets=28, n_contexts=6, n_exhaustive=12)


def random_sae(seed: int, k: int = 12) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(N, D, generator=generator), dim=1)
    zeros = torch.zeros(D)
    return Sae(
        W_enc=rows,
        b_enc=torch.zeros(N),
        W_dec=rows,
        b_dec=zeros,
        b_in=zeros,
        activation=TopKActivation(k=k),
    )


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.open(
        Random(n_layers=3, d_model=D, n_heads=4, d_mlp=64, seed=1), dtype="float32"
    )


@pytest.fixture(scope="module")
def subject(model: LanguageModel) -> Subject:
    dictionaries = {site: random_sae(seed) for seed, site in enumerate(SITES)}
    rng = np.random.default_rng(0)
    held_out = torch.from_numpy(rng.integers(0, 400, size=(24, 16)))
    seen = {
        site: value.reshape(-1, D) for site, value in model.activations(held_out, SITES).items()
    }
    ids = rng.integers(0, 400, size=(6, 16)).astype(np.int64)
    usable = np.ones_like(ids, dtype=bool)
    usable[:, 0] = False
    contexts = Contexts(ids=ids, document=np.arange(6)[:, None].repeat(16, 1), usable=usable)

    def batches(site: Site):
        return seen[site].split(100)

    links = link_dictionaries(dictionaries, options=LinkOptions(n_null=100), held_out=batches)
    return Subject(
        dictionaries=dictionaries,
        edges=links.edges,
        held_out=batches,
        open_model=lambda: model,
        contexts=lambda _, n: contexts,
    )


def test_layers_hold_the_first_choice_of_every_relation(subject: Subject) -> None:
    layers = layers_of(subject)
    assert [layer.target for layer in layers] == SITES[1:3]
    assert [set(layer.links) for layer in layers] == [{"residual", "mlp", "attention"}] * 2
    link = layers[0].links["mlp"]
    cosines = subject.dictionaries[SITES[1]].W_dec @ subject.dictionaries[link.source].W_dec.T
    known = np.flatnonzero(link.best >= 0)
    best = cosines.numpy()[known, link.best[known]]
    np.testing.assert_allclose(link.score[known], best, atol=1e-6)
    assert fullest(layers) == layers
    assert spread(list(range(10)), 2) == [2, 7]


def test_joint_edits_equal_full_runs_with_the_same_edits(
    model: LanguageModel, subject: Subject
) -> None:
    layer = layers_of(subject)[1]
    stage = prepare(subject, model, layer, subject.contexts(model, 6))
    firings = draw_firings(stage, n_per_group=3, rng=np.random.default_rng(0))
    assert len(set(zip(firings.context, firings.position, strict=True))) == len(firings.latent), (
        "one feature a token"
    )
    assert (firings.position > 0).all()
    assert len(set(firings.group)) > 4
    for relation in layer.links:
        fires = np.array([relation in MEMBERS[GROUPS[group]] for group in firings.group])
        np.testing.assert_array_equal(fires, firings.strength[relation] > 0)
    changes = [
        Change(firing=i, relations=tuple(layer.links), scale=-0.5)
        for i in range(len(firings.latent))
    ]
    outcome = run_changes(stage, firings, changes, with_loss=True, batch_size=5)
    short = run_changes(stage, firings, changes, batch_size=4)
    np.testing.assert_allclose(short.after, outcome.after, atol=1e-4)
    for i in range(len(changes)):
        context, position = int(firings.context[i]), int(firings.position[i])
        ids = torch.from_numpy(stage.contexts.ids[[context]])
        clean = model.activations(ids, SITES)

        def adding(site: Site, latent: int, clean=clean, position=position):
            sae = subject.dictionaries[site]
            amount = (
                -1.5 * float(sae.encode(clean[site])[0, position, latent]) if latent >= 0 else 0.0
            )

            def add(value: torch.Tensor) -> torch.Tensor:
                value = value.clone()
                value[0, position] += amount * sae.W_dec[latent]
                return value

            return add

        edits = {
            link.source: adding(link.source, int(firings.predecessor[name][i]))
            for name, link in layer.links.items()
        }
        with model.edited(edits), model.recorded([layer.target]) as seen:
            log_p = model.logits(ids).float().log_softmax(-1)
        after = subject.dictionaries[layer.target].encode(seen[layer.target])[
            0, position, firings.latent[i]
        ]
        assert outcome.after[i] == pytest.approx(float(after), abs=1e-4)
        loss = -log_p[0, :-1].gather(1, ids[0, 1:, None]).mean()
        assert outcome.loss[i] == pytest.approx(float(loss), abs=1e-4)


def test_scale_one_changes_neither_target_nor_loss(model: LanguageModel, subject: Subject) -> None:
    stage = prepare(subject, model, layers_of(subject)[0], subject.contexts(model, 6))
    firings = draw_firings(stage, n_per_group=2, rng=np.random.default_rng(0))
    changes = [
        Change(firing=i, relations=("residual",), scale=1.0) for i in range(len(firings.latent))
    ]
    outcome = run_changes(stage, firings, changes, with_loss=True)
    np.testing.assert_allclose(outcome.after, firings.before, rtol=1e-4)
    np.testing.assert_allclose(outcome.loss, clean_losses(stage)[firings.context], rtol=1e-5)


@pytest.mark.parametrize("name", list(EXPERIMENTS))
def test_every_experiment_writes_tables_figure_and_text(
    name: str, subject: Subject, tmp_path: Path
) -> None:
    finding = run_experiment(name, subject, EFFORT)
    write_finding(finding, tmp_path)
    assert (tmp_path / FIGURE).stat().st_size > 2000
    assert "What this model shows" in (tmp_path / REPORT).read_text()
    for table in finding.tables:
        assert len(pd.read_parquet(tmp_path / f"{table}.parquet"))


def test_knockouts_remove_every_subset_of_what_fires(subject: Subject) -> None:
    trials = run_experiment("knockouts", subject, EFFORT).tables["trials"]
    assert "nowhere" not in set(trials["group"])
    for key, group in trials.groupby(["target", "context", "position", "target_latent"]):
        members = set(group["group"].iloc[0].split("&"))
        assert len(group) == 2 ** len(members) - 1, key
        assert all(set(removed.split("&")) <= members for removed in group["removed"])


def test_parts_of_a_reading_add_up_and_are_the_models_own(
    model: LanguageModel, subject: Subject
) -> None:
    found = remainder(subject, EFFORT)
    parts = found.tables["parts"]
    assert len(parts) > 10
    total = parts[list(PARTS[:-1])].sum(axis=1)
    np.testing.assert_allclose(total, 1.0, atol=1e-6)
    contexts = subject.contexts(model, 6)
    for row in parts.head(8).itertuples():
        before, after = (Site(int(name[1:]), "resid_post") for name in (row.source, row.target))
        seen = model.activations(torch.from_numpy(contexts.ids[[row.context]]), SITES)
        low, high = seen[before][0, row.position], seen[after][0, row.position]
        reader = subject.dictionaries[after].W_enc[row.target_latent]
        writer = subject.dictionaries[before]
        z = writer.encode(low)
        assert row.layer * row.before == pytest.approx(float(reader @ (high - low)), abs=1e-4)
        assert row.error * row.before == pytest.approx(
            float(reader @ (low - writer(low))), abs=1e-4
        )
        own = z[row.predecessor_latent] * writer.W_dec[row.predecessor_latent]
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


def test_the_best_of_all_is_at_least_as_good_on_every_target(subject: Subject) -> None:
    both = remainder(subject, EFFORT).tables["same_targets"]
    assert len(both)
    assert (both["change_best"] >= both["change_top_1"] - 1e-5).all()


def test_a_dictionary_carried_onto_itself_is_explained_as_well_as_it_reconstructs(
    subject: Subject,
) -> None:
    """Two sites with the same dictionary and the same activations: every sensible operator is the
    identity."""
    first, second = SITES[:2]
    twins = Subject(
        dictionaries={first: subject.dictionaries[first], second: subject.dictionaries[first]},
        edges=link_dictionaries(dict.fromkeys((first, second), subject.dictionaries[first])).edges,
        held_out=lambda site: subject.held_out(first),
        open_model=subject.open_model,
        contexts=subject.contexts,
    )
    table = (
        run_experiment("transitions", twins, EFFORT)
        .tables["operators"]
        .set_index(["operator", "inference"])
    )
    own = table.loc[("target's own reconstruction", "none"), "ev"]
    for operator in ("permutation decoder", "permutation full", "top-1 dec-dec", "top-1 enc-enc"):
        assert table.loc[(operator, "unscaled"), "ev"] == pytest.approx(own, abs=1e-6)
        assert table.loc[(operator, "folded"), "score"] == 1.0
    assert table.loc[("top-5 dec-dec", "unscaled"), "ev"] < own


def test_an_unknown_experiment_lists_the_known_ones(subject: Subject) -> None:
    with pytest.raises(UserError, match="no experiment") as caught:
        run_experiment("figure-99", subject, EFFORT)
    assert "sae-match" in str(caught.value)


def test_the_commands_defaults_are_those_of_the_effort() -> None:
    options = {option.name: option.default for option in paper_commands.commands["groups"].params}
    assert {name: options[name] for name in Effort().model_dump()} == Effort().model_dump()


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of artifacts with the tiny recipe run up to its links."""
    from pipeline.cli import run_command

    folder = tmp_path_factory.mktemp("artifacts")
    assert run_command(["run", "--to", "link", *common_options(folder)]) == 0
    return folder


def common_options(folder: Path) -> list[str]:
    return ["--recipe", "tiny", "--artifacts", str(folder), "--threads", "1", "-q"]


@pytest.mark.slow
def test_starts_are_trained_once_and_compared(linked: Path) -> None:
    from pipeline.cli import app, run_command
    from pipeline.stages import train

    command = [
        "paper",
        "starts",
        "--layers",
        "3",
        "--steps",
        "40",
        "--targets",
        "20",
        *common_options(linked),
    ]
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0, made.output
    folder = linked / "tiny" / "paper"
    summary = pd.read_parquet(folder / "starts" / "summary.parquet").set_index(["start", "matcher"])
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
    by_pair = pd.read_parquet(folder / "starts" / "by_pair.parquet")
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
            for path in (folder / "dictionaries" / start).rglob("sae.json")
        )
        for start in ("independent", "shared", "chain")
    }
    assert set(steps.values()) == {120}
    trained = Artifact.open(folder / "dictionaries" / "chain", kind=train.KIND, schema=train.SCHEMA)
    before = (trained.path / "manifest.json").stat().st_mtime_ns
    assert run_command([*command, "--force"]) == 0
    assert (trained.path / "manifest.json").stat().st_mtime_ns == before
    assert run_command(["paper", "starts", "--layers", "9", *common_options(linked)]) == 2


@pytest.mark.slow
def test_the_command_makes_an_artifact_once(linked: Path) -> None:
    from pipeline.cli import app, run_command

    tmp_path, common = linked, common_options(linked)
    made = CliRunner().invoke(app, ["paper", "groups", *common])
    assert made.exit_code == 0
    assert "From nowhere" in made.output
    out = tmp_path / "tiny" / "paper" / "groups"
    Artifact.open(out, kind="paper-groups", schema=1).verify()
    before = (out / "manifest.json").stat().st_mtime_ns
    assert CliRunner().invoke(app, ["paper", "groups", *common]).exit_code == 0
    assert (out / "manifest.json").stat().st_mtime_ns == before
    assert run_command(["paper", "groups", "--tokens", "0", *common]) == 2
