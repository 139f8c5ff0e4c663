"""No headline number is earned by a model that learnt nothing, and the lens says so; a folder of
random weights has the shape of the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data.model.language_model import LanguageModel
from data.model.sources import write_random_like
from data.model.spec import Folder, Random
from pipeline.lenses import random_weights
from pipeline.run import Run

SMALL = random_weights.Config(n_layers=4, n_tokens=6144, steps=60, n_targets=120)


@pytest.mark.slow
def test_a_model_with_random_weights_earns_no_claim(run: Run) -> None:
    """The tiny recipe's own model has random weights: two arms that learnt nothing."""
    table = random_weights.look(run, SMALL).tables["summary"].set_index("quantity")
    claims = table[table["earned"] != "not claimed"]
    assert {"births: own − other", "… by the model, residual", "labels that hold"} <= set(
        claims.index
    )
    assert (claims["earned"] == "no").all(), claims[["value_trained", "value_random"]]
    assert table.loc["removal without the model", "value_trained"] > 0.3, "the skip connection"


def test_random_weights_of_the_same_shape(tmp_path: Path) -> None:
    spec = Random(n_layers=2, d_model=16, n_heads=2, d_mlp=32)
    made = LanguageModel.open(spec, dtype="float32")
    made.hf.save_pretrained(tmp_path / "own")
    made.tokenizer.hf.save_pretrained(tmp_path / "own")
    model = LanguageModel.open(Folder(path=tmp_path / "own"), dtype="float32")
    write_random_like(model.loaded, tmp_path / "random", seed=3)
    other = LanguageModel.open(Folder(path=tmp_path / "random"), dtype="float32")
    assert other.sites() == model.sites()
    shapes = [{k: v.shape for k, v in each.hf.state_dict().items()} for each in (model, other)]
    assert shapes[0] == shapes[1]
    ids = torch.tensor([[5, 6, 7]])
    assert not torch.allclose(model.logits(ids), other.logits(ids))
    assert other.tokenizer.fingerprint == model.tokenizer.fingerprint
