"""A feature lives as long as it agrees directly with its path: planted births, deaths and drifts
over ten layers, with links between all neighbours."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sparse

from featureflow.sites import Site
from pipeline.flow.functional import agreement, codes_from
from pipeline.flow.lives import lives_of

N_LAYERS, N_TOKENS, N = 10, 3000, 60
CHAIN = [Site(layer, "resid_post") for layer in range(N_LAYERS)]


@pytest.fixture(scope="module")
def planted():
    """Codes of ten layers and the true (birth, death) of every slot. Before its birth and after its
    death a slot holds an unrelated activation; between, the same one with a little noise."""
    rng = np.random.default_rng(0)
    birth = rng.integers(0, 6, size=N)
    death = np.minimum(birth + rng.integers(0, 8, size=N), N_LAYERS - 1)
    own = _activation(rng)
    codes = {}
    for layer, site in enumerate(CHAIN):
        alive = (birth <= layer) & (layer <= death)
        noise = 1 + 0.2 * rng.standard_normal((N_TOKENS, N))
        values = np.where(alive, own * noise, _activation(rng))
        codes[site] = codes_from(sparse.csr_matrix(np.maximum(values, 0).astype(np.float32)))
    return codes, birth, death


def _activation(rng):
    return rng.gamma(2.0, size=(N_TOKENS, N)) * (rng.random((N_TOKENS, N)) < 0.03)


def links(n: int = N) -> pd.DataFrame:
    """Every slot is linked to the same slot of the next layer."""
    parts = [
        pd.DataFrame(
            {
                "source_site": a.short,
                "target_site": b.short,
                "source_latent": np.arange(n),
                "target_latent": np.arange(n),
                "kept": True,
                "rank": 0,
                "forward_rank": 0,
            }
        )
        for a, b in itertools.pairwise(CHAIN)
    ]
    return pd.concat(parts, ignore_index=True)


def test_births_and_deaths_are_found_where_links_go_through_all_layers(planted):
    codes, birth, death = planted
    lives = lives_of(CHAIN, dict.fromkeys(CHAIN, N), links(), codes, least=0.3)
    right = total = 0
    for layer, site in enumerate(CHAIN):
        alive = (birth <= layer) & (layer <= death)
        found = lives[site][alive]
        right += int((np.abs(found["birth_layer"] - birth[alive]) <= 1).sum())
        right += int((np.abs(found["death_layer"] - death[alive]) <= 1).sum())
        total += 2 * int(alive.sum())
        assert (found["birth_stepwise"] == 0).all()
        assert (found["death_stepwise"] == N_LAYERS - 1).all()
    assert right / total >= 0.9


def test_small_steps_do_not_add_up_to_a_long_life():
    """Each layer keeps most of the one before, the ends share nothing: the ship of Theseus."""
    rng = np.random.default_rng(1)
    shared = [_activation(rng) for _ in range(N_LAYERS + 2)]
    codes = {
        site: codes_from(sparse.csr_matrix(sum(shared[i : i + 3]).astype(np.float32)))
        for i, site in enumerate(CHAIN)
    }
    near = agreement(codes[CHAIN[4]], codes[CHAIN[5]], np.arange(N), np.arange(N))
    assert np.median(near) > 0.5
    lives = lives_of(CHAIN, dict.fromkeys(CHAIN, N), links(), codes, least=0.3)[CHAIN[5]]
    assert (lives["birth_layer"] >= 3).all()
    assert (lives["death_layer"] <= 7).all()
    assert (lives["birth_stepwise"] == 0).all()
    assert np.median(lives["ends_agreement"]) < 0.2


def test_agreement_is_the_correlation_of_whole_columns(planted):
    codes, *_ = planted
    left, right = np.array([3, 7, 3]), np.array([3, 7, 12])
    a, b = codes[CHAIN[2]], codes[CHAIN[3]]
    dense = [np.asarray(c.codes.todense()) for c in (a, b)]
    expected = [
        np.corrcoef(dense[0][:, i], dense[1][:, j])[0, 1] for i, j in zip(left, right, strict=True)
    ]
    np.testing.assert_allclose(agreement(a, b, left, right), expected, atol=1e-5)


def test_without_tokens_lives_are_stepwise_and_nothing_is_claimed():
    lives = lives_of(CHAIN, dict.fromkeys(CHAIN, N), links(), {}, least=0.3)[CHAIN[4]]
    assert (lives["birth_layer"] == 0).all()
    assert lives["birth_agreement"].isna().all()
    assert lives["ends_agreement"].isna().all()
