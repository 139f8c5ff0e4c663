"""Deactivation does to the model what a full, unhurried run with the same edit does, and its
statistics are right."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from data.model.language_model import LanguageModel
from data.model.partial_forward import continued_from
from data.model.spec import Random
from featureflow.sites import Site, parse_site
from pipeline.flow.causal import (
    EXHAUSTIVE,
    Contexts,
    DeactivationOptions,
    evidence_of_edges,
    measure_deactivation,
    summarise_deactivation,
)
from sae import Sae
from sae.activations import TopKActivation


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.open(
        Random(n_layers=3, d_model=32, n_heads=4, d_mlp=64, seed=1), dtype="float32"
    )


def random_sae(seed: int, d: int = 32, n: int = 64, k: int = 6) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)
    zeros = torch.zeros(d)
    return Sae(
        W_enc=rows,
        b_enc=torch.zeros(n),
        W_dec=rows,
        b_dec=zeros,
        b_in=zeros,
        activation=TopKActivation(k=k),
    )


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    ids = np.random.default_rng(0).integers(0, 400, size=(5, 12)).astype(np.int64)
    usable = np.ones_like(ids, dtype=bool)
    usable[:, 0] = False
    return Contexts(ids=ids, document=np.arange(5)[:, None].repeat(12, 1), usable=usable)


def test_a_run_continued_from_the_middle_gives_what_the_whole_run_gave(
    model: LanguageModel,
) -> None:
    ids = torch.randint(0, 400, (2, 9))
    sites = (Site(0, "resid_post"), Site(1, "mlp_out"), Site(2, "resid_post"))
    whole = model.activations(ids, sites)
    with continued_from(model, 0, whole[sites[0]]):
        partly = model.activations(ids, sites[1:])
    for site in sites[1:]:
        torch.testing.assert_close(partly[site], whole[site], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.activations(ids, sites)[sites[2]], whole[sites[2]])


@pytest.mark.parametrize("source", ["L0", "L1.mlp", "L1.attn", "L0.mlp"])
def test_every_edit_equals_a_full_run_with_the_same_edit(
    model: LanguageModel, contexts: Contexts, source: str
) -> None:
    at, target = parse_site(source), Site(1, "resid_post")
    saes = {at: random_sae(3), target: random_sae(4)}
    first_choice = np.random.default_rng(5).integers(0, 64, size=(64, 8))
    options = DeactivationOptions(
        n_targets=12, n_targets_per_context=4, n_exhaustive=3, batch_size=5, scale=-1.0
    )
    table = measure_deactivation(
        model,
        saes,
        source=at,
        target=target,
        predecessors={"top": first_choice},
        contexts=contexts,
        options=options,
    )
    assert {"top", "random active", "strongest active", EXHAUSTIVE, "best single active"} == set(
        table["strategy"]
    )
    run = table[(table["n_removed"] == 1) & (table["strategy"] != "top")]
    assert len(run) > 30
    for row in run.itertuples():
        ids = torch.from_numpy(contexts.ids[[row.context]])
        before = saes[at].encode(model.activations(ids, (at,))[at])[
            0, row.position, row.predecessor
        ]

        def edit(value: torch.Tensor, row=row, before=before) -> torch.Tensor:
            value = value.clone()
            value[0, row.position] += (-1.0 - 1.0) * before * saes[at].W_dec[row.predecessor]
            return value

        with model.edited({at: edit}):
            seen = model.activations(ids, (target,))[target]
        after = float(saes[target].encode(seen)[0, row.position, row.target_latent])
        assert row.after == pytest.approx(after, abs=1e-4)
        assert row.change == pytest.approx(1 - after / row.before, abs=1e-3)


def test_targets_fire_are_usable_and_spread(model: LanguageModel, contexts: Contexts) -> None:
    site, target = Site(0, "resid_post"), Site(1, "resid_post")
    saes = {site: random_sae(3), target: random_sae(4)}
    options = DeactivationOptions(n_targets=100, n_targets_per_context=3)
    table = measure_deactivation(
        model,
        saes,
        source=site,
        target=target,
        predecessors={"none": np.full((64, 1), -1)},
        contexts=contexts,
        options=options,
    )
    none = table[table["strategy"] == "none"]
    assert len(none) == 15
    assert none.groupby("context").size().max() == 3
    assert (none["position"] > 0).all()
    assert (none["before"] > 0).all()
    assert (none["n_removed"] == 0).all()
    assert (none["after"] == none["before"].astype(float)).all()
    assert not none.duplicated(["context", "position"]).any()


def test_scale_one_changes_nothing(model: LanguageModel, contexts: Contexts) -> None:
    site, target = Site(0, "resid_post"), Site(2, "resid_post")
    saes = {site: random_sae(3), target: random_sae(4)}
    options = DeactivationOptions(n_targets=10, scale=1.0)
    table = measure_deactivation(
        model, saes, source=site, target=target, predecessors={}, contexts=contexts, options=options
    )
    np.testing.assert_allclose(table["after"], table["before"], rtol=1e-4)


def test_the_planted_predecessor_is_the_one_that_matters(
    model: LanguageModel, contexts: Contexts
) -> None:
    """An MLP's output is added to the stream as it is, so one dictionary at both places plants the
    truth."""
    at, target = Site(1, "mlp_out"), Site(1, "resid_post")
    rows = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(2))).Q
    zeros = torch.zeros(32)
    sae = Sae(
        W_enc=rows,
        b_enc=zeros,
        W_dec=rows,
        b_dec=zeros,
        b_in=zeros,
        activation=TopKActivation(k=32),
    )
    same = np.arange(32)[:, None]
    table = measure_deactivation(
        model,
        {at: sae, target: sae},
        source=at,
        target=target,
        predecessors={"same": same, "other": (same + 1) % 32},
        contexts=contexts,
        options=DeactivationOptions(n_targets=40),
    )
    summary = summarise_deactivation(table).set_index("strategy")
    assert summary.loc["same", "change"] > 0.2
    assert summary.loc["other", "change"] == pytest.approx(0.0, abs=1e-3)


def test_without_the_model_the_edited_vector_goes_straight_to_the_reader(
    model: LanguageModel, contexts: Contexts
) -> None:
    at, target = Site(0, "resid_post"), Site(2, "resid_post")
    saes = {at: random_sae(3), target: random_sae(4)}
    first = np.random.default_rng(5).integers(0, 64, size=(64, 8))
    table = measure_deactivation(
        model,
        saes,
        source=at,
        target=target,
        predecessors={"top": first},
        contexts=contexts,
        options=DeactivationOptions(n_targets=12, n_targets_per_context=4),
    )
    run = table[(table["n_removed"] == 1) & (table["strategy"] != "top")]
    assert (run["change"] - run["change_no_model"]).abs().max() > 1e-3, "the blocks do something"
    for row in run.itertuples():
        seen = model.activations(torch.from_numpy(contexts.ids[[row.context]]), (at, target))
        x, y = (seen[site][0, row.position] for site in (at, target))
        removed = saes[at].encode(x)[row.predecessor] * saes[at].W_dec[row.predecessor]
        after = float(saes[target].encode(y - removed)[row.target_latent])
        assert row.change_no_model == pytest.approx(1 - after / row.before, abs=1e-3)


def test_controls_never_draw_a_predecessor(model: LanguageModel, contexts: Contexts) -> None:
    at, target = Site(0, "resid_post"), Site(1, "resid_post")
    candidates = np.tile(np.arange(32), (64, 1))
    table = measure_deactivation(
        model,
        {at: random_sae(3), target: random_sae(4)},
        source=at,
        target=target,
        predecessors={"half": candidates},
        contexts=contexts,
        options=DeactivationOptions(n_targets=40),
    )
    controls = table[table["strategy"] != "half"]
    assert len(controls) > 20
    assert (controls["predecessor"] >= 32).all()


def test_summary_by_hand_with_documents_as_the_unit() -> None:
    table = pd.DataFrame(
        {
            "strategy": ["a"] * 6,
            "document": [0, 0, 0, 1, 1, 2],
            "n_removed": [1, 1, 1, 1, 0, 1],
            "success": [True, True, True, False, False, False],
            "change": [1.0, 1.0, 1.0, 0.0, 0.0, 0.0],
            "success_no_model": [True, True, False, False, False, False],
            "change_no_model": [1.0, 1.0, 0.5, 0.0, 0.0, 0.0],
        }
    )
    row = summarise_deactivation(table, n_bootstrap=4000).iloc[0]
    assert row["success_all"] == pytest.approx(0.5)
    assert row["success_by_model"] == pytest.approx(0.2)
    assert row["change_by_model"] == pytest.approx(0.1)
    assert (row["n_targets"], row["n"]) == (6, 5)
    assert row["success"] == pytest.approx(0.6)
    assert (row["success_low"], row["success_high"]) == (0.0, 1.0), (
        "three documents can all be drawn equal"
    )


def test_evidence_is_gathered_per_edge() -> None:
    table = pd.DataFrame(
        {
            "source": "s",
            "target": "t",
            "strategy": ["top", "top", "top", "random active"],
            "n_removed": [1, 1, 2, 1],
            "predecessor": [4, 4, 4, 4],
            "target_latent": [7, 7, 7, 7],
            "success": [True, False, True, True],
            "change": [1.0, 0.5, 1.0, 1.0],
        }
    )
    row = evidence_of_edges(table, "top").iloc[0]
    assert (row["source_latent"], row["target_latent"], row["causal_n"]) == (4, 7, 2)
    assert (row["causal_success"], row["causal_change"]) == (0.5, 0.75)
