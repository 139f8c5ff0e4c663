"""Each matcher finds planted predecessors where its idea applies; the measures agree with dense
references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featureflow.errors import UserError
from pipeline.flow.functional import encode_tokens
from pipeline.flow.matchers import (
    MATCHERS,
    NOBODY,
    PairData,
    compare_matchers,
    distribution,
    jaccard,
    pearson,
    ridge_map,
)
from sae import Sae, TopKActivation

N, D = 30, 48


def orthonormal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, n, generator=torch.Generator().manual_seed(seed))).Q.T


def dictionary(rows: torch.Tensor, k: int = 4) -> Sae:
    zeros = torch.zeros(rows.shape[1])
    return Sae(
        W_enc=rows,
        b_enc=torch.zeros(len(rows)),
        W_dec=rows,
        b_dec=zeros,
        b_in=zeros,
        activation=TopKActivation(k=k),
    )


def planted(
    *, turned: bool, n_batches: int = 10, seed: int = 0
) -> tuple[PairData, torch.Tensor, PairData]:
    """Sparse causes written along the source's rows and along the target's rows; the target's row
    `perm[u]` is source u's, turned into another basis when `turned`. Returns the pair, `perm`, and
    the same pair on fresh tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = orthonormal(N, D, 1)
    perm = torch.randperm(N, generator=generator)
    turn = orthonormal(D, D, 2) if turned else torch.eye(D)
    others = (rows @ turn)[torch.argsort(perm)]
    batches = []
    for _ in range(2 * n_batches):
        fires = (torch.rand(200, N, generator=generator) < 0.08) * (
            1 + torch.rand(200, N, generator=generator)
        )
        x = fires @ rows + 0.02 * torch.randn(200, D, generator=generator)
        batches.append((x, x @ turn + 0.02 * torch.randn(200, D, generator=generator)))
    pairs = [
        PairData(
            source=dictionary(rows), target=dictionary(others), rows=lambda part=part: iter(part)
        )
        for part in (batches[:n_batches], batches[n_batches:])
    ]
    return pairs[0], perm, pairs[1]


@pytest.mark.parametrize("name", list(MATCHERS))
def test_every_matcher_finds_features_that_are_carried(name: str) -> None:
    pair, perm, _ = planted(turned=False)
    np.testing.assert_array_equal(MATCHERS[name](pair), torch.argsort(perm).numpy())


def test_directions_that_turn_between_layers_need_activations() -> None:
    pair, perm, judge = planted(turned=True)
    codes = (judge.source_codes, judge.target_codes)
    table, best = compare_matchers(pair, codes)
    truth = torch.argsort(perm).numpy()
    right = {name: float(np.mean(index == truth)) for name, index in best.items()}
    assert all(right[name] == 1.0 for name in ("pearson", "jaccard", "transport", "distribution"))
    assert right["cosine"] < 0.3
    assert right["permutation"] < 0.3
    table = table.set_index("matcher")
    assert table.loc["transport", "pearson_median"] > 0.9
    assert table.loc["cosine", "pearson_median"] < 0.2
    assert table.loc["cosine", "same_as_cosine"] == 1.0
    assert (table["n_targets"] == N).all()
    assert table.loc["permutation", "n_sources"] == N


def test_measures_are_those_of_dense_codes() -> None:
    pair, _, judge = planted(turned=True, n_batches=3)
    codes = (judge.source_codes, judge.target_codes)
    table, best = compare_matchers(pair, codes, {"cosine": MATCHERS["cosine"]}, few=1)
    a, b = (code.codes.toarray() for code in codes)
    rows = []
    for target, source in enumerate(best["cosine"]):
        x, y = a[:, source] if source != NOBODY else np.zeros(len(a)), b[:, target]
        together = ((x > 0) & (y > 0)).sum()
        r = np.corrcoef(x, y)[0, 1] if source != NOBODY else 0.0
        rows.append((r, together / ((x > 0) | (y > 0)).sum(), together / (y > 0).sum()))
    expected = np.mean(rows, axis=0)
    got = table.iloc[0][["pearson_mean", "jaccard_mean", "fires_too"]].to_numpy(dtype=float)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_jaccard_and_pearson_are_the_best_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(5)
    rows = torch.nn.functional.normalize(torch.randn(40, 12, generator=generator), dim=1)
    x = torch.randn(150, 12, generator=generator)
    pair = PairData(
        source=dictionary(rows[:25]), target=dictionary(rows[15:]), rows=lambda: [(x, x + 0.3)]
    )
    a = encode_tokens(pair.source, [x]).codes.toarray()
    b = encode_tokens(pair.target, [x + 0.3]).codes.toarray()
    together = (a > 0).T.astype(float) @ (b > 0)
    overlap = together / np.maximum((a > 0).sum(0)[:, None] + (b > 0).sum(0) - together, 1)
    got = jaccard(pair)
    best = np.where(overlap.max(0) > 0, overlap[np.maximum(got, 0), np.arange(25)], 0)
    np.testing.assert_allclose(best, overlap.max(0))
    with np.errstate(invalid="ignore", divide="ignore"):
        r = np.nan_to_num(np.corrcoef(a.T, b.T)[:25, 25:])
    np.testing.assert_allclose(r[pearson(pair), np.arange(25)], r.max(0), atol=1e-6)


def test_the_ridge_map_is_the_one_that_made_the_data() -> None:
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(6, 4, generator=generator)
    batches = [(x, x @ true + 5.0) for x in torch.randn(10, 100, 6, generator=generator) + 3.0]
    torch.testing.assert_close(
        ridge_map(lambda: batches, ridges=[1e-9, 10.0]), true, rtol=1e-3, atol=1e-3
    )
    x = torch.cat([left for left, _ in batches]).double()
    y = torch.cat([right for _, right in batches]).double()
    x, y = x - x.mean(0), y - y.mean(0)
    strength = 0.5 * x.square().mean() * len(x)
    slow = torch.linalg.solve(x.T @ x + strength * torch.eye(6), x.T @ y)
    torch.testing.assert_close(
        ridge_map(lambda: batches, ridges=[0.5]).double(), slow, rtol=1e-3, atol=1e-4
    )
    with pytest.raises(UserError, match="needs activations"):
        ridge_map(lambda: [])


def test_silent_latents_match_nobody_by_activations() -> None:
    pair, _, _ = planted(turned=False, n_batches=1)
    silent = pair.target.replace(b_enc=torch.full((N,), -100.0))
    mute = PairData(source=pair.source, target=silent, rows=pair.rows)
    for matcher in (pearson, jaccard, distribution):
        assert set(matcher(mute)) == {NOBODY}
