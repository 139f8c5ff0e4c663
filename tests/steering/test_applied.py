"""What a steered forward pass computes, against hand-made hooks; where it must not change anything,
to the bit."""

from __future__ import annotations

import warnings

import pytest
import torch

from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site
from steering.edits import Ablate, Add, Cap, Clamp, Floor, MeanAblate, ProjectOut, Rescale, Rotate
from steering.hooks import NothingTouched, RowPlan, applied
from steering.plan import Node, Plan
from steering.scopes import (
    AfterToken,
    Everywhere,
    FirstTokens,
    Generated,
    InPrompt,
    Positions,
    WhereActive,
)

IDS = torch.tensor([[5, 9, 11, 9, 30, 7], [8, 2, 40, 41, 3, 6]])
L1, L2 = Site(1, "resid_post"), Site(2, "resid_post")
EDITS = (
    Add(),
    Add(keep_norm=True),
    Clamp(),
    Floor(),
    Cap(),
    Rescale(),
    Ablate(),
    MeanAblate(),
    ProjectOut(),
    Rotate(),
)


def plan_of(edit, *, strength=1.0, scope=None, at=("L1/3",), **rest):
    nodes = tuple(Node(at=name, scale=2.0, weight=0.5, mean=0.3) for name in at)
    return Plan(nodes=nodes, edit=edit, scope=scope or Everywhere(), strength=strength, **rest)


def logits(model, ids=IDS, **kwargs):
    with torch.no_grad():
        return model.hf(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("edit", EDITS, ids=repr)
def test_strength_zero_changes_nothing_to_the_bit(model, saes, edit):
    plain = logits(model)
    with applied(model, saes, plan_of(edit, strength=0.0)):
        assert torch.equal(logits(model), plain)


def test_clamping_to_the_present_value_changes_nothing_to_the_bit(model, saes):
    ids = IDS[:1, :3]
    with model.recorded([L1]) as seen:
        plain = logits(model, ids)
    latent = int(saes[L1].encode(seen[L1][0, 2]).argmax())
    present = float(saes[L1].encode_selected(seen[L1].reshape(3, -1), [latent])[2])
    assert present > 0
    node = Node(at=f"L1/{latent}", scale=present)
    with applied(
        model, saes, Plan(nodes=(node,), edit=Clamp(), scope=Positions(positions=(2,)))
    ) as run:
        assert torch.equal(logits(model, ids), plain)
    assert run.report().n_touched() == 0


def test_adding_equals_a_hook_written_by_hand(model, saes):
    def by_hand(module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        hidden[:, 1:] += 1.5 * 0.5 * 2.0 * saes[L1].W_dec[3]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = model.hf.base_model.layers[1].register_forward_hook(by_hand)
    expected = logits(model)
    handle.remove()
    with applied(model, saes, plan_of(Add(), strength=1.5)):
        torch.testing.assert_close(logits(model), expected)


def test_a_feature_edit_keeps_the_error_term(model, saes):
    """h + (a' − a) d equals decode(a') + (h − decode(a)), the form of AxBench."""
    with model.recorded([L1]) as seen:
        logits(model)
    h = seen[L1]
    a = saes[L1].encode(h)
    wanted = a.clone()
    wanted[..., 3] = 2.0 * 0.5 * 3
    expected = saes[L1].decode(wanted) + (h - saes[L1].decode(a))
    with (
        applied(model, saes, plan_of(Clamp(), strength=3.0, skip_first=0)),
        model.recorded([L1]) as steered,
    ):
        logits(model)
    torch.testing.assert_close(steered[L1], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        (Everywhere(), [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]),
        (FirstTokens(n=3), [[1, 2], [1, 2]]),
        (Positions(positions=(2, -1)), [[2, 5], [2, 5]]),
        (AfterToken(token=9), [[2, 3, 4, 5], []]),
        (InPrompt(), [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]),
    ],
    ids=repr,
)
def test_a_scope_touches_exactly_its_tokens(model, saes, scope, expected):
    with model.recorded([L1]) as plain:
        logits(model)
    with applied(model, saes, plan_of(Add(), scope=scope)) as run, model.recorded([L1]) as steered:
        logits(model)
    changed = (plain[L1] != steered[L1]).any(-1)
    assert [row.nonzero().squeeze(1).tolist() for row in changed] == expected
    assert run.report().n_touched() == sum(map(len, expected))


def test_left_padding_moves_no_scope(model, saes):
    short = IDS[:1, :4]
    padded = torch.cat([torch.zeros(1, 2, dtype=torch.long), short], 1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    place = torch.tensor([[0, 0, 0, 1, 2, 3]])
    for scope in (
        Everywhere(),
        FirstTokens(n=2),
        Positions(positions=(1, -1)),
        AfterToken(token=9),
    ):
        with applied(model, saes, plan_of(Add(), scope=scope)) as alone:
            single = logits(model, short)
        with applied(model, saes, plan_of(Add(), scope=scope)) as padding:
            both = logits(model, padded, attention_mask=mask, position_ids=place)
        torch.testing.assert_close(both[:, 2:], single, atol=1e-5, rtol=1e-4)
        assert alone.report().n_touched() == padding.report().n_touched() > 0


SCOPES = (
    Everywhere(),
    InPrompt(),
    Generated(),
    Positions(positions=(1, -1, 4)),
    FirstTokens(n=4),
    AfterToken(token=9),
    WhereActive(),
    WhereActive(feature="L1/5"),
)


@pytest.mark.parametrize("scope", SCOPES, ids=repr)
@pytest.mark.parametrize("edit", [Add(), Floor(), Rescale()], ids=repr)
def test_with_a_cache_equals_without(model, saes, scope, edit):
    plan = plan_of(edit, strength=2.0, scope=scope, at=("L2/3", "L2/7"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NothingTouched)
        with applied(model, saes, plan) as whole:
            whole.expect_prompt(3)
            expected = logits(model)
        with applied(model, saes, plan) as stepwise:
            out = model.hf(input_ids=IDS[:, :3], use_cache=True)
            pieces = [out.logits]
            for column in range(3, IDS.shape[1]):
                out = model.hf(
                    input_ids=IDS[:, column : column + 1], past_key_values=out.past_key_values
                )
                pieces.append(out.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=1e-4, rtol=1e-4)
    assert whole.report().n_touched() == stepwise.report().n_touched()


def test_each_plan_keeps_to_its_rows(model, saes):
    plain = logits(model)
    with applied(model, saes, RowPlan(plan=plan_of(Add(), strength=4.0), rows=(1,))):
        mixed = logits(model)
    with applied(model, saes, plan_of(Add(), strength=4.0)):
        steered = logits(model)
    torch.testing.assert_close(mixed[0], plain[0])
    torch.testing.assert_close(mixed[1], steered[1])


def test_hooks_are_gone_after_an_exception(model, saes):
    plain = logits(model)
    with pytest.raises(RuntimeError, match="stop"), applied(model, saes, plan_of(Add())):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), plain)
    assert not model.hf.base_model._forward_pre_hooks


def test_a_scope_that_matches_nothing_is_said_loudly(model, saes):
    with (
        pytest.warns(NothingTouched, match="touched no token"),
        applied(model, saes, plan_of(Add(), scope=AfterToken(token=999))),
    ):
        logits(model)


def test_the_report_gives_the_realised_size(model, saes):
    with model.recorded([L1]) as seen:
        logits(model)
    with applied(model, saes, plan_of(Add(), strength=1.0), monitor=True) as run:
        logits(model)
    node = run.report().nodes[0]
    norms = seen[L1][:, 1:].norm(dim=-1)
    assert node.relative_size == pytest.approx(float((1.0 / norms).mean()), rel=1e-4)
    assert node.mean_before == pytest.approx(
        float(saes[L1].encode(seen[L1])[:, 1:, 3].mean()), rel=1e-4
    )
    assert (node.n_seen, node.n_touched) == (10, 10)


def test_the_floor_adds_only_what_is_missing(model, saes):
    """Flow, closed loop: after the edit the feature stands at its floor or where it was, never
    above because of it."""
    with model.recorded([L1]) as seen:
        logits(model)
    a = saes[L1].encode(seen[L1])[..., 3]
    plan = plan_of(Floor(), strength=1.0, skip_first=0)
    with applied(model, saes, plan), model.recorded([L1]) as steered:
        logits(model)
    row = saes[L1].W_dec[3]
    moved = ((steered[L1] - seen[L1]) @ row).clamp(min=0)
    torch.testing.assert_close(moved, (1.0 - a).clamp(min=0), atol=1e-5, rtol=1e-4)


def test_every_misfit_is_reported_at_once(model, saes):
    nodes = (Node(at="L9/1"), Node(at="L1/99"), Node(at="L1.mlp/2"))
    with (
        pytest.raises(UserError) as caught,
        applied(model, saes, Plan(nodes=nodes, model="another")),
    ):
        pass
    text = str(caught.value)
    assert all(word in text for word in ("L9/1", "L1/99", "L1.mlp/2", "another model"))


@pytest.mark.parametrize(
    ("at", "gate"), [("L1.attn", "L1/5"), ("L1.attn", "L1.mlp/5"), ("L1.mlp", "L1/5")]
)
def test_a_condition_that_is_computed_after_the_edit_is_refused(model, saes, at, gate):
    """Also inside a layer: at the edit it would be that of the pass before, or none."""
    everywhere = {**saes, **{Site(1, kind): saes[L1] for kind in ("mlp_out", "attn_out")}}
    plan = Plan(nodes=(Node(at=f"{at}/3"),), scope=WhereActive(feature=gate))
    with (
        pytest.raises(UserError, match="lies after an edited site"),
        applied(model, everywhere, plan),
    ):
        pass
    turned = Plan(nodes=(Node(at="L1/3"),), scope=WhereActive(feature=f"{at}/5"))
    with applied(model, everywhere, turned):
        logits(model)


def test_a_cache_filled_before_steering_is_refused(model, saes):
    out = model.hf(input_ids=IDS[:, :3], use_cache=True)
    with pytest.raises(UserError, match="before steering"), applied(model, saes, plan_of(Add())):
        model.hf(input_ids=IDS[:, 3:4], past_key_values=out.past_key_values)


def test_vectors_and_borrowed_directions_are_added_where_they_are_put(model, saes):
    vector = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    nodes = (Node(at="L2", vector="v"), Node(at="L2", direction_of="L1/4", scale=3.0))
    plan = Plan(nodes=nodes, vectors={"v": vector}, skip_first=0)
    with model.recorded([L2]) as plain:
        logits(model)
    with applied(model, saes, plan), model.recorded([L2]) as steered:
        logits(model)
    push = vector / vector.norm() + 3.0 * saes[L1].W_dec[4]
    torch.testing.assert_close(steered[L2], plain[L2] + push, atol=1e-5, rtol=1e-4)
    assert FeatureId(L1, 4) == nodes[1].feature
