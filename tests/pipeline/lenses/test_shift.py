"""The lens `shift` finds the features that an edit moved, switched on or off, and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data.model.finetuning import finetune, save_model
from data.model.language_model import LanguageModel
from data.model.spec import Random
from data.text.corpus import BundledText
from featureflow.errors import UserError
from pipeline.lenses.shift import Config, look, shifts
from pipeline.run import Run
from sae import Sae, TopKActivation

N, D, DOCUMENTS = 40, 48, 60
MOVED, LOST, NEW = 7, 11, 13


def planted() -> tuple[Sae, torch.Tensor, np.ndarray]:
    """An SAE with nearly orthogonal rows, and text in which features come in bursts, some only in
    a few documents."""
    generator = torch.Generator().manual_seed(5)
    rows, _ = torch.linalg.qr(torch.randn(D, D, generator=generator))
    sae = Sae(
        W_enc=rows[:N].clone(),
        b_enc=torch.full((N,), -0.2),
        W_dec=rows[:N].clone(),
        b_dec=torch.zeros(D),
        b_in=torch.zeros(D),
        activation=TopKActivation(k=6),
    )
    documents = np.repeat(np.arange(DOCUMENTS), 50)
    rate = torch.rand(DOCUMENTS, N, generator=generator).pow(4)
    chosen = torch.rand(len(documents), N, generator=generator) < 0.3 * rate[documents]
    chosen[:, NEW] = False
    value = 1 + torch.rand(len(documents), N, generator=generator)
    x = (chosen * value) @ rows[:N]
    return sae, x + 0.02 * torch.randn(x.shape, generator=generator), documents


def test_an_edit_of_one_feature_moves_that_feature_only() -> None:
    sae, before, documents = planted()
    active = sae.encode(before) > 0
    direction = torch.nn.functional.normalize(torch.randn(D, generator=torch.Generator()), dim=0)
    generator = torch.Generator().manual_seed(1)
    drift = 0.02 * torch.randn(before.shape, generator=generator)
    after = before + drift + 0.3 * active[:, MOVED, None] * direction
    row, table = shifts(sae, before, after, documents, Config())
    assert table.loc[table["change"] == "moved", "latent"].tolist() == [MOVED]
    assert (row["new"], row["lost"]) == (0, 0)
    found = table.set_index("latent")["shift"] * float(before.norm(dim=1).median())
    assert found[MOVED] == pytest.approx(0.3, rel=0.1)
    assert found.drop(MOVED).max() < 0.1


def test_features_that_go_silent_or_wake_are_lost_and_new() -> None:
    sae, before, documents = planted()
    value = sae.encode(before)
    off = (value[:, LOST, None] > 0) * (before @ sae.W_dec[LOST])[:, None] * sae.W_dec[LOST]
    after = before - off + (value[:, :1] > 0) * 1.5 * sae.W_dec[NEW]
    _, table = shifts(sae, before, after, documents, Config())
    change = table.set_index("latent")["change"]
    assert change[LOST] == "lost"
    assert change[NEW] == "new"
    assert set(change.index[change.isin(["lost", "new"])]) == {LOST, NEW}


def test_drift_without_a_pattern_moves_nothing() -> None:
    sae, before, documents = planted()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        walk = 0.05 * torch.randn(DOCUMENTS, D, generator=generator)[documents]
        row, _ = shifts(sae, before, before + walk, documents, Config(seed=seed))
        assert (row["moved"], row["new"], row["lost"]) == (0, 0, 0), "documents shift, not features"


def test_the_shift_carries_to_other_documents() -> None:
    sae, before, documents = planted()
    active = (sae.encode(before) > 0).float()
    generator = torch.Generator().manual_seed(2)
    directions = torch.nn.functional.normalize(torch.randn(N, D, generator=generator), dim=1)
    directions[8:] = 0
    row, _ = shifts(sae, before, before + 1.5 * active @ directions, documents, Config())
    assert row["moved"] >= 6
    assert row["recovered_1"] > 0.8
    assert row["recovered_1"] > row["recovered_null"] + 0.5


def test_a_short_fine_tune_is_told_from_the_model_itself(run: Run, tmp_path: Path) -> None:
    """The fine-tuned blocks change the stream, those below do not."""
    model = LanguageModel.open(run._spec, dtype="float32")
    first, last = finetune(
        model, BundledText(), n_blocks=1, steps=20, learning_rate=1e-2, n_context=32
    )
    assert last < first - 0.1
    save_model(model, tmp_path / "tuned")
    few = {"n_tokens": 400, "n_placements": 5, "n_sites": 99}
    sites = look(run, Config(other=str(tmp_path / "tuned"), **few)).tables["sites"]
    assert (sites["shift"].iloc[:-1] == 0).all()
    assert sites["shift"].iloc[-1] > 0.05
    assert (sites["moved"].iloc[:-1] == 0).all()
    itself = look(run, Config(**few))
    assert [itself.headline[f"n_{name}"] for name in ("moved", "new", "lost")] == [0, 0, 0]
    save_model(LanguageModel.open(Random(n_layers=2, d_model=16, n_heads=2)), tmp_path / "small")
    with pytest.raises(UserError, match="cannot be laid beside"):
        look(run, Config(other=str(tmp_path / "small"), **few))
    with pytest.raises(UserError, match="no SAEs here"):
        look(run, Config(sites=("L9",)))
