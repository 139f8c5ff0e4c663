"""p-values count, q-values are Benjamini and Hochberg's, nulls keep what they promise to keep."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

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
from pipeline.flow.significance import cosine_at_rate, hubness, p_values, q_values


def test_a_p_value_counts_the_null_at_or_above_and_the_observation_itself():
    null = np.array([0.1, 0.2, 0.3, 0.3])
    assert p_values(np.array([0.05, 0.2, 0.3, 0.31]), null).tolist() == pytest.approx(
        [1.0, 0.8, 0.6, 0.2]
    )


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.integers(1, 60), elements=st.floats(1e-6, 1.0)))
def test_q_values_are_benjamini_hochberg(p):
    np.testing.assert_allclose(q_values(p), stats.false_discovery_control(p), rtol=1e-9)


def test_a_link_outside_the_family_is_judged_by_the_familys_curve():
    family = np.array([0.001, 0.002, 0.5, 0.9])
    inside = q_values(family)
    np.testing.assert_allclose(q_values(family, family), inside)
    assert q_values(np.array([0.0015]), family)[0] == pytest.approx(
        0.004
    )  # accepted at the rate of the next test
    assert q_values(np.array([0.95]), family)[0] == pytest.approx(0.95)
    assert q_values(np.array([0.2]), np.zeros(0))[0] == 1.0


def test_the_threshold_is_the_nulls_quantile_at_the_accepted_p_value():
    null = np.linspace(0, 1, 10_001)
    p = p_values(np.array([0.9999] * 50 + [0.5] * 50), null)
    assert cosine_at_rate(p, [null], 0.05) == pytest.approx(1 - 0.05 * 50 / 100, abs=1e-3)
    assert cosine_at_rate(np.ones(10), [null], 0.05) is None


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
