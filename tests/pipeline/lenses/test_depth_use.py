"""A block that adds nothing costs nothing; passing over blocks is what leaving them out does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.model.language_model import LanguageModel
from data.model.partial_forward import passed_over
from featureflow.sites import parse_site
from pipeline.lenses import depth_use
from pipeline.run import Run


def test_a_block_that_adds_nothing_costs_nothing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    model = LanguageModel.open(run._spec, dtype="float32")
    with torch.no_grad():
        for part in (model.blocks[1].attention, model.blocks[1].mlp):
            assert part is not None
            for weight in part.parameters():
                weight.zero_()
    monkeypatch.setitem(run.__dict__, "model", model)
    config = depth_use.Config(n_tokens=200, n_candidates=2, n_pruned=1, n_spans=1)
    finding = depth_use.look(run, config)
    table = finding.tables["layers"]
    idle = table[table["layer"] == 1]
    np.testing.assert_allclose(idle["cost"], 0, atol=1e-6)
    np.testing.assert_allclose(idle["influence"], 0, atol=1e-5)
    assert (table[(table["layer"] != 1) & (table["way"] == "all rows")]["cost"].abs() > 1e-4).all()


def test_blocks_passed_over_hand_on_what_they_read(run: Run) -> None:
    model, ids = run.model, torch.arange(3, 13)[None]
    L0, L2, L3 = (parse_site(f"L{layer}") for layer in (0, 2, 3))
    with passed_over(model, [1, 2]):
        found = model.activations(ids, [L0, L2])
        through = model.activations(ids, [L3])[L3]
    torch.testing.assert_close(found[L0], found[L2])
    assert not torch.allclose(through, model.activations(ids, [L3])[L3])
    before, after = torch.zeros(1, 3, 2), torch.ones(1, 3, 2)
    ordinary = torch.tensor([[False, True, True]])
    mixed = [
        depth_use.mix(before, after, ordinary, way)[0, :, 0].tolist() for way in depth_use.WAYS
    ]
    assert mixed == [[0, 0, 0], [1, 0, 0], [0, 1, 1]]
