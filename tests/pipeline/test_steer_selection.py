"""Choosing features to steer with: where a direction points, and what an audition hears."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from data.language_model import LanguageModel, Random
from data.sites import FeatureId, Site
from pipeline.steer_audition import Audition, AuditionOptions, auditioned
from pipeline.steer_selection import SelectionOptions, Sources, reach
from sae import Relu, Sae
from steering.arms import Flow
from steering.generation import Sampling
from steering.profile import Profile
from steering.schedules import Constant

SITES = [Site(layer, "resid_post") for layer in range(3)]
OPTIONS = AuditionOptions(dose=0.5, schedule=Constant(), sampling=Sampling(n_tokens=12), seed=0)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.open(Random(n_layers=3, d_model=32, n_heads=2, d_mlp=64, seed=3), dtype="float32")


@pytest.fixture(scope="module")
def saes(model) -> dict[Site, Sae]:
    """Latent k writes what makes token 40 + k likely; the last latent writes against all of them."""
    unembedding, gain = (tensor.float() for tensor in model.unembedding())
    rows = (unembedding[40:46] - unembedding.mean(0)) * gain
    rows = torch.cat([rows, -rows.sum(0, keepdim=True)])
    rows = rows / rows.norm(dim=-1, keepdim=True)
    zeros = torch.zeros(model.d_model)
    sae = Sae(W_enc=rows.clone(), b_enc=torch.zeros(7), W_dec=rows, b_dec=zeros, b_in=zeros, activation=Relu())
    return dict.fromkeys(SITES, sae)


class Chains:
    """A graph in which every feature goes on as the latent of its number."""

    def chain(self, feature):
        return [
            dataclasses.make_dataclass("Step", ["feature", "cosine"])(FeatureId(s, feature.latent), 1.0) for s in SITES
        ]


def profile(latent: int, token: int) -> Profile:
    return Profile(feature=FeatureId(SITES[1], latent), density=0.01, strong=1.0, own_tokens=(token,), purity=1.0)


def test_reach_is_far_for_the_token_that_the_direction_writes_and_negative_against_it(model, saes):
    sources = Sources(graph=Chains(), store=None, saes=saes, model=model)  # type: ignore[arg-type]
    options = SelectionOptions(
        n_features=1, features=(), max_density=0.1, min_persistence=1, n_before=1, n_after=1, n_rows=64, seed=0
    )
    profiles = [profile(0, 40), profile(1, 400), profile(6, 40)]
    found = reach(sources, profiles, options)
    own, other, against = (found[p.feature] for p in profiles)
    assert own > 2 > abs(other)
    assert against < 0


def test_the_audition_hears_who_writes_its_own_words(model, saes):
    flows = [Flow(seed=FeatureId(SITES[1], k), steps=tuple((FeatureId(s, k), 1.0) for s in SITES)) for k in (0, 6)]
    heard = auditioned(model, saes, dict.fromkeys(SITES, 6.0), [(flow, frozenset({40})) for flow in flows], OPTIONS)
    assert heard[0].steered > heard[0].unsteered + 3
    assert heard[1].steered <= heard[1].unsteered + 1
    assert heard[0].unsteered == heard[1].unsteered
    assert heard[0].merit > heard[1].merit


def test_incoherent_text_loses_whatever_it_writes():
    loud, quiet = (Audition(unsteered=0.0, steered=s, coherent=c) for s, c in ((50.0, 0.25), (1.0, 0.75)))
    assert quiet.merit > loud.merit
