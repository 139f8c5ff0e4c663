"""Designs on a net of linear blocks, where every effect and every cost is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site
from steering.design import (
    Candidates,
    as_plan,
    candidates_of,
    dense,
    fitted,
    gradient_of,
    learned,
    likelihood,
    margin,
    select,
    shifts_of,
    sketch_of,
    words,
)
from steering.dose import NeutralText, measure, steered_log_probs
from steering.exports import added_vectors
from steering.hooks import applied
from steering.plan import Node, Plan
from steering.teacher_forced import log_likelihoods
from tests.steering.linear_net import LinearNet, sae_with

WIDTH, N_VOCAB = 6, 9
SITES = tuple(Site(layer, "resid_post") for layer in range(3))
ROWS = [(0, *(int(i) for i in torch.randint(1, N_VOCAB, (7,)))) for _ in range(8)]


@pytest.fixture(scope="module")
def net() -> LinearNet:
    torch.manual_seed(0)
    return LinearNet(
        torch.randn(N_VOCAB, WIDTH),
        [0.2 * torch.randn(WIDTH, WIDTH) for _ in SITES],
        0.7 * torch.randn(WIDTH, N_VOCAB),
    )


@pytest.fixture(scope="module")
def text(net) -> NeutralText:
    return NeutralText.prepare(net, ROWS)


@pytest.fixture(scope="module")
def saes() -> dict:
    generator = torch.Generator().manual_seed(5)
    return {site: sae_with(torch.randn(12, WIDTH, generator=generator)) for site in SITES}


def jacobian(net: LinearNet, site: Site) -> torch.Tensor:
    """What a shift of a site does to the logits."""
    carried = torch.eye(WIDTH)
    for layer in net.hf.base_model.layers[site.layer + 1 :]:
        carried = carried @ (torch.eye(WIDTH) + layer.weight)
    return carried @ net.hf.unembedding


def fisher(net: LinearNet, text: NeutralText, one: Site, other: Site) -> torch.Tensor:
    p = text.log_probs.exp()
    covariance = torch.diag(p.mean(0)) - p.T @ p / len(p)
    return jacobian(net, one) @ covariance @ jacobian(net, other).T


def test_the_sketch_is_the_fisher_matrix(net, text):
    sketch = sketch_of(net, text.batch, SITES, n_samples=1500)
    for a, one in enumerate(SITES):
        for b, other in enumerate(SITES):
            found = sketch.rows[:, a].T @ sketch.rows[:, b]
            exact = fisher(net, text, one, other)
            assert (found - exact).norm() < 0.1 * exact.norm(), (one, other)


def test_the_sketch_predicts_the_kl_of_a_small_push_over_several_layers(net, text, saes):
    sketch = sketch_of(net, text.batch, SITES, n_samples=1500)
    nodes = tuple(Node(at=f"L{site.layer}/{k}", scale=0.1) for k, site in enumerate(SITES))
    plan = Plan(nodes=nodes)
    predicted = sketch.kl(added_vectors(plan, saes))
    assert measure(net, saes, plan, text).kl == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize("what", ["words", "likelihood", "margin"])
def test_the_gradient_is_what_a_small_push_does(net, text, saes, what):
    weight = torch.arange(WIDTH).float()
    objective = {
        "words": words((2, 5), temperature=0.8),
        "likelihood": likelihood(),
        "margin": margin(SITES[-1], weight),
    }[what]

    def value() -> float:
        """An objective of the logits, without a graph."""
        if what == "likelihood":
            # the first prediction is made before any token that is pushed
            rows = log_likelihoods(net, ROWS, n_tokens=99)
            return sum(rows) / len(rows)
        h = net.hf.base_model(torch.tensor(ROWS))[:, 1:]
        if what == "margin":
            return float((h @ weight).mean())
        return float(((h @ net.hf.unembedding) / 0.8).softmax(-1)[..., [2, 5]].sum(-1).mean())

    found = gradient_of(net, text.batch, SITES, objective)
    for site in SITES:
        unit = saes[site].W_dec[3] / saes[site].W_dec[3].norm()
        changes = []
        for size in (1e-3, -1e-3):
            with applied(net, saes, Plan(nodes=(Node(at=f"{site.short}/3"),), strength=size)):
                changes.append(value())
        measured = (changes[0] - changes[1]) / 2e-3
        assert float(found[site] @ unit) == pytest.approx(measured, rel=0.02, abs=2e-4), site


def planted(n_rows: int = 400) -> Candidates:
    """Feature 0 has an effect and is dear, 1 and 2 are cheap and independent of each other, 3 is 1
    again; 4 works against."""
    generator = np.random.default_rng(0)
    a, b, c = np.linalg.qr(generator.standard_normal((n_rows, 3)))[0].T
    rows = np.stack([10 * a, b, c, b, a], axis=1)
    features = tuple(FeatureId(SITES[1], k) for k in range(5))
    return Candidates(features=features, effect=np.array([2.0, 1, 0.5, 0.9, -1]), rows=rows)


def test_the_best_plan_is_found_where_it_is_known():
    """Maximise e'w at w'Gw = 2: w is in the ratio e / cost² of independent features."""
    found = select(planted(), 3, shrinkage=0.0)
    assert [f.latent for f in found.features] == [1, 2, 0]
    expected = np.array([1, 0.5, 2 / 100])
    length = np.sqrt(expected[0] ** 2 + expected[1] ** 2 + (10 * expected[2]) ** 2)
    np.testing.assert_allclose(found.pushes, expected * np.sqrt(2) / length)
    assert found.effect == pytest.approx(np.sqrt(2 * (1 + 0.25 + 0.04)))
    assert found.effect_at(0.25) == pytest.approx(found.effect / 2)


def test_a_copy_and_a_feature_that_works_against_are_never_taken():
    found = select(planted(), 5, shrinkage=0.0)
    assert {f.latent for f in found.features} == {0, 1, 2}


def test_more_features_never_have_less_effect(net, text, saes):
    sketch = sketch_of(net, text.batch, SITES, n_samples=60)
    gradient = gradient_of(net, text.batch, SITES, words((2, 5)))
    candidates = candidates_of(gradient, sketch, saes)
    effects = [select(candidates, k, shrinkage=0.0).effect for k in (1, 2, 4)]
    assert effects == sorted(effects)
    best = candidates.per_root_kl.max() * np.sqrt(2)
    assert effects[0] == pytest.approx(best), "one feature: the best by effect per root of KL"
    vector, effect = dense(gradient, sketch, SITES[2])
    assert float(vector @ gradient[SITES[2]]) == pytest.approx(effect, rel=1e-4)
    own = select(candidates_of(gradient, sketch, saes, allowed=lambda f: f.site == SITES[2]), 1)
    assert effect > 0.9 * own.effect


def test_a_plan_has_the_dose_and_the_effect_that_were_predicted(net, text, saes):
    sketch = sketch_of(net, text.batch, SITES, n_samples=800)
    gradient = gradient_of(net, text.batch, SITES, words((2, 5), temperature=1.0))
    designed = select(candidates_of(gradient, sketch, saes), 3)
    plan = as_plan(designed, dict.fromkeys(SITES, 4.0), dose=0.002)
    dose = measure(net, saes, plan, text)
    assert dose.kl == pytest.approx(0.002, rel=0.15)
    before = text.log_probs[:, [2, 5]].exp().sum(-1).mean()
    after = steered_log_probs(net, saes, plan, text)[:, [2, 5]].exp().sum(-1).mean()
    assert float(after - before) == pytest.approx(designed.effect_at(0.002), rel=0.1)


def test_what_cannot_be_designed_is_said(net, text, saes):
    sketch = sketch_of(net, text.batch, SITES, n_samples=2)
    gradient = gradient_of(net, text.batch, SITES, words((2,)))
    with pytest.raises(UserError, match="no feature that may be pushed"):
        candidates_of(gradient, sketch, saes, allowed=lambda _: False)
    with pytest.raises(UserError, match="classifier's site"):
        gradient_of(net, text.batch, SITES, margin(Site(9, "resid_post"), torch.zeros(WIDTH)))


def directions_of(saes: dict) -> list:
    return [(site, saes[site].W_dec[k]) for site, k in zip(SITES, (0, 3, 5), strict=True)]


def best_by_the_exact_fisher_matrix(net, text, directions, site, weight) -> np.ndarray:
    """F⁻¹g of pushes along these directions, with nothing estimated."""
    exact = np.array(
        [[float(u @ fisher(net, text, a, b) @ v) for b, v in directions] for a, u in directions]
    )
    carried = {s: jacobian(net, s) @ torch.linalg.pinv(jacobian(net, site)) for s in SITES}
    effect = [float(u @ carried[s] @ weight) for s, u in directions]
    return np.linalg.solve(exact, np.array(effect))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_fitted_pushes_are_the_best_of_the_exact_fisher_matrix(net, text, saes):
    site, weight = SITES[-1], torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    directions = directions_of(saes)
    gradient = gradient_of(net, text.batch, SITES, margin(site, weight))
    sketch = sketch_of(net, text.batch, SITES, n_samples=1500)
    found = fitted(gradient, sketch, directions, shrinkage=0.0)
    exact = best_by_the_exact_fisher_matrix(net, text, directions, site, weight)
    assert cosine(found, exact) > 0.98
    assert min(found) < 0, "of either sign"
    assert sketch.kl(shifts_of(directions, found)) == pytest.approx(1.0, abs=1e-3)


def test_learned_pushes_reach_the_best_from_equal_ones(net, text, saes):
    """At a small dose the best is known; steps with real passes find it from a poor start."""
    site, weight = SITES[-1], torch.randn(WIDTH, generator=torch.Generator().manual_seed(3))
    directions = directions_of(saes)
    exact = best_by_the_exact_fisher_matrix(net, text, directions, site, weight)
    start = 0.1 * np.ones(3)
    found = learned(net, text.batch, directions, margin(site, weight), start, dose=0.01, n_steps=40)
    assert cosine(start, exact) < 0.9
    assert cosine(found, exact) > 0.98
    plan = Plan(
        nodes=tuple(
            Node(at=site.short, vector=site.short, scale=float(shift.norm()))
            for site, shift in shifts_of(directions, found).items()
        ),
        vectors={site.short: shift for site, shift in shifts_of(directions, found).items()},
    )
    assert measure(net, saes, plan, text).kl == pytest.approx(0.01, rel=0.1)
