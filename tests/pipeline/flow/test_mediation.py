"""Path patching along a chain: planted shares come out, and every run equals a full run with the
same edits."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from data.model.language_model import LanguageModel
from data.model.spec import Random
from featureflow.sites import Site
from pipeline.flow.causal import Contexts, record_clean
from pipeline.flow.mediation import (
    COLUMNS,
    REMOVALS,
    RUNS,
    Chains,
    measure_mediation,
    summarise_mediation,
)
from sae import Sae
from sae.activations import Relu, TopKActivation

D = 32
SITES = tuple(Site(layer, "resid_post") for layer in range(3))


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel.open(
        Random(n_layers=3, d_model=D, n_heads=4, d_mlp=64, seed=1), dtype="float32"
    )


@pytest.fixture(scope="module")
def contexts() -> Contexts:
    ids = np.random.default_rng(0).integers(0, 400, size=(6, 12)).astype(np.int64)
    usable = np.ones_like(ids, dtype=bool)
    usable[:, 0] = False
    return Contexts(ids=ids, document=np.arange(6)[:, None].repeat(12, 1), usable=usable)


def dictionary(rows: torch.Tensor, k: int | None = None) -> Sae:
    zeros = torch.zeros(D)
    activation = Relu() if k is None else TopKActivation(k=k)
    return Sae(
        W_enc=rows,
        b_enc=torch.zeros(len(rows)),
        W_dec=rows,
        b_dec=zeros,
        b_in=zeros,
        activation=activation,
    )


def without_blocks(model: LanguageModel) -> LanguageModel:
    """A model whose blocks write nothing: what is changed in the stream stays changed, and nothing
    else happens."""
    with torch.no_grad():
        for name, weight in model.hf.named_parameters():
            if any(part in name for part in ("o_proj", "down_proj", "c_proj")):
                weight.zero_()
    return model


@pytest.mark.parametrize("cosine", [1.0, 0.8, 0.5])
def test_the_planted_share_flows_through_the_chain(
    model: LanguageModel, contexts: Contexts, cosine: float
) -> None:
    """Blocks write nothing, so removing z v takes z from the target. The chain's latent is c v + s
    w: it loses c z, and putting that back returns c² z. So c² of the effect needs the chain."""
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2))).Q
    ends, aside = basis[:8], basis[8:16]
    middle = torch.cat([cosine * ends + (1 - cosine**2) ** 0.5 * aside, basis[16:24]])
    saes = dict(zip(SITES, (dictionary(ends), dictionary(middle), dictionary(ends)), strict=True))
    latents = np.arange(8)
    chains = Chains(sites=SITES, latent=np.stack([latents, latents, latents]))
    table = measured(without_blocks(model), saes, chains, contexts)
    summary = summarise_mediation(table).iloc[0]
    assert summary["n"] == len(table) > 10
    assert summary["change"] == pytest.approx(1.0, abs=1e-4)
    linear = middle_before(saes, table, model, contexts) >= cosine * table["before"] - 1e-4
    assert linear.sum() > 5
    heard = summarise_mediation(table[linear])
    assert heard["through_chain"].iloc[0] == pytest.approx(cosine**2, abs=1e-3)
    assert heard["chain_alone"].iloc[0] == pytest.approx(cosine**2, abs=1e-3)
    assert heard["through_random"].iloc[0] == pytest.approx(0.0, abs=0.05)


def test_blocks_that_write_nothing_do_nothing(model: LanguageModel, contexts: Contexts) -> None:
    """Then the arm without the model is the model, and with the skip put back nothing changes."""
    generator = torch.Generator().manual_seed(3)
    rows = [
        torch.nn.functional.normalize(torch.randn(48, D, generator=generator), dim=1) for _ in SITES
    ]
    saes = {site: dictionary(row, k=12) for site, row in zip(SITES, rows, strict=True)}
    same = np.arange(48)
    chains = Chains(sites=SITES, latent=np.stack([same[::-1], np.roll(same, 5), same]))
    table = measured(without_blocks(model), saes, chains, contexts)
    assert len(table) > 20
    assert table["change_removed"].abs().max() > 0.05
    for name in RUNS:
        np.testing.assert_allclose(
            table[f"change_{name}"], table[f"change_{name}_no_model"], atol=1e-3, err_msg=name
        )
    for name in REMOVALS:
        np.testing.assert_allclose(table[f"change_{name}_blocks"], 0.0, atol=1e-3)
    summary = summarise_mediation(table).iloc[0]
    assert summary["change_by_model"] == pytest.approx(0.0, abs=1e-4)
    assert summary["blocks"] == pytest.approx(0.0, abs=1e-4)
    assert summary["through_chain_by_model"] == pytest.approx(0.0, abs=1e-3)


def middle_before(
    saes, table: pd.DataFrame, model: LanguageModel, contexts: Contexts
) -> np.ndarray:
    """The chain's latent at the middle site before any edit: above c z, removal leaves it firing
    and all is linear."""
    codes = saes[SITES[1]].encode(record_clean(model, contexts, SITES)[SITES[1]]).numpy()
    return codes[table["context"], table["position"], table["target_latent"]]


def measured(
    model: LanguageModel, saes, chains: Chains, contexts: Contexts, **options
) -> pd.DataFrame:
    recorded = record_clean(model, contexts, chains.sites)
    return measure_mediation(
        model,
        saes,
        chains,
        contexts=contexts,
        recorded=recorded,
        **{"n_targets": 40, "n_targets_per_context": 8, "batch_size": 7} | options,
    )


def test_every_run_equals_a_full_run_with_the_same_edits(
    model: LanguageModel, contexts: Contexts
) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = [
        torch.nn.functional.normalize(torch.randn(48, D, generator=generator), dim=1) for _ in SITES
    ]
    saes = {site: dictionary(row, k=12) for site, row in zip(SITES, rows, strict=True)}
    rng = np.random.default_rng(4)
    chains = Chains(
        sites=SITES,
        latent=np.stack([rng.integers(48, size=48), rng.integers(48, size=48), np.arange(48)]),
    )
    table = measured(model, saes, chains, contexts)
    assert len(table) > 20
    for row in table.head(12).itertuples():
        first, middle, target = chains.latent[:, row.target_latent]
        ids, at = torch.from_numpy(contexts.ids[[row.context]]), row.position
        clean = {site: value[0, at] for site, value in model.activations(ids, SITES).items()}
        z = [
            float(saes[site].encode(clean[site])[i])
            for site, i in zip(SITES, (first, middle, target), strict=True)
        ]
        out = -z[0] * saes[SITES[0]].W_dec[first]
        removed = run(model, ids, at, {SITES[0]: lambda x, out=out: x + out})
        low = float(saes[SITES[1]].encode(removed[SITES[1]])[middle])

        def put(value: float, i=middle):
            sae = saes[SITES[1]]
            return lambda x: x + (value - float(sae.encode(x)[i])) * sae.W_dec[i]

        held = run(model, ids, at, {SITES[0]: lambda x, out=out: x + out, SITES[1]: put(z[1])})
        alone = run(model, ids, at, {SITES[1]: put(low)})
        copies = run(model, ids, at, {SITES[0]: lambda x, out=out: x + out, SITES[1]: put(0.0)})
        skipped = float(saes[SITES[2]].encode(removed[SITES[2]] - out)[target])
        assert row.change_removed_blocks == pytest.approx(1 - skipped / z[2], abs=1e-3)
        named = zip(
            ("removed", "chain_held", "chain_alone", "copies_removed"),
            (removed, held, alone, copies),
            strict=True,
        )
        for name, state in named:
            after = float(saes[SITES[2]].encode(state[SITES[2]])[target])
            assert getattr(row, f"change_{name}") == pytest.approx(1 - after / z[2], abs=1e-3), name


def run(model: LanguageModel, ids: torch.Tensor, at: int, edits) -> dict[Site, torch.Tensor]:
    def only_there(edit):
        def whole(value: torch.Tensor) -> torch.Tensor:
            value = value.clone()
            value[0, at] = edit(value[0, at])
            return value

        return whole

    with model.edited({site: only_there(edit) for site, edit in edits.items()}):
        return {site: value[0, at] for site, value in model.activations(ids, SITES).items()}


def test_shares_by_hand_with_documents_as_the_unit() -> None:
    table = pd.DataFrame(
        {"steps": [2, 2, 2], "document": [0, 0, 1], "active_share": 0.5}
        | dict.fromkeys(COLUMNS, 0.0)
    )
    table["change_removed"] = [1.0, 0.5, 0.5]
    table["change_chain_held"] = [0.0, 0.5, 0.5]
    table["change_chain_alone"] = [0.8, 0.0, 0.2]
    table["change_random_held"] = [1.0, 0.5, 0.5]
    row = summarise_mediation(table).iloc[0]
    assert row["change"] == pytest.approx(2 / 3)
    assert (row["through_chain"], row["chain_alone"], row["through_random"]) == pytest.approx(
        (0.5, 0.5, 0.0)
    )
    assert row["through_chain_low"] == pytest.approx(0.0)
    assert row["through_chain_high"] == pytest.approx(2 / 3)
