"""Every kind of site has one long and one short name, and sites sort in the order in which a real
model computes them."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from data.model.language_model import LanguageModel
from data.model.spec import Random
from featureflow.errors import UserError
from featureflow.sites import IN_LAYER, FeatureId, Site, parse_feature, parse_site


def test_sorted_sites_are_in_the_order_in_which_a_model_reaches_them() -> None:
    model = LanguageModel.open(Random(n_layers=2, d_model=16, n_heads=2, d_mlp=32), dtype="float32")
    reached: list[Site] = []

    def noting(site: Site):
        def note(value: torch.Tensor) -> torch.Tensor:
            reached.append(site)
            return value

        return note

    sites = model.sites()
    assert {site.kind for site in sites} >= set(IN_LAYER) - {"z", "mlp_in", "mlp_normalized"}
    with model.edited({site: noting(site) for site in random.Random(0).sample(sites, len(sites))}):
        model.logits(torch.tensor([[1, 2, 3]]))
    assert reached == sorted(sites) == list(sites)


@pytest.mark.parametrize("kind", IN_LAYER)
def test_every_kind_has_both_names_and_one_place(kind) -> None:
    site = Site(12, kind)
    assert parse_site(site.name) == parse_site(site.short) == site
    assert parse_feature(f"{site.short}/7") == FeatureId(site, 7)
    places = [Site(layer, other) for layer in (11, 12, 13) for other in IN_LAYER]
    for a, b in itertools.combinations(places, 2):
        assert a < b
        assert a <= b
        assert b > a
        assert FeatureId(a, 9) < FeatureId(b, 0)


def test_sites_inside_a_sublayer_are_named_as_transformerlens_names_them():
    names = {Site(3, kind).name for kind in ("mlp_in", "mlp_normalized", "z", "mlp_out")}
    assert names == {
        "blocks.3.mlp.hook_in",
        "blocks.3.ln2.hook_normalized",
        "blocks.3.attn.hook_z",
        "blocks.3.hook_mlp_out",
    }


@pytest.mark.parametrize("text", ["L3.q", "blocks.3.hook_mlp_in", "blocks.3.mlp_in", "L3.", "3"])
def test_other_names_are_refused_with_the_forms(text):
    with pytest.raises(UserError, match="is not a site") as caught:
        parse_site(text)
    assert "L12.mlp_in" in str(caught.value)
