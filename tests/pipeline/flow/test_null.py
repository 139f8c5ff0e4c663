"""Nulls keep what they promise to keep; hubs are counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featureflow.statistics import p_values
from pipeline.flow.directions import directions_of
from pipeline.flow.match import best_cosines
from pipeline.flow.null import (
    Isotropic,
    NullSampler,
    Rotation,
    Shuffled,
    mirrored,
    rotated_within,
    spectrum_of,
)
from pipeline.flow.pair_report import hubness


def test_hubness_is_zero_when_every_source_is_chosen_once():
    assert hubness(np.arange(10), 10) == (0.0, 1)
    skew, largest = hubness(np.zeros(10, dtype=int), 10)
    assert skew > 2
    assert largest == 10


def anisotropic(n: int, d: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.linspace(2.0, 0.2, d) + mean


def test_a_rotation_within_the_eigenbasis_keeps_norms_the_mean_component_and_the_spectrum():
    source = directions_of(anisotropic(800, 65, 0, mean=0.4), name="s")
    spectrum = spectrum_of(source)
    rows = source.unit[:400]
    turned = rotated_within(rows, spectrum, 16, torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        torch.linalg.vector_norm(turned, dim=1), torch.ones(400), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(turned @ spectrum.mean, rows @ spectrum.mean, atol=1e-5, rtol=0)
    before = (rows @ spectrum.basis).square().mean(0).reshape(-1, 16).sum(1)
    after = (turned @ spectrum.basis).square().mean(0).reshape(-1, 16).sum(1)
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)
    assert (turned * rows).sum(1).mean() < 0.5, "the rows did not turn"


@pytest.mark.parametrize("choice", [Rotation(), Shuffled()])
def test_under_no_flow_p_values_are_uniform_even_when_dictionaries_are_anisotropic(choice):
    source = directions_of(anisotropic(1024, 64, 0), name="s")
    target = directions_of(anisotropic(1024, 64, 1), name="t")
    null = NullSampler(choice=choice, n=4096).sample(
        source, target, torch.Generator().manual_seed(99)
    )
    p = p_values(best_cosines(target.unit, source).numpy(), null.best_cosine)
    for level in (0.01, 0.05, 0.2):
        assert abs((p <= level).mean() - level) < 3.5 * np.sqrt(level * (1 - level) / 1024) + 0.01


def test_the_isotropic_null_is_too_low_for_anisotropic_dictionaries():
    source = directions_of(anisotropic(1024, 64, 0), name="s")
    target = directions_of(anisotropic(1024, 64, 1), name="t")
    null = NullSampler(choice=Isotropic(), n=4096).sample(
        source, target, torch.Generator().manual_seed(99)
    )
    p = p_values(best_cosines(target.unit, source).numpy(), null.best_cosine)
    assert (p <= 0.05).mean() > 0.2


def test_mirroring_believes_only_the_lower_half():
    rng = np.random.default_rng(0)
    contaminated = np.concatenate([rng.normal(0.4, 0.05, 800), rng.uniform(0.8, 1.0, 200)])
    believed = mirrored(contaminated)
    assert np.quantile(believed, 0.99) < 0.65
    assert np.quantile(contaminated, 0.99) > 0.9
