"""Choosing features and a dose to steer with: where a direction points, what a screening finds, on
which prompts."""

from __future__ import annotations

import pytest
import torch

from data.concepts.prompts import read_prompts
from data.model.language_model import LanguageModel, Random
from featureflow.sites import FeatureId, Site
from pipeline.lenses.steering.screening import (
    N_REPORTABLE,
    Candidate,
    DoseTrial,
    Screening,
    ScreeningOptions,
    chosen_dose,
    prompt_split,
    screened,
    tried_doses,
)
from pipeline.lenses.steering.selection import SelectionOptions, reach
from sae import Relu, Sae
from steering.arms import Flow, Scales, along_flow
from steering.features import Profile
from steering.generation import Sampling
from steering.reading import CoherenceLimits, Reading, is_coherent, limits_passing
from steering.schedules import Constant
from tests.steering.conftest import steering_of

SITES = [Site(layer, "resid_post") for layer in range(3)]
ANY_TEXT = CoherenceLimits(nll_low=0.0, nll_high=100.0, repetition_high=1.0, squeeze_low=0.0)
OPTIONS = ScreeningOptions(
    prompts=read_prompts().dev[:8],
    limits=ANY_TEXT,
    dose=0.5,
    schedule=Constant(),
    sampling=Sampling(n_tokens=12),
    seed=0,
)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.open(
        Random(n_layers=3, d_model=32, n_heads=2, d_mlp=64, seed=3), dtype="float32"
    )


@pytest.fixture(scope="module")
def saes(model) -> dict[Site, Sae]:
    """Latent k writes what makes token 40 + k likely; the last latent writes against all of
    them."""
    unembedding, gain = (tensor.float() for tensor in model.unembedding())
    rows = (unembedding[40:46] - unembedding.mean(0)) * gain
    rows = torch.cat([rows, -rows.sum(0, keepdim=True)])
    rows = rows / rows.norm(dim=-1, keepdim=True)
    zeros = torch.zeros(model.d_model)
    sae = Sae(
        W_enc=rows.clone(),
        b_enc=torch.zeros(7),
        W_dec=rows,
        b_dec=zeros,
        b_in=zeros,
        activation=Relu(),
    )
    return dict.fromkeys(SITES, sae)


def profile(latent: int, token: int) -> Profile:
    return Profile(
        feature=FeatureId(SITES[1], latent),
        density=0.01,
        strong=1.0,
        top_tokens=(token,),
        purity=1.0,
    )


def test_reach_is_far_for_the_token_that_the_direction_writes_and_negative_against_it(model, saes):
    options = SelectionOptions(
        n_features=1,
        features=(),
        max_density=0.1,
        min_persistence=1,
        n_before=1,
        n_after=1,
        n_rows=64,
        seed=0,
    )
    profiles = [profile(0, 40), profile(1, 400), profile(6, 40)]
    found = reach(steering_of(model, saes, [1.0] * 3), profiles, options)
    own, other, against = (found[p.feature] for p in profiles)
    assert own > 2 > abs(other)
    assert against < 0


def test_the_screening_finds_who_writes_its_top_tokens(model, saes):
    flows = [
        Flow(seed=FeatureId(SITES[1], k), steps=tuple((FeatureId(s, k), 1.0) for s in SITES))
        for k in (0, 6)
    ]
    found = screened(
        steering_of(model, saes, [1.0] * 3), [(flow, frozenset({40})) for flow in flows], OPTIONS
    )
    assert found[0].steered > found[0].unsteered + 3
    assert found[1].steered <= found[1].unsteered + 1
    assert found[0].unsteered == found[1].unsteered
    assert found[0].merit > found[1].merit


def test_incoherent_text_loses_whatever_it_writes():
    loud, quiet = (
        Screening(unsteered=0.0, steered=s, coherent=c) for s, c in ((50.0, 0.25), (1.0, 0.75))
    )
    assert quiet.merit > loud.merit


def test_no_prompt_is_used_for_two_things_and_none_that_was_read_before_is_reported_on():
    split = prompt_split(20, seed=5)
    parts = [split.screening, split.dose, split.ordinary, split.report]
    assert len({prompt for part in parts for prompt in part}) == sum(map(len, parts))
    chosen_on = {*split.screening, *split.dose, *split.ordinary}
    assert chosen_on == set(read_prompts().dev)
    assert set(split.report) <= set(read_prompts().test[6:])
    assert len(split.report) == 20
    assert split == prompt_split(20, seed=5)
    assert split.report != prompt_split(20, seed=6).report
    assert len(prompt_split(N_REPORTABLE, 0).report) == len(read_prompts().test) - 6


def test_a_dose_that_breaks_text_is_not_chosen_and_the_smallest_is_where_all_do():
    def trials(*coherent: float) -> list[DoseTrial]:
        doses = (0.3, 0.1, 0.2)
        pairs = zip(doses, coherent, strict=True)
        return [DoseTrial(dose=d, unsteered=1.0, steered=1 + 10 * d, coherent=c) for d, c in pairs]

    assert chosen_dose(trials(0.6, 0.9, 0.7)) == 0.3
    assert chosen_dose(trials(0.4, 0.9, 0.7)) == 0.2
    assert chosen_dose(trials(0.4, 0.3, 0.2)) == 0.1
    same = [DoseTrial(dose=d, unsteered=1.0, steered=2.0, coherent=1.0) for d in (0.3, 0.1)]
    assert chosen_dose(same) == 0.1


def test_a_larger_dose_makes_the_feature_write_more_of_its_top_tokens(model, saes):
    flow = Flow(seed=FeatureId(SITES[1], 0), steps=tuple((FeatureId(s, 0), 1.0) for s in SITES))
    scales = Scales(
        norms=dict.fromkeys(SITES, 6.0), activations={feature: 1.0 for feature, _ in flow.steps}
    )
    candidates = [
        Candidate(dose=d, plan=along_flow(flow, scales, strength=d), top_tokens=frozenset({40}))
        for d in (3.0, 0.05)
    ]
    trials = tried_doses(
        steering_of(model, saes, [1.0] * 3),
        candidates,
        prompt_split(1, 0),
        ANY_TEXT,
        sampling=Sampling(n_tokens=12),
        seed=0,
        batch_size=48,
    )
    assert [trial.dose for trial in trials] == [0.05, 3.0]
    assert trials[1].steered > trials[0].steered + 3
    assert trials[0].unsteered == trials[1].unsteered < trials[1].steered
    assert {trial.coherent for trial in trials} == {1.0}


def test_nine_of_ten_ordinary_texts_keep_the_limits_made_from_them():
    generator = torch.Generator().manual_seed(0)
    n = 200
    nll, repetition, squeeze = torch.rand(3, n, generator=generator).tolist()
    readings = [
        Reading(
            nll=a, activation=(), active=(), top_tokens=(), repetition=b, squeeze=c, n_tokens=20
        )
        for a, b, c in zip(nll, repetition, squeeze, strict=True)
    ]
    limits = limits_passing(readings, share=0.9)
    kept = sum(is_coherent(reading, limits) for reading in readings)
    assert 0.9 * n <= kept <= 0.93 * n
    assert limits.nll_high < max(nll)
