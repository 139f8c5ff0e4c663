"""Removal on a net whose truth is planted. A token with the concept has a feature of size 1 along
d, and keeps a copy along e that the SAEs do not see. Every block doubles the feature and adds half
the copy to it: a ← 2a + c/2. So what is left after every edit is arithmetic:

    as it was            1    2.5  5.5  11.5
    removed at layer 0   0    0.5  1.5   3.5
    removed everywhere   0    0.5  0.5   0.5   (as it arrives)
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site
from steering.arms import Flow
from steering.edits import Ablate
from steering.removal import (
    Reader,
    along_whole_flow,
    measure_removal,
    removal_arms,
    unchanged_by_blocks,
)
from tests.steering.linear_net import LinearNet, sae_with

SITES = tuple(Site(layer, "resid_post") for layer in range(4))
FLOW = Flow(seed=FeatureId(SITES[0], 0), steps=tuple((FeatureId(s, 0), 1.0) for s in SITES))
CONTROL = Flow(seed=FeatureId(SITES[0], 1), steps=tuple((FeatureId(s, 1), 1.0) for s in SITES))
WITH, WITHOUT = 1, 2
CONTEXTS = [[0, WITHOUT, WITH, WITHOUT, WITH, WITHOUT], [0, WITHOUT, WITHOUT, WITHOUT]]


@pytest.fixture(scope="module")
def net() -> LinearNet:
    d, e = torch.eye(4)[0], torch.eye(4)[1]
    embedding = torch.zeros(3, 4)
    embedding[WITH] = 0.25 * d + 1.0 * e
    # the first block brings a to 1, later ones do a ← 2a + c/2
    first = torch.outer(d, d) + 0.5 * torch.outer(e, d)
    blocks = [first, *[torch.outer(d, d) + 0.5 * torch.outer(e, d)] * 3]
    return LinearNet(embedding, blocks, torch.eye(4))


@pytest.fixture(scope="module")
def saes() -> dict:
    rows = torch.eye(4)[[0, 2]]
    return {site: sae_with(rows) for site in SITES}


def readers() -> list[Reader]:
    """The feature's size, and 3 where there is none."""
    return [
        Reader(name=f"probe {site.layer}", site=site, read=lambda h: h[:, 0] + 3) for site in SITES
    ]


def measured(net, saes, plans) -> tuple[dict, dict]:
    left, effects = measure_removal(net, saes, plans, FLOW.seed, CONTEXTS, readers(), words=(0,))
    return (
        {(each.arm, each.reader): each for each in left},
        {(each.arm, each.where): each for each in effects},
    )


def test_one_layer_comes_back_and_the_whole_flow_does_not(net, saes):
    plans = {
        "single": along_whole_flow(Flow.of_one(FLOW.seed)),
        "flow": along_whole_flow(FLOW),
        "every third": along_whole_flow(FLOW, every=3),
    }
    left, _ = measured(net, saes, plans)

    def at(arm: str) -> list[float]:
        return [left[arm, f"probe {layer}"].left for layer in range(4)]

    assert at("single") == pytest.approx([1, 0.5 / 2.5, 1.5 / 5.5, 3.5 / 11.5])
    assert at("flow") == pytest.approx([1, 0.5 / 2.5, 0.5 / 5.5, 0.5 / 11.5])
    assert at("every third") == at("single"), "the first edit after layer 0 is at layer 3"
    assert left["flow", "probe 3"].n == 2
    assert left["flow", "probe 3"].auroc == 1


def test_without_the_model_the_edit_is_passed_on_as_it_is(net, saes):
    """Of 11.5 at the last layer the edit of layer 0 takes 1 away, and then 1.5, 3 more."""
    plans = {"single": along_whole_flow(Flow.of_one(FLOW.seed)), "flow": along_whole_flow(FLOW)}
    left, _ = measured(net, saes, plans)
    single, flow = (
        [left[f"{arm}, without the model", f"probe {layer}"].left for layer in range(4)]
        for arm in plans
    )
    assert single == pytest.approx([1, 1.5 / 2.5, 4.5 / 5.5, 10.5 / 11.5])
    assert flow == pytest.approx([1, 1.5 / 2.5, 3.0 / 5.5, 6.0 / 11.5])


def test_side_effects_are_counted_by_kind_of_token(net, saes):
    """The feature is active on two tokens; before them one token is silent, after them two, and
    three in the other context. Nothing is active on silent tokens, so nothing changes there."""
    _, effects = measured(net, saes, {"flow": along_whole_flow(FLOW)})
    assert {
        where: effects["flow", where].n for where in ("active", "before", "later", "other")
    } == {"active": 2, "before": 1, "later": 2, "other": 3}
    assert effects["flow", "active"].kl > 1
    assert effects["flow", "active"].rise != 0
    for where in ("before", "later", "other"):
        assert effects["flow", where].kl == 0


def test_every_arm_runs_and_over_subtraction_turns_the_sign(net, saes):
    means = dict.fromkeys(SITES, 0.0)
    left, effects = measured(net, saes, removal_arms(FLOW, CONTROL, means))
    assert left["over-subtracted, r -1", "probe 1"].left == pytest.approx((-2 + 0.5) / 2.5)
    assert left["random flow", "probe 3"].left == pytest.approx(1)
    assert left["projected", "probe 3"].left == pytest.approx(0.5 / 11.5)
    words = left["flow", "words"]
    assert words.edited < words.as_it_was
    assert effects["random flow", "active"].kl == 0


def test_an_arm_gated_by_the_feature_leaves_other_tokens_alone(net, saes):
    arms = removal_arms(FLOW, CONTROL, dict.fromkeys(SITES, 0.0))
    left, _ = measured(net, saes, {"gated": arms["flow where active"]})
    assert left["gated", "probe 3"].left == pytest.approx(0.5 / 11.5)


def test_a_projection_gated_by_the_feature_leaves_other_tokens_alone(net, saes):
    """A projection to a wrong mean changes silent tokens, unless it acts on active ones only."""
    arms = removal_arms(FLOW, CONTROL, dict.fromkeys(SITES, 1.0))
    plans = {name: arms[name] for name in ("projected", "projected where active")}
    _, effects = measured(net, saes, plans)
    assert effects["projected where active", "active"].kl > 0
    for where in ("before", "later", "other"):
        assert effects["projected", where].kl > 0
        assert effects["projected where active", where].kl == 0


def test_every_n_th_step_and_its_errors(net, saes):
    assert [node.at for node in along_whole_flow(FLOW, every=3).nodes] == ["L0/0", "L3/0"]
    assert isinstance(along_whole_flow(FLOW).edit, Ablate)
    with pytest.raises(UserError, match="every n-th"):
        along_whole_flow(FLOW, every=0)
    silent = FeatureId(SITES[0], 1)
    with pytest.raises(UserError, match="never active"):
        measure_removal(net, saes, {}, silent, CONTEXTS, readers())


def test_a_reader_that_sees_no_difference_has_nothing_left_to_say(net, saes):
    blind = Reader(name="blind 3", site=SITES[3], read=lambda h: 0 * h[:, 0])
    plans = {"flow": along_whole_flow(FLOW)}
    left, _ = measure_removal(net, saes, plans, FLOW.seed, CONTEXTS, [blind])
    assert all(np.isnan(each.left) and each.auroc == 0.5 for each in left)


def test_the_stream_without_edits_is_the_stream(net, saes):
    clean = {site: torch.ones(2, 4) for site in SITES}
    plan = along_whole_flow(FLOW).with_strength(0.0)
    passed_on = unchanged_by_blocks(saes, plan, clean)
    assert all(torch.equal(passed_on[site], clean[site]) for site in SITES)
