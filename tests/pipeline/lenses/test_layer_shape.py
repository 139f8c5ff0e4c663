"""Shapes that are known: a line, a circle, a low rank, an outlying coordinate, planted shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.lenses import layer_shape as shape


def gaussian(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_a_line_has_no_bends_and_a_circle_those_of_its_points() -> None:
    one = np.zeros(40, dtype=int)
    line = torch.arange(40.0)[:, None] * gaussian(1, 6) + 9 * gaussian(1, 6, seed=1)
    assert shape.bends(line, one, np.arange(40), 0)["curvature"] == pytest.approx(0, abs=2e-3)
    turn = torch.arange(40) * 2 * np.pi / 40
    circle = torch.stack([turn.cos() + 9, turn.sin()], 1)  # not around the origin
    found = shape.bends(circle, one, np.arange(40), 0)
    assert found["curvature"] == pytest.approx(2 * np.pi / 40, abs=1e-3)
    assert found["curvature_share"] < 0.2


def test_rank_and_dimension_are_those_of_the_plane() -> None:
    plane = gaussian(3000, 3) @ torch.linalg.qr(gaussian(20, 3, seed=1)).Q.T
    found = shape.ranks(plane, np.zeros(3000, dtype=int), 0)
    assert found["effective_rank"] == pytest.approx(3, abs=0.05)
    assert found["participation"] == pytest.approx(3, abs=0.1)
    assert found["dimension"] == pytest.approx(3, abs=0.4)
    assert shape.entropy(gaussian(1, 8).expand(10, 8)) == pytest.approx(0, abs=1e-3)
    assert shape.entropy(torch.eye(8)) == pytest.approx(1)


def test_one_constant_coordinate_makes_the_anisotropy() -> None:
    x = gaussian(2000, 64)
    x[:, 7] += 30
    found, dims = shape.outliers(x, 0)
    assert [i for i, _ in dims] == [7]
    assert found["anisotropy"] > 0.9
    assert abs(found["anisotropy_without"]) < 0.05
    assert found["anisotropy_random"] > 0.9


def test_shares_of_variance_are_those_planted() -> None:
    rng = np.random.default_rng(0)
    position, document = np.tile(np.arange(20), 100), np.repeat(np.arange(100), 20)
    parts = [gaussian(20, 30, seed=1)[position], gaussian(100, 30, seed=2)[document]]
    x = parts[0] + 2 * parts[1] + gaussian(2000, 30, seed=3)
    keep = rng.random(2000) < 0.7  # not balanced
    kept = torch.from_numpy(keep)
    found = shape.shares(x[kept], position[keep], document[keep], 0)
    assert found["position_share"] == pytest.approx(1 / 6, abs=0.04)
    assert found["context_share"] == pytest.approx(4 / 6, abs=0.04)
    assert found["position_null"] < 0.03
    assert found["context_null"] < 0.1


def test_cka_is_one_for_a_rotated_copy_and_none_for_noise() -> None:
    x = gaussian(300, 12)
    turn = torch.linalg.qr(gaussian(12, 12, seed=4)).Q
    whitened = (x - x.mean(0)) / x.std(0)
    a, b = shape._gram_of(x), (whitened @ turn @ (whitened @ turn).T).fill_diagonal_(0)
    assert shape.cka(a, b) == pytest.approx(1, abs=1e-4)
    assert abs(shape.cka(a, shape._gram_of(gaussian(300, 12, seed=9)))) < 0.05


def test_halves_of_planted_documents_find_each_other() -> None:
    document = np.repeat(np.arange(30), 16)
    x = gaussian(30, 40, seed=5)[document] + gaussian(480, 40, seed=6)
    found = shape.halves(x, document)
    assert found["halves"] > 0.9
    assert found["halves_chance"] == pytest.approx(1 / 59)
    assert shape.halves(gaussian(480, 40, seed=6), document)["halves"] < 0.3
