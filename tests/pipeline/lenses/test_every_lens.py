"""What holds for every lens: it can be repeated, says what its tables hold, draws, and finds
nothing in a model with random weights where it claims to find something."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from featureflow.sites import parse_feature, parse_site
from pipeline.findings import Finding, read_finding, write_finding
from pipeline.lenses.base import LensConfig, find_lens, lens_names, run_lens
from pipeline.run import Run

SMALL = {
    "n_tokens": 400,
    "n_new_tokens": 8,
    "n_pairs": 2,
    "n_targets": 14,
    "n_contexts": 4,
    "n_exhaustive": 4,
    "n_layers": 2,
    "steps": 20,
    "n_resamples": 20,
    "n_topics": 1,
    "n_texts": 2,
    "n_prompts": 2,
    "n_seeds": 1,
    "n_features": 4,
    "n_seconds": 1,
    "ahead": 1,
    "offsets": (0,),
    "distances": (1, 2),
    "n_samples": 4,
    "remaining": (0.5, 0.0),
    "strengths": (0.05,),
}


def small(lens: ModuleType) -> LensConfig:
    """Little of whatever the lens can be asked for."""
    return lens.Config(**{k: v for k, v in SMALL.items() if k in lens.Config.model_fields})


@pytest.mark.slow
@pytest.mark.parametrize("name", lens_names())
def test_every_lens(name: str, run: Run, tmp_path: Path) -> None:
    lens = find_lens(name)
    artifact = run_lens(name, run, small(lens))
    artifact.verify()
    made = (artifact.path / "manifest.json").stat().st_mtime_ns
    run_lens(name, run, small(lens))
    assert (artifact.path / "manifest.json").stat().st_mtime_ns == made, "a second call is free"

    again = lens.look(run, small(lens))
    write_finding(again, tmp_path, name=name, title=lens.TITLE)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert files == set(artifact.files)
    for file in files:
        assert (tmp_path / file).read_bytes() == artifact.file(file).read_bytes(), file

    finding = read_finding(artifact)
    check_words_and_tables(finding, json.loads(artifact.file("finding.json").read_text()), run)
    if again.figure is None:
        assert finding.arrays or not any(len(table) for table in finding.tables.values())
    for axis in again.figure().axes if again.figure else ():
        assert axis.get_xlabel() or axis.get_title(loc="left") or axis.get_title()
        assert axis.lines or axis.patches or axis.images or axis.collections, "something is drawn"
    for claim in getattr(lens, "CLAIMS", ()):
        assert finding.headline[claim] == 0, f"{claim} in a model with random weights"


def check_words_and_tables(finding: Finding, document: dict[str, Any], run: Run) -> None:
    """The text is sentences; the tables are as declared, and name sites and features that are."""
    assert len(finding.text.split()) > 8
    assert finding.tables.keys() == document["tables"].keys()
    for stem, table in finding.tables.items():
        facts = document["tables"][stem]
        assert [column["name"] for column in facts["columns"]] == list(table), stem
        assert facts["rows"] == len(table)
        for column in facts["columns"]:
            for value in table[column["name"]].dropna().unique():
                if column["kind"] == "site":
                    parse_site(value)
                elif column["kind"] == "feature":
                    feature = parse_feature(value)
                    assert feature.latent < run.saes.description(feature.site)["n_latents"]


def test_the_digest_covers_options_lens_and_what_is_looked_at(run: Run) -> None:
    digests = set()
    for name, options in (("groups", {}), ("groups", {"n_tokens": 300}), ("cooccurrence", {})):
        lens = find_lens(name)
        digests.add(run_lens(name, run, lens.Config(**{"n_tokens": 400, **options})).digest)
    assert len(digests) == 3
    inputs = run_lens("groups", run).inputs
    assert inputs == {stage: run.artifact(stage).digest for stage in ("collect", "train", "link")}
