"""The metrics say what their formulas say: worked numbers, a slow reference, and invariance to how
rows are batched."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featureflow.errors import UserError
from sae.metrics import (
    CovarianceMeter,
    ReconstructionMeter,
    active_latents,
    n_components_to_match,
    pca_fvu,
    rows_fvu,
)


def measured(x, y, active, documents=None, *, cuts=(), n_latents=8, centre=None):
    meter = ReconstructionMeter(n_latents=n_latents, d_out=x.shape[1], centre=centre)
    index, value = active
    bounds = [0, *cuts, len(x)]
    for a, b in pairwise(bounds):
        if b > a:
            named = None if documents is None else documents[a:b]
            meter.update(x[a:b], y[a:b], active_latents(index[a:b], value[a:b]), named)
    return meter


def random_case(seed=0, n=97, d=5, n_latents=8, k=3, offset=0.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) + offset
    y = x + 0.3 * torch.randn(n, d, generator=g)
    index = torch.stack([torch.randperm(n_latents, generator=g)[:k] for _ in range(n)])
    value = torch.rand(n, k, generator=g) * (torch.rand(n, k, generator=g) > 0.4)
    documents = torch.arange(n) // 10
    return x, y, (index, value), documents


def test_worked_numbers():
    x = torch.tensor(
        [[1.0, 0.0], [3.0, 0.0], [2.0, 3.0], [2.0, -3.0]]
    )  # mean (2, 0); variance 1+1+9+9 = 20
    y = torch.tensor([[2.0, 0.0], [3.0, 0.0], [2.0, 3.0], [2.0, 0.0]])  # errors 1 + 0 + 0 + 9 = 10
    index = torch.tensor([[0, 1], [0, 2], [0, 3], [0, 1]])
    value = torch.tensor(
        [[1.0, 0.0], [1.0, 2.0], [1.0, 0.0], [1.0, 0.5]]
    )  # firings: latent 0 ×4, 2 ×1, 1 ×1
    result = measured(x, y, (index, value), n_latents=5).result()
    assert result.fvu == pytest.approx(0.5)
    assert result.mean_squared_error == pytest.approx(2.5)
    assert result.l0 == pytest.approx(6 / 4)
    assert result.dead_fraction == pytest.approx(2 / 5)  # latents 3 and 4
    assert result.dense_fraction == pytest.approx(3 / 5)
    assert result.cosine == pytest.approx((1 + 1 + 1 + 2 / 13**0.5) / 4)
    assert result.l2_ratio == pytest.approx((2 + 1 + 1 + 2 / 13**0.5) / 4)
    # SAEBench 0.6.0: 1 − mse / (mean‖x‖² − (mean over tokens and dimensions of x²)²), mean‖x‖² =
    # (1+9+13+13)/4 = 9
    assert result.saebench_explained_variance == pytest.approx(1 - 2.5 / (9 - 4.5**2))
    # its legacy value: mean over tokens of 1 − ‖x−x̂‖²/‖x−mean‖²
    assert result.saebench_explained_variance_legacy == pytest.approx((0 + 1 + 1 + 0) / 4)


def test_a_perfect_reconstruction_has_fvu_zero_and_the_mean_has_one():
    x, _, active, _ = random_case()
    assert measured(x, x, active).result().fvu == 0
    assert measured(x, x.mean(0).expand_as(x), active).result().fvu == pytest.approx(1, rel=1e-6)


def test_fvu_is_measured_against_the_mean_not_against_zero():
    x, y, active, _ = random_case(offset=100.0)
    error, total = (x - y).double().square().sum(), (x - x.mean(0)).double().square().sum()
    result = measured(x, y, active).result()
    assert result.fvu == pytest.approx(float(error / total), rel=1e-4)
    assert result.fvu > 100 * float(error / x.double().square().sum())


@given(cuts=st.lists(st.integers(0, 97), max_size=6), seed=st.integers(0, 50))
@settings(max_examples=25, deadline=None)
def test_batching_changes_nothing(cuts, seed):
    x, y, active, documents = random_case(seed)
    whole = measured(x, y, active, documents)
    parts = measured(x, y, active, documents, cuts=sorted(cuts))
    for name in (
        "fvu",
        "l0",
        "dead_fraction",
        "dense_fraction",
        "cosine",
        "l2_ratio",
        "saebench_explained_variance",
    ):
        assert getattr(parts.result(), name) == pytest.approx(
            getattr(whole.result(), name), rel=1e-10
        )
    assert parts.result().n_documents == 10
    a, b = (m.fvu_interval(n_resamples=50, seed=1) for m in (whole, parts))
    assert (a.low, a.high) == pytest.approx((b.low, b.high), rel=1e-9)


def test_a_large_mean_costs_no_accuracy_with_a_centre():
    x, y, active, _ = random_case()
    near = measured(x, y, active).result().fvu
    far = measured(
        x.double() + 1e7,
        y.double() + 1e7,
        active,
        centre=torch.full((5,), 1e7, dtype=torch.float64),
    )
    assert far.result().fvu == pytest.approx(near, rel=1e-6)


def test_the_interval_is_the_spread_of_resampled_documents():
    x, y, active, documents = random_case(seed=3, n=400, offset=2.0)
    meter = measured(x, y, active, documents % 40)
    interval = meter.fvu_interval(n_resamples=2000, seed=0)
    rng = np.random.default_rng(7)
    slow = []
    for _ in range(2000):  # resample rows document by document and apply the definition
        rows = np.concatenate(
            [np.flatnonzero(documents.numpy() % 40 == i) for i in rng.integers(0, 40, 40)]
        )
        a, b = x[rows].double(), y[rows].double()
        slow.append(float((a - b).square().sum() / (a - a.mean(0)).square().sum()))
    assert interval.low == pytest.approx(np.percentile(slow, 2.5), abs=0.003)
    assert interval.high == pytest.approx(np.percentile(slow, 97.5), abs=0.003)
    assert interval.low < meter.result().fvu < interval.high


def test_one_document_has_no_interval():
    x, y, active, _ = random_case()
    assert np.isnan(
        measured(x, y, active, torch.zeros(97, dtype=torch.int64))
        .fvu_interval(n_resamples=10, seed=0)
        .low
    )


def test_pca_curve_equals_projecting_the_rows():
    g = torch.Generator().manual_seed(1)
    mix = torch.randn(6, 6, generator=g)
    train, held_out = (
        torch.randn(500, 6, generator=g) @ mix + 50,
        torch.randn(80, 6, generator=g) @ mix + 50.2,
    )
    meters = [CovarianceMeter(centre=torch.full((6,), 49.0)) for _ in range(2)]
    for meter, rows in zip(meters, (train, held_out), strict=True):
        for part in rows.split(33):
            meter.update(part)
    curve = pca_fvu(*meters)
    mean = train.double().mean(0)
    basis = torch.linalg.svd(train.double() - mean, full_matrices=False).Vh
    x = held_out.double()
    for k in range(7):
        rebuilt = mean + (x - mean) @ basis[:k].T @ basis[:k]
        expected = (x - rebuilt).square().sum() / (x - x.mean(0)).square().sum()
        assert curve[k] == pytest.approx(float(expected), abs=1e-9)


def test_n_components_to_match():
    curve = np.array([1.0, 0.6, 0.3, 0.1, 0.0])
    assert n_components_to_match(curve, 0.3) == 2
    assert n_components_to_match(curve, 0.29) == 3
    assert n_components_to_match(curve, 2.0) == 0


def test_no_tokens_and_nan_are_refused():
    with pytest.raises(UserError, match="no tokens"):
        ReconstructionMeter(n_latents=3, d_out=2).result()
    with pytest.raises(UserError, match="not finite"):
        ReconstructionMeter(n_latents=3, d_out=2).update(
            torch.tensor([[float("nan"), 0.0]]),
            torch.zeros(1, 2),
            torch.zeros(0, dtype=torch.int64),
        )


def test_rows_as_a_dictionary_against_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    train, held_out = (torch.randn(n, 12, generator=generator) for n in (30, 20))
    mean = train.mean(0)
    unit = ((train - mean) / (train - mean).norm(dim=1, keepdim=True)).numpy()
    error = 0.0
    for x in (held_out - mean).numpy():
        chosen = unit[np.argsort(-np.abs(unit @ x))[:3]]
        error += np.square(x - np.linalg.lstsq(chosen.T, x, rcond=None)[0] @ chosen).sum()
    total = np.square(held_out.numpy() - held_out.numpy().mean(0)).sum()
    assert rows_fvu(train, held_out, 3) == pytest.approx(error / total, rel=1e-3)
    assert rows_fvu(train, train, 1) < rows_fvu(train, held_out, 1)
