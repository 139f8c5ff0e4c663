"""On planted flow: recall at least 0.95 with at most 5 % false links, where fixed cosines fail in
small dimensions."""

from __future__ import annotations

import pandas as pd
import pytest

from pipeline.flow.link import Links, link_dictionaries
from pipeline.flow.options import Calibrated, Fixed, LinkOptions, Rotation


def kept_links(links: Links) -> set[tuple[str, int, str, int]]:
    kept = links.edges[links.edges["kept"]]
    return set(
        zip(
            kept["source_site"],
            kept["source_latent"],
            kept["target_site"],
            kept["target_latent"],
            strict=True,
        )
    )


def recall_and_false_share(planted, links: Links) -> tuple[float, float]:
    kept = kept_links(links)
    return len(kept & planted.links) / len(planted.links), len(kept - planted.links) / max(
        len(kept), 1
    )


@pytest.mark.parametrize("d", [96, 256])
def test_calibrated_links_recover_the_plant(plant, d):
    planted = plant(d=d)
    options = LinkOptions(null=Rotation(), thresholds=Calibrated(fdr=0.05), n_null=4096)
    recall, false_share = recall_and_false_share(
        planted, link_dictionaries(planted.dictionaries, options=options)
    )
    assert recall >= 0.95
    assert false_share <= 0.05


def test_fixed_cosines_fail_where_dimensions_are_few(plant):
    planted = plant(d=96)
    _, false_share = recall_and_false_share(
        planted,
        link_dictionaries(
            planted.dictionaries,
            options=LinkOptions(null=Rotation(), thresholds=Fixed(), n_null=500),
        ),
    )
    assert false_share > 0.25, "0.15 is below chance for modules here"


def test_classes_births_and_deaths_come_out(plant):
    planted = plant(d=256)
    nodes = link_dictionaries(
        planted.dictionaries, options=LinkOptions(null=Rotation(), n_null=4096)
    ).nodes
    by_name = nodes.set_index(["site", "latent"])
    newborn = by_name.loc[sorted(planted.newborn)]
    assert (newborn["class"] == "newborn").mean() >= 0.93
    assert (newborn["birth_layer"] == newborn["layer"]).mean() >= 0.93
    carried = by_name.loc[sorted({(t, i) for s, _, t, i in planted.links if "mlp" not in s})]
    assert (carried["class"] == "translated").mean() >= 0.93
    died = by_name.loc[sorted(planted.died)]
    assert (died["death_layer"] == died["layer"]).mean() >= 0.93
    assert pd.isna(by_name.loc[("L0", 0), "class"]), "nothing comes before the first layer"
