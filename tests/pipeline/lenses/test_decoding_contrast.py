"""Contrast by its limits, and turns of rows by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featureflow.sites import parse_site
from pipeline.lenses import decoding_contrast, rotation
from pipeline.run import Run


def test_contrast_keeps_mass_and_what_is_unlikely() -> None:
    up = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    flat = torch.full((1, 4), 0.25).log()
    same = decoding_contrast.contrasted(up, flat, 0.2)
    torch.testing.assert_close(same, up)  # a flat early layer changes nothing
    even = decoding_contrast.contrasted(up, up, 0.2).exp()
    torch.testing.assert_close(even, torch.tensor([[0.95 / 3] * 3 + [0.05]]))
    low = torch.tensor([[0.9, 0.05, 0.025, 0.025]]).log()
    turned = decoding_contrast.contrasted(up, low, 0.2)
    assert turned.argmax() == 1, "what the early layer says already is taken back"
    assert float(turned.exp().sum()) == pytest.approx(1)


def test_turns_are_one_for_a_frozen_row_and_none_for_others() -> None:
    start = torch.nn.functional.normalize(
        torch.randn(200, 64, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    rows = start.clone()
    rows[0] = -start[0]
    own, other = rotation.turns(rows, start, 0)
    np.testing.assert_allclose(own[1:], 1, atol=1e-6)
    assert own[0] == pytest.approx(-1, abs=1e-6)
    assert abs(np.median(other)) < 0.1


def test_the_start_of_the_chain_is_drawn_again_and_its_members_start_from_it(run: Run) -> None:
    """The chain of the tiny recipe begins at L1."""
    first = rotation.start_of(run, parse_site("L1"))
    assert first is not None
    own, other = rotation.turns(run.saes[parse_site("L1")].W_dec.detach(), first, 0)
    assert np.median(own) > np.median(other) + 0.3
    beside = rotation.start_of(run, parse_site("L0"))
    torch.testing.assert_close(beside, run.saes[parse_site("L1")].W_dec)
