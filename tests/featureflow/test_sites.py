"""Every kind of site has one long and one short name, and both are read back."""

from __future__ import annotations

import pytest

from featureflow.errors import UserError
from featureflow.sites import IN_LAYER, Site, parse_feature, parse_site


@pytest.mark.parametrize("kind", IN_LAYER)
def test_both_names_are_read_back(kind):
    site = Site(12, kind)
    assert parse_site(site.name) == parse_site(site.short) == site
    assert parse_feature(f"{site.short}/7").site == site


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
