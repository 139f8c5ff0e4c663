"""Plans: the schedules' worked numbers, the paper's modes, and files that read back what was
written."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site, parse_feature
from steering.edits import Ablate, Add, Cap, Floor, Rotate
from steering.plan import Node, Plan
from steering.plan_files import read_plan, write_plan
from steering.schedules import Constant, CosineProduct, Exponential, Gaussian, Linear, weights
from steering.scopes import AfterToken, Everywhere, Positions, WhereActive

STEPS = [
    (parse_feature(f"L{layer}/{layer * 10}"), cosine)
    for layer, cosine in [(3, 1.0), (4, 0.9), (5, 0.4), (6, 0.8)]
]
SCALES = {feature: 2.0 for feature, _ in STEPS}


def test_worked_schedules():
    shape = {"layers": [3, 4, 5], "cosines": [1.0, 0.5, 0.8], "seed": 0, "budget": "none"}
    assert weights(Constant(), **shape) == [1, 1, 1]
    assert weights(Linear(end=0.5), **shape) == pytest.approx([1, 0.75, 0.5])
    assert weights(Exponential(rate=-0.05), **shape) == pytest.approx(
        [math.exp(-0.05 * layer) for layer in (3, 4, 5)]
    )
    assert weights(CosineProduct(), **shape) == pytest.approx([1, 0.5, 0.4])
    assert weights(CosineProduct(), **{**shape, "seed": 2}) == pytest.approx([0.4, 0.8, 1])
    assert weights(Gaussian(width=1.0), **shape) == pytest.approx([1, math.exp(-0.5), math.exp(-2)])


@given(
    st.sampled_from(
        [Constant(), Linear(end=0.2), Exponential(rate=-0.3), CosineProduct(), Gaussian(width=2.0)]
    ),
    st.integers(1, 12),
    st.data(),
)
def test_every_schedule_spends_one_budget(schedule, n, data):
    cosines = data.draw(st.lists(st.floats(0.1, 1), min_size=n, max_size=n))
    seed = data.draw(st.integers(0, n - 1))
    share = weights(schedule, layers=list(range(n)), cosines=cosines, seed=seed)
    assert sum(share) == pytest.approx(1)
    assert min(share) >= 0


def test_a_flow_is_cut_at_a_weak_link_on_the_seeds_side():
    plan = Plan.from_chain(STEPS, edit=Add(), scales=SCALES, seed=STEPS[0][0], minimum_cosine=0.5)
    assert [node.at for node in plan.nodes] == ["L3/30", "L4/40"]
    after = Plan.from_chain(STEPS, edit=Add(), scales=SCALES, seed=STEPS[3][0], minimum_cosine=0.5)
    assert [node.at for node in after.nodes] == ["L5/50", "L6/60"]


def test_pushes_share_a_sum_and_levels_share_a_peak():
    add = Plan.from_chain(STEPS, edit=Add(), scales=SCALES)
    floor = Plan.from_chain(STEPS, edit=Floor(), scales=SCALES)
    assert sum(node.weight for node in add.nodes) == pytest.approx(1)
    assert [node.weight for node in floor.nodes] == [1, 1, 1, 1]


def test_single_layer_and_cumulative_modes():
    plan = Plan.from_chain(STEPS, edit=Add(), scales=SCALES, schedule=Exponential(), budget="none")
    assert [node.at for node in plan.at_layer(5).nodes] == ["L5/50"]
    assert [node.at for node in plan.up_to_layer(5).nodes] == ["L3/30", "L4/40", "L5/50"]
    assert plan.at_layer(5).nodes[0].weight == pytest.approx(math.exp(-0.25))
    with pytest.raises(UserError, match="no node at layer 9"):
        plan.at_layer(9)


def test_all_problems_of_a_plan_come_together():
    nodes = (
        Node(at="L1/2", scale=0),
        Node(at="L1/2"),
        Node(at="L3"),
        Node(at="nowhere/4"),
        Node(at="L4", vector="v"),
    )
    with pytest.raises(UserError) as caught:
        Plan(nodes=nodes, strength=math.nan, edit=Ablate())
    text = str(caught.value)
    for word in (
        "scale must be positive",
        "same direction",
        "one direction",
        "nowhere",
        "no such vector",
        "finite",
        "bare",
    ):
        assert word in text, word


def test_two_rotations_at_one_site_are_refused():
    with pytest.raises(UserError, match="order"):
        Plan(nodes=(Node(at="L1/2"), Node(at="L1/3")), edit=Rotate())


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@st.composite
def plans(draw):
    numbers = st.floats(-100, 100, allow_nan=False)
    nodes = tuple(
        Node(
            at=str(FeatureId(Site(layer, "resid_post"), latent)),
            weight=draw(numbers),
            scale=draw(st.floats(1e-3, 1e3)),
            mean=draw(numbers),
            cosine=draw(st.none() | st.floats(-1, 1)),
        )
        for layer, latent in draw(
            st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, unique=True)
        )
    )
    return Plan(
        nodes=nodes,
        edit=draw(st.sampled_from([Add(), Add(keep_norm=True), Floor(), Cap()])),
        scope=draw(
            st.sampled_from(
                [Everywhere(), Positions(positions=(1, -2)), AfterToken(token=7), WhereActive()]
            )
        ),
        strength=draw(numbers),
        skip_first=draw(st.integers(0, 3)),
        dose=draw(st.none() | st.floats(0, 4)),
        name=draw(names),
        note=draw(names),
        digests=draw(st.dictionaries(names.filter(bool), names, max_size=3)),
    )


@given(plans(), st.sampled_from([".toml", ".json", ".safetensors"]))
def test_a_plan_reads_back_as_it_was(tmp_path_factory, plan, suffix):
    path = write_plan(plan, tmp_path_factory.mktemp("plan") / f"plan{suffix}")
    again = read_plan(path)
    for name in (
        "nodes",
        "edit",
        "scope",
        "strength",
        "skip_first",
        "dose",
        "name",
        "note",
        "digests",
    ):
        assert getattr(again, name) == getattr(plan, name), name


@pytest.mark.parametrize("suffix", [".toml", ".json", ".safetensors"])
def test_vectors_travel_with_the_plan(tmp_path, suffix):
    vector = torch.arange(6.0)
    plan = Plan(nodes=(Node(at="L1", vector="v"),), vectors={"v": vector})
    again = read_plan(write_plan(plan, tmp_path / f"p{suffix}"))
    assert torch.equal(again.vectors["v"], vector)


def test_a_bad_file_is_explained_with_every_problem(tmp_path):
    path = tmp_path / "p.toml"
    head = 'schema = 1\nstrength = "much"\nspeed = 3\n'
    path.write_text(
        head + '[edit]\nkind = "ad"\n[scope]\nkind = "first"\n[[nodes]]\nat = "L1/2"\nwight = 2\n'
    )
    with pytest.raises(UserError) as caught:
        read_plan(path)
    text = str(caught.value)
    for word in ("strength", "speed", "edit", "scope", "wight"):
        assert word in text, word


def test_an_unknown_key_of_an_edit_is_one_problem_of_that_edit_alone(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(
        '{"schema": 1, "nodes": [{"at": "L1/3"}], "strength": 1.0,'
        ' "scope": {"kind": "first", "n": 2},'
        ' "edit": {"kind": "add", "keep_nrom": true}}'
    )
    with pytest.raises(UserError) as refused:
        read_plan(path)
    (problem,) = refused.value.problems
    assert problem.where == "plan.edit.keep_nrom"


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    for name, content in (
        ("a.toml", "= 3"),
        ("b.json", "[1, 2"),
        ("c.safetensors", "junk"),
        ("d.json", "[]"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError):
            read_plan(tmp_path / name)
    with pytest.raises(UserError, match="no such plan"):
        read_plan(tmp_path / "missing.toml")
    with pytest.raises(UserError, match="ends in"):
        read_plan(tmp_path / "plan.pickle")
