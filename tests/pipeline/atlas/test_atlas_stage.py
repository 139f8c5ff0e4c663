"""The atlas stage end to end on a small real run."""

from __future__ import annotations


def test_the_stage_leaves_site_and_tables(small_run):
    files = set(small_run.atlas.files)
    assert {"site/manifest.js", "site/manifest.json", "site/vocab.js", "site/attached/steering.js"} <= files
    assert {
        "tables/features.parquet",
        "tables/labels.parquet",
        "tables/examples.parquet",
        "tables/edges.parquet",
    } <= files
    assert "site/sites/L1.mlp/cards/000.js" in files
    assert not any(".work" in name for name in files)
