"""Doses: KL by the definition, strengths that really give it, and doses that nothing gives."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from featureflow.errors import UserError
from steering.dose import NeutralText, calibrate, measure, solve_for_dose
from steering.edits import Add, Cap
from steering.hooks import applied
from steering.plan import Node, Plan
from steering.sequences import encoded

TEXTS = [
    "The weather was mild and the road was long.",
    "She read the letter twice.",
    "No one spoke.",
]


@pytest.fixture(scope="module")
def neutral(model):
    return NeutralText.prepare(model, TEXTS, n_tokens=16)


def test_kl_is_the_definition_token_by_token(model, saes, neutral):
    plan = Plan(nodes=(Node(at="L1/3", scale=3.0),))
    expected = []
    for text in TEXTS:
        ids = torch.tensor([encoded(model, text)[:16]])
        with torch.no_grad():
            base = model.hf(input_ids=ids).logits[0, 1:].double().softmax(-1)
            with applied(model, saes, plan):
                steered = model.hf(input_ids=ids).logits[0, 1:].double().softmax(-1)
        expected.append((steered * (steered / base).log()).sum(-1))
    found = measure(model, saes, plan, neutral)
    assert found.kl == pytest.approx(float(torch.cat(expected).mean()), rel=1e-3)


@pytest.mark.parametrize("at", ["L0/3", "L2/3", "L3/3"])
@pytest.mark.parametrize("edit", [Add(), Cap()])
def test_starting_at_the_first_edited_block_changes_no_bit(model, saes, neutral, at, edit):
    plan = Plan(nodes=(Node(at=at, scale=2.0), Node(at="L3/5", scale=2.0)), edit=edit)
    whole = measure(model, saes, plan, dataclasses.replace(neutral, blocks=()))
    assert len(neutral.blocks) == model.n_layers
    assert measure(model, saes, plan, neutral) == whole
    assert whole.kl > 0
    assert not any("forward" in vars(entry.block) for entry in model.blocks)


def test_strength_zero_has_dose_zero(model, saes, neutral):
    dose = measure(model, saes, Plan(nodes=(Node(at="L1/3"),), strength=0.0), neutral)
    assert dose.kl == 0
    assert dose.same_choice == 1
    assert dose.delta_ce == 0


def test_calibration_reaches_each_dose(model, saes, neutral):
    plan = Plan(nodes=(Node(at="L1/3"), Node(at="L2/4")), edit=Add())
    for result in calibrate(model, saes, plan, neutral, [0.01, 0.1, 0.5]):
        assert result.reached
        again = measure(model, saes, plan.with_strength(result.strength), neutral)
        assert abs(math.log(again.kl / result.target)) <= 0.05


def test_a_dose_that_no_strength_reaches_is_reported(model, saes, neutral):
    """A rotation ends at 90 degrees: its KL has a ceiling."""
    from steering.edits import Ablate

    plan = Plan(nodes=(Node(at="L3/3"),), edit=Ablate())
    (result,) = calibrate(model, saes, plan, neutral, [5.0])
    assert not result.reached
    assert result.measured.kl < 5


def test_a_plan_that_pushes_away_is_calibrated_pushing_away(model, saes, neutral):
    away = Plan(nodes=(Node(at="L1/3", scale=3.0),), strength=-1.0)
    towards = calibrate(model, saes, away.with_strength(1.0), neutral, [0.05])[0]
    (found,) = calibrate(model, saes, away, neutral, [0.05])
    assert found.reached
    assert found.strength < 0 < towards.strength
    assert measure(model, saes, away.with_strength(found.strength), neutral).kl == pytest.approx(
        0.05, rel=0.06
    )


def test_nonsense_doses_are_refused(model, saes, neutral):
    with pytest.raises(UserError, match="positive"):
        calibrate(model, saes, Plan(nodes=(Node(at="L1/3"),), edit=Cap()), neutral, [0.0])


@pytest.mark.parametrize("dose", [0.03, 0.3, 3.0])
@pytest.mark.parametrize(
    "curve",
    [lambda s: 0.02 * s**2, lambda s: 5 * s, lambda s: 4 * (1 - math.exp(-((s / 30) ** 2)))],
)
def test_the_solver_finds_known_curves_in_few_evaluations(dose, curve):
    calls = []

    def kl_at(strength):
        calls.append(strength)
        return curve(strength)

    strength, reached = solve_for_dose(
        kl_at, dose, guess=1.0, known={}, tolerance=0.05, max_evaluations=10, max_strength=1e4
    )
    assert reached
    assert curve(strength) == pytest.approx(dose, rel=0.06)
    assert len(calls) <= 8
