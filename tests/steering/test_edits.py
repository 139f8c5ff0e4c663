"""Worked numbers for every edit, and the algebra that holds for all values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steering.edits import (
    Ablate,
    Cap,
    Clamp,
    Floor,
    MeanAblate,
    NodeValues,
    ProjectOut,
    Rescale,
    rotated,
)

FEATURE_EDITS = (Clamp(), Floor(), Cap(), Rescale(), Rescale(amplify=True), Ablate(), MeanAblate())


def values(s, m=4.0, mean=1.0):
    return NodeValues(
        strength=torch.tensor([s]), scale=torch.tensor([m]), mean=torch.tensor([mean])
    )


@pytest.mark.parametrize(
    ("edit", "strength", "expected"),
    [
        (Clamp(), 0.5, [2.0, 2.0, 2.0]),
        (Floor(), 0.5, [2.0, 2.0, 6.0]),
        (Cap(), 0.5, [0.0, 1.0, 2.0]),
        (Cap(), 1.0, [0.0, 0.0, 0.0]),
        (Cap(), 2.0, [0.0, -4.0, -4.0]),
        (Rescale(), 1.0, [0.0, 0.0, 0.0]),
        (Rescale(), 3.0, [0.0, -2.0, -12.0]),
        (Rescale(amplify=True), 1.0, [0.0, 2.0, 12.0]),
        (Ablate(), 5.0, [0.0, 0.0, 0.0]),
        (MeanAblate(), 1.0, [1.0, 1.0, 1.0]),
    ],
    ids=repr,
)
def test_worked_numbers(edit, strength, expected):
    a = torch.tensor([[0.0], [1.0], [6.0]])
    assert edit.new_activation(a, values(strength)).squeeze(1).tolist() == expected


@given(st.sampled_from(FEATURE_EDITS), st.floats(0, 50, width=32))
def test_strength_zero_changes_nothing(edit, activation):
    a, rows = torch.tensor([[activation]]), torch.ones(1, 1)
    assert edit.coefficients(rows, a, rows, values(0.0)) == 0


@given(st.floats(0, 50, width=32), st.floats(0, 5, width=32))
def test_floor_never_lowers_and_cap_never_raises(activation, strength):
    a = torch.tensor([[activation]])
    assert Floor().new_activation(a, values(strength)) >= a
    assert Cap().new_activation(a, values(strength)) <= a


@given(st.floats(0, 50, width=32), st.floats(0, 3, width=32))
def test_floor_and_cap_are_idempotent(activation, strength):
    for edit in (Floor(), Cap()):
        once = edit.new_activation(torch.tensor([[activation]]), values(strength))
        again = edit.new_activation(once, values(strength))
        assert torch.equal(once, again) or (isinstance(edit, Cap) and float(once) < 0)


def test_projecting_out_two_oblique_directions_leaves_neither():
    generator = torch.Generator().manual_seed(1)
    h, rows = torch.randn(7, 5, generator=generator), torch.randn(2, 5, generator=generator)
    numbers = NodeValues(strength=torch.ones(2), scale=torch.ones(2), mean=torch.zeros(2))
    left = h + ProjectOut().coefficients(h, None, rows, numbers) @ rows
    assert (left @ rows.T).abs().max() < 1e-5


def test_a_rotation_keeps_the_norm_and_turns_by_its_angle():
    h, row = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([0.0, 5.0])
    turned = rotated(h, row, 1 / 3)
    torch.testing.assert_close(turned.norm(dim=-1), h.norm(dim=-1))
    assert float(turned[0, 1] / turned[0].norm()) == pytest.approx(math.sin(math.pi / 6), rel=1e-5)
    assert torch.equal(turned[1], h[1])
