"""Firing statistics from sparse codes equal those of dense arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sparse
import torch

from pipeline.flow import functional
from pipeline.flow.functional import chance_pairs, codes_from, compare_firing, encode_tokens
from sae import Sae, TopKActivation


@pytest.fixture
def dense_pair():
    rng = np.random.default_rng(0)
    source = rng.random((500, 40)) * (rng.random((500, 40)) < 0.1)
    target = rng.random((500, 30)) * (rng.random((500, 30)) < 0.1)
    target[:, :10] = source[:, 5:15] * (
        1 + 0.1 * rng.random((500, 10))
    )  # ten targets follow sources 5 … 14
    target[:, 11] = 0.0
    return source.astype(np.float32), target.astype(np.float32)


def test_pearson_and_jaccard_equal_numpy(dense_pair, monkeypatch):
    monkeypatch.setattr(functional, "_BLOCK", 7)  # several blocks of targets
    source, target = dense_pair
    left, right = np.meshgrid(np.arange(40), np.delete(np.arange(30), 11), indexing="ij")
    left, right = left.ravel(), right.ravel()
    found = compare_firing(
        codes_from(sparse.csr_matrix(source)),
        codes_from(sparse.csr_matrix(target)),
        (left, right),
        rng=np.random.default_rng(0),
        n_chance=50,
    )
    whole = np.corrcoef(
        source.T.astype(np.float64), target.T.astype(np.float64)[np.arange(30) != 11]
    )[:40, 40:]
    np.testing.assert_allclose(found.links.pearson, whole.ravel(), atol=1e-5)
    both = ((source[:, left] > 0) & (target[:, right] > 0)).sum(0)
    either = ((source[:, left] > 0) | (target[:, right] > 0)).sum(0)
    np.testing.assert_allclose(found.links.jaccard, both / either, atol=1e-6)
    np.testing.assert_array_equal(found.best.index[:10], np.arange(5, 15))
    np.testing.assert_allclose(
        found.best.pearson[np.arange(30) != 11], whole.max(0).clip(min=0), atol=1e-5
    )
    second = np.sort(whole, axis=0)[-2].clip(min=0)
    np.testing.assert_allclose(found.best.runner_up[np.arange(30) != 11], second, atol=1e-5)
    rivals = found.best.rival(np.array([5, 6]), np.array([0, 0]))
    np.testing.assert_allclose(
        rivals, [second[0], whole[5, 0]], atol=1e-5
    )  # 5 is its best source, 6 is not
    assert found.best.index[11] == -1, "a latent that never fires has no partner"
    assert np.isfinite(found.chance.pearson).all()


def test_chance_pairs_keep_the_target_and_the_density_but_never_the_link_itself():
    rng = np.random.default_rng(0)
    density = np.linspace(0.01, 0.5, 200)
    source = codes_from(sparse.csr_matrix((rng.random((2000, 200)) < density).astype(np.float32)))
    links = (np.arange(200), np.arange(200))
    other, target = chance_pairs(source, links, rng=rng, n=3000, window=16)
    assert (other != target).all()
    assert np.abs(source.density[other] - source.density[target]).max() < 0.12
    empty = chance_pairs(source, (np.zeros(0, int), np.zeros(0, int)), rng=rng, n=10)
    assert len(empty[0]) == 0


def test_codes_hold_what_the_dictionary_encodes():
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(20, 8, generator=generator), dim=1)
    sae = Sae(
        W_enc=rows,
        b_enc=torch.zeros(20),
        W_dec=rows,
        b_dec=torch.zeros(8),
        b_in=torch.zeros(8),
        activation=TopKActivation(k=3),
    )
    tokens = torch.randn(50, 8, generator=generator)
    codes = encode_tokens(sae, tokens.split(16))
    np.testing.assert_allclose(codes.codes.toarray(), sae.encode(tokens).numpy(), atol=1e-6)
    np.testing.assert_array_equal(codes.n_fired, (sae.encode(tokens) > 0).sum(0).numpy())
    np.testing.assert_allclose(
        codes.deviation, sae.encode(tokens).double().std(0, correction=0).numpy(), atol=1e-5
    )
