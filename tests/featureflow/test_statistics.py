"""Intervals and tests agree with SciPy's where it has them, and with worked numbers elsewhere."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from benchmarks.steering_study.results import equivalent, holm, sign_flip_p
from featureflow.errors import UserError
from featureflow.statistics import (
    accepted_p,
    bootstrap,
    bootstrap_mean,
    bootstrap_ratio,
    mean_over,
    named,
    p_values,
    q_values,
)


def test_the_bootstrap_of_a_ratio_is_scipys_within_its_own_noise():
    generator = np.random.default_rng(0)
    below = generator.uniform(1, 5, size=60)
    above = 0.3 * below + generator.normal(size=60)
    found = bootstrap_ratio(above, below, seed=1, n=20_000)
    theirs = stats.bootstrap(
        (above, below),
        lambda a, b, axis: a.sum(axis) / b.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=2,
    ).confidence_interval
    assert found.mean == pytest.approx(above.sum() / below.sum())
    width = theirs.high - theirs.low
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.02 * width)


def test_a_constant_ratio_has_no_width_and_one_unit_has_no_interval():
    below = np.array([1.0, 3.0, 2.0, 5.0])
    found = bootstrap_ratio(0.25 * below, below, seed=0)
    assert (found.mean, found.low, found.high, found.n) == pytest.approx((0.25, 0.25, 0.25, 4))
    one = bootstrap_ratio(np.array([1.0]), np.array([2.0]), seed=0)
    assert one.mean == 0.5
    assert np.isnan([one.low, one.high]).all()
    none = bootstrap(lambda weights: weights @ np.zeros(0), 0, seed=0)
    assert np.isnan([none.mean, none.low, none.high]).all()


def test_ungrouped_means_have_scipys_interval_and_groups_are_the_units():
    values = np.random.default_rng(0).exponential(size=50)
    found = bootstrap_mean(values.tolist(), seed=3, n=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=4
    ).confidence_interval
    width = theirs.high - theirs.low
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.02 * width)
    groups = np.repeat(np.arange(5), 10)
    between = np.repeat(np.random.default_rng(1).normal(size=5), 10).tolist()
    grouped = bootstrap_mean(between, [groups.tolist()], seed=0)
    alone = bootstrap_mean(between, seed=0)
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)


def test_sign_flips_are_counted_exactly_for_few_units():
    differences = np.array([1.0, 2.0, -0.5, 3.0, 0.7])
    flips = itertools.product((-1, 1), repeat=5)
    means = np.array([abs((np.array(s) * differences).mean()) for s in flips])
    expected = (means >= abs(differences.mean()) - 1e-12).mean()
    assert sign_flip_p(differences.tolist(), seed=0) == pytest.approx(expected)
    assert sign_flip_p([float("nan"), *differences.tolist()], seed=0) == pytest.approx(expected)
    assert sign_flip_p([0.3], seed=0) == 1.0
    assert np.isnan(sign_flip_p([], seed=0))
    many = np.random.default_rng(0).normal(0.4, 1, size=40)
    assert sign_flip_p(many.tolist(), seed=0) == pytest.approx(
        stats.ttest_1samp(many, 0).pvalue, abs=0.01
    )


def test_a_p_value_counts_the_null_at_or_above_and_the_observation_itself():
    null = np.array([0.1, 0.2, 0.3, 0.3])
    assert p_values(np.array([0.05, 0.2, 0.3, 0.31]), null).tolist() == pytest.approx(
        [1.0, 0.8, 0.6, 0.2]
    )


@settings(max_examples=60, deadline=None)
@given(arrays(np.float64, st.integers(1, 60), elements=st.floats(1e-6, 1.0)))
def test_q_values_are_the_least_rate_at_which_the_step_up_procedure_accepts(p):
    q = q_values(p)
    for rate in (0.01, 0.05, 0.2, 0.7):
        ordered = np.sort(p)
        passed = np.flatnonzero(ordered <= rate * np.arange(1, len(p) + 1) / len(p))
        threshold = ordered[passed[-1]] if len(passed) else -1.0
        clear = np.abs(q - rate) > 1e-12
        np.testing.assert_array_equal((q <= rate)[clear], (p <= threshold)[clear])


def test_a_test_outside_the_family_is_judged_by_the_familys_curve():
    family = np.array([0.001, 0.002, 0.5, 0.9])
    inside = q_values(family)
    np.testing.assert_allclose(q_values(family, family), inside)
    assert q_values(np.array([0.0015]), family)[0] == pytest.approx(
        0.004
    )  # accepted at the rate of the next test
    assert q_values(np.array([0.95]), family)[0] == pytest.approx(0.95)
    assert q_values(np.array([0.2]), np.zeros(0))[0] == 1.0


def test_the_accepted_p_value_is_benjamini_and_hochbergs():
    null = np.linspace(0, 1, 10_001)
    p = p_values(np.array([0.9999] * 50 + [0.5] * 50), null)
    assert accepted_p(p, 0.05) == pytest.approx(0.05 * 50 / 100)
    assert accepted_p(np.ones(10), 0.05) is None


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    """Groups of four with a shared part: intervals by group cover 0 near 95 %, intervals by value
    far less."""
    generator = np.random.default_rng(0)
    covered = {"groups": 0, "values": 0}
    n_rounds, n_groups = 120, 20
    groups = np.repeat(np.arange(n_groups), 4).tolist()
    for seed in range(n_rounds):
        values = (
            generator.normal(size=n_groups).repeat(4) + 0.3 * generator.normal(size=4 * n_groups)
        ).tolist()
        for unit, keys in (("groups", [groups]), ("values", [])):
            found = bootstrap_mean(values, keys, seed=seed, n=300)
            covered[unit] += found.low <= 0 <= found.high
    assert covered["groups"] / n_rounds > 0.86
    assert covered["values"] / n_rounds < 0.8


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert equivalent(bootstrap_mean([0.0, 0.01, -0.01] * 10, seed=0), 0.05)
    with pytest.raises(UserError, match="one key"):
        bootstrap_mean([1.0, 2.0], [["a"]], seed=0)


def test_a_mean_over_rows_has_units_as_what_is_drawn():
    values, unit = np.array([1.0, 1.0, 0.0, np.nan, 0.5]), np.array([7, 7, 9, 9, 3])
    found = mean_over(values, unit, seed=0)
    assert found.mean == pytest.approx(2.5 / 4)
    assert found.n == 3
    wide = mean_over(np.repeat([0.0, 1.0], 500), np.repeat([0, 1], 500), seed=0)
    assert (wide.low, wide.high) == (0.0, 1.0), "two documents are two units, however long"
    assert named("x", wide) == {"x": 0.5, "x_low": 0.0, "x_high": 1.0}
