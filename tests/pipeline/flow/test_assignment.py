"""A planted permutation comes back, in the right direction; the sparse solution is the dense one
where it can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featureflow.errors import UserError
from pipeline.flow.assignment import NOBODY, OBJECTIVES, Assignment, assign, folded, latent_rows
from sae import Sae
from sae.activations import Threshold, TopKActivation


def random_sae(n: int = 40, d: int = 16, *, seed: int = 0, jump: bool = False) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(n, d, generator=generator), dim=1)
    theta = 0.2 + torch.rand(n, generator=generator)
    return Sae(
        W_enc=rows + 0.1 * torch.randn(n, d, generator=generator),
        b_enc=0.1 * torch.randn(n, generator=generator),
        W_dec=rows,
        b_dec=torch.randn(d, generator=generator),
        b_in=0.1 * torch.randn(d, generator=generator),
        activation=Threshold(theta=theta) if jump else TopKActivation(k=5),
    )


def permuted(sae: Sae, perm: torch.Tensor) -> Sae:
    """The same dictionary whose latent `perm[u]` is the old latent `u`."""
    place = torch.argsort(perm)
    activation = sae.activation
    if isinstance(activation, Threshold):
        activation = Threshold(theta=activation.theta[place])
    return sae.replace(
        W_enc=sae.W_enc[place],
        b_enc=sae.b_enc[place],
        W_dec=sae.W_dec[place],
        activation=activation,
    )


@pytest.mark.parametrize("n_candidates", [None, 4])
@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_encode_permute_decode_with_a_planted_permutation_is_the_identity(
    objective, fold, n_candidates
) -> None:
    sae = random_sae(jump=True)
    perm = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(perm, torch.argsort(perm)), (
        "an involution would hide the wrong direction"
    )
    other = permuted(sae, perm)
    found = assign(sae, other, objective=objective, fold=fold, n_candidates=n_candidates)
    np.testing.assert_array_equal(found.target_of, perm.numpy())
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(4))
    z = sae.encode(x)
    assert (z > 0).any()
    torch.testing.assert_close(found.apply(z), other.encode(x))
    torch.testing.assert_close(other.decode(found.apply(z)), sae(x))
    gathered = other.decode(z[:, torch.from_numpy(found.target_of)])
    assert (gathered - sae(x)).norm() > 0.1 * sae(x).norm(), (
        "the inverse permutation must not do as well"
    )


def test_folding_changes_weights_and_not_the_function() -> None:
    sae = random_sae(jump=True)
    assert isinstance(sae.activation, Threshold)
    sae = sae.replace(
        activation=Threshold(
            theta=sae.activation.theta.clone().index_fill_(0, torch.tensor([2]), 0.0)
        )
    )
    x = torch.randn(50, 16)
    torch.testing.assert_close(folded(sae)(x), sae(x))
    assert folded(sae).activation.theta.tolist() == [0.0 if i == 2 else 1.0 for i in range(40)]
    topk = random_sae()
    assert folded(topk) is topk


@pytest.mark.parametrize("shapes", [(12, 12), (9, 14), (14, 9)])
def test_dense_assignment_is_the_best_of_all(shapes: tuple[int, int]) -> None:
    a, b = random_sae(shapes[0], seed=1), random_sae(shapes[1], seed=2)
    similarity = latent_rows(a, "full") @ latent_rows(b, "full").T
    found = assign(a, b, objective="full")
    kept = found.target_of != NOBODY
    assert len(set(found.target_of[kept])) == kept.sum() == min(shapes)
    total = float(similarity[np.flatnonzero(kept), found.target_of[kept]].sum())
    generator = np.random.default_rng(0)
    for _ in range(300):  # no swap of two partners, and no random assignment, is better
        rows = generator.permutation(shapes[0])[: min(shapes)]
        columns = generator.permutation(shapes[1])[: min(shapes)]
        assert float(similarity[rows, columns].sum()) <= total + 1e-5


@pytest.mark.parametrize("shapes", [(60, 60), (40, 70), (70, 40)])
def test_with_every_pair_a_candidate_the_sparse_solution_is_the_dense_one(
    shapes: tuple[int, int],
) -> None:
    a, b = random_sae(shapes[0], seed=1), random_sae(shapes[1], seed=2)
    dense, whole = assign(a, b), assign(a, b, n_candidates=70)
    similarity = (a.W_dec @ b.W_dec.T).numpy()

    def total(found: Assignment) -> float:
        kept = np.flatnonzero(found.target_of != NOBODY)
        return float(similarity[kept, found.target_of[kept]].sum())

    assert (whole.target_of != NOBODY).sum() == (dense.target_of != NOBODY).sum() == min(shapes)
    assert total(whole) == pytest.approx(total(dense), abs=1e-4)
    few = assign(a, b, n_candidates=8)
    assert len(set(few.source_of.tolist()) - {NOBODY}) == min(shapes)
    assert total(few) > 0.97 * total(dense)


def test_infeasible_candidates_still_give_a_permutation() -> None:
    """All sources prefer one target: with one candidate each no matching of the candidates
    exists."""
    a = random_sae(20, seed=1)
    rows = torch.nn.functional.normalize(a.W_dec.mean(0) + 0.01 * torch.randn(20, 16), dim=1)
    found = assign(a.replace(W_dec=rows), random_sae(20, seed=2), n_candidates=1)
    assert sorted(found.target_of.tolist()) == list(range(20))


@given(st.permutations(range(9)), st.permutations(range(9)))
@settings(max_examples=30, deadline=None)
def test_composition_is_application_one_after_the_other(first, second) -> None:
    one = Assignment(target_of=np.array([*first[:8], NOBODY]), n_targets=9)
    two = Assignment(target_of=np.array(second), n_targets=9)
    z = torch.arange(1.0, 10.0)[None]
    torch.testing.assert_close(one.then(two).apply(z), two.apply(one.apply(z)))
    back = Assignment(target_of=two.source_of, n_targets=9)
    torch.testing.assert_close(back.apply(two.apply(z)), z)


def test_what_cannot_be_assigned_is_explained() -> None:
    a, b = random_sae(d=16), random_sae(d=12)
    with pytest.raises(UserError, match="no common decoder space"):
        assign(a, b)
    with pytest.raises(UserError, match="needs candidates"):
        assign(a, a, n_candidates=0)
    with pytest.raises(UserError, match="do not follow"):
        assign(a, a).then(assign(random_sae(7), random_sae(7)))
    with pytest.raises(UserError, match="another width"):
        assign(a, a).apply(torch.zeros(3, 7))
