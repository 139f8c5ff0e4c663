"""Sums with a known interaction, and SAEs that are rotated copies of each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.lenses import compose, dictionary_distance
from sae import Sae
from sae.activations import Relu


def test_the_additive_share_is_the_planted_one() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((8, 1, 400)), rng.standard_normal((1, 8, 400))
    noise = rng.standard_normal((8, 8, 400))
    for strength in (0.0, 0.5, 2.0):
        cells = a + b + strength * noise
        left = strength**2 * 49 / 64
        both = 2 * 7 / 8 + strength**2 * 14 / 64
        found = compose.additive(cells, 0)
        assert found.mean == pytest.approx(both / (both + left), abs=0.02)
    order = rng.permutation(64)
    mixed = (a + b).reshape(64, -1)[order].reshape(8, 8, -1)
    assert compose.additive(mixed, 0).mean == pytest.approx(14 / 63, abs=0.1)


def test_a_left_out_cell_of_a_sum_is_found_and_of_noise_is_not() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((5, 1, 50)), rng.standard_normal((1, 6, 50))
    assert compose.predicted(a + b) == 1.0
    assert compose.predicted(rng.standard_normal((5, 6, 50))) < 0.3


def test_a_product_is_all_interaction() -> None:
    sign = np.array([1.0, -1, 1, -1])
    z = (sign[:, None] * sign[None])[..., None] * np.ones((1, 1, 2)) + np.array([2.0, 2.0])
    z[..., 1] = 2 + sign[:, None]
    table = compose._bound(z, "L1", "planted").set_index("feature")
    assert table.loc["L1/0", "interaction"] == pytest.approx(1)
    assert table.loc["L1/1", "interaction"] == pytest.approx(0, abs=1e-12)


def sae(rows: torch.Tensor) -> Sae:
    return Sae(
        W_enc=rows,
        b_enc=torch.zeros(len(rows)),
        W_dec=rows,
        b_dec=torch.zeros(rows.shape[1]),
        b_in=torch.zeros(rows.shape[1]),
        activation=Relu(),
    )


def test_a_rotated_copy_is_no_distance_away_and_its_rows_are() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(24, 12, generator=generator), dim=-1)
    turn, _ = torch.linalg.qr(torch.randn(12, 12, generator=generator))
    x = torch.randn(400, 12, generator=generator)
    config = dictionary_distance.Config(n_anchors=50)
    same = dictionary_distance.distances(sae(rows), sae(rows), x, x, config)
    copy = dictionary_distance.distances(sae(rows), sae(rows @ turn), x, x @ turn, config)
    for found in (same, copy):
        assert found["angle"] == pytest.approx(0, abs=1e-3)
        assert found["relative"] == pytest.approx(1, abs=1e-4)
        assert found["latents"] == pytest.approx(1, abs=1e-4)
        assert found["subspace"] == pytest.approx(1, abs=1e-4)
        assert abs(found["relative_null"]) < 0.1
        assert found["angle_null"] > 0.5
    assert same["mmcs"] == pytest.approx(1, abs=1e-5)
    assert copy["mmcs"] < 0.9
    y = x + 0.5 * torch.randn(400, 12, generator=generator)
    noisy = dictionary_distance.distances(sae(rows), sae(rows), x, y, config)
    assert 0 < noisy["angle"] < noisy["angle_null"]


def test_the_angle_is_a_distance() -> None:
    generator = torch.Generator().manual_seed(3)
    sets = [torch.randn(60, 5, generator=generator) for _ in range(3)]
    d = [[dictionary_distance.angle(a, b) for b in sets] for a in sets]
    assert d[0][1] == pytest.approx(d[1][0])
    assert d[0][2] <= d[0][1] + d[1][2] + 1e-9
