"""Groups by hand and by a slow reference; separation finds a planted difference and no other."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sparse

from featureflow.errors import UserError
from pipeline.flow.activity import (
    GROUPS,
    MEMBERS,
    Activity,
    Predecessors,
    activity_groups,
    cooccurrence,
    counts,
    separation,
    separation_shares,
    shares,
    stability,
)
from pipeline.flow.functional import Codes, codes_from
from pipeline.flow.pairing import RELATIONS


def random_codes(n_tokens: int, n_latents: int, seed: int, density: float = 0.3) -> Codes:
    return codes_from(
        sparse.random(n_tokens, n_latents, density=density, random_state=seed, format="csr")
    )


def test_groups_are_those_of_a_loop_over_all_firings() -> None:
    rng = np.random.default_rng(0)
    target = random_codes(40, 15, 1)
    before = {
        name: Predecessors(codes=random_codes(40, n, n), best=rng.integers(-1, n, size=15))
        for name, n in zip(RELATIONS, (12, 20, 9), strict=True)
    }
    activity = activity_groups(target, before)
    dense = target.codes.toarray()
    assert len(activity.latent) == (dense > 0).sum()
    sources = {name: side.codes.codes.toarray() for name, side in before.items()}
    for latent, token, group in zip(activity.latent, activity.token, activity.group, strict=True):
        assert dense[token, latent] > 0
        firing = {
            name
            for name, side in before.items()
            if side.best[latent] >= 0 and sources[name][token, side.best[latent]] > 0
        }
        assert set(MEMBERS[GROUPS[group]]) == firing
    assert len(set(activity.group)) == 8
    np.testing.assert_allclose(shares(activity), [np.mean(activity.group == g) for g in range(8)])
    assert counts(activity).sum() == len(activity.latent)


def test_missing_modules_leave_their_groups_impossible() -> None:
    target = random_codes(40, 15, 1)
    residual = Predecessors(codes=random_codes(40, 12, 2), best=np.arange(15) % 12)
    activity = activity_groups(target, {"residual": residual})
    assert [GROUPS[i] for i in np.flatnonzero(activity.possible)] == ["nowhere", "RES"]
    assert set(activity.group) == {0, 1}


def test_cooccurrence_and_stability_by_hand() -> None:
    found = np.zeros((4, 8), dtype=np.int64)
    found[0, [0, 1]] = 3, 1
    found[1, 0] = 2
    found[2, [0, 1, 4]] = 1
    matrix = cooccurrence(found)
    assert matrix[0, 0] == 1.0
    assert matrix[0, 1] == pytest.approx(2 / 3)
    assert matrix[1, 0] == 1.0
    assert matrix[4, 1] == 1.0
    assert matrix[1, 4] == 0.5
    assert np.isnan(matrix[2]).all()
    np.testing.assert_allclose(stability(found, 3), [0.75, np.nan, 1 / 3, np.nan])


def planted(rng: np.random.Generator) -> tuple[Activity, dict]:
    """Features 0–99 fire with RES only and have a high s(R), 100–199 with MLP only; s(M) tells
    nothing."""
    latent = rng.integers(200, size=1500)
    activity = Activity(
        latent=latent,
        token=np.arange(1500),
        group=np.where(latent < 100, 1, 2),
        n_latents=200,
        looked_at=("residual", "mlp"),
    )
    return activity, {
        "residual": np.where(np.arange(200) < 100, 0.8, 0.3) + 0.1 * rng.standard_normal(200),
        "mlp": rng.random(200),
    }


def test_separation_finds_the_planted_difference_only() -> None:
    rng = np.random.default_rng(1)
    activity, scores = planted(rng)
    apart = separation(activity.one_per_feature(rng), scores).set_index("score")
    assert apart.loc["residual", "auc"] > 0.95
    assert apart.loc["residual", "p_value"] < 1e-10
    assert apart.loc["mlp", "p_value"] > 1e-3
    assert apart.loc["mlp", "n_a"] == 100, "each feature once"
    summed = separation_shares(separation(activity, scores)).set_index("score")
    assert summed.loc["residual", "share"] == 1.0
    assert summed["expected"].all()


def test_codes_of_other_tokens_are_refused() -> None:
    target = random_codes(40, 15, 1)
    with pytest.raises(UserError, match="different tokens"):
        activity_groups(
            target,
            {"residual": Predecessors(codes=random_codes(41, 12, 2), best=np.zeros(15, dtype=int))},
        )
    with pytest.raises(UserError, match="one predecessor"):
        activity_groups(
            target,
            {"mlp": Predecessors(codes=random_codes(40, 12, 2), best=np.zeros(3, dtype=int))},
        )
