"""Where SAEDashboard and the atlas define the same thing, they say the same: density, largest
activation, promoted and suppressed tokens, strongest examples.

`saedashboard.json` is what SAEDashboard found (`python -m benchmarks.peers.record_saedashboard
FOLDER` makes it again). With FEATUREFLOW_PEERS, the folder of the peers' environments, SAEDashboard
itself runs once more.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.describe.columns import Columns
from pipeline.describe.corpus import Corpus
from pipeline.describe.examples import TABS
from tests.pipeline.describe.dashboard_case import LENGTH, N_LATENTS, RECORDED, Case, ask


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.fixture(scope="module")
def theirs(case: Case) -> list[dict[str, Any]]:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert recorded["inputs"] == case.checksum(), (
        "other inputs than were recorded: run record_saedashboard again"
    )
    return list(recorded["features"])


@pytest.fixture(scope="module")
def ours(case: Case) -> tuple[Corpus, Columns]:
    return case.ours()


def test_the_recorded_features_fire_but_for_the_last(theirs):
    assert [feature["density"] > 0 for feature in theirs] == [True] * (N_LATENTS - 1) + [False]


def test_densities_are_the_same(ours, theirs):
    corpus, columns = ours
    density = columns["count"] / len(
        corpus
    )  # SAEDashboard divides by all tokens, those left out included
    np.testing.assert_allclose(
        density, [f["density"] for f in theirs], atol=0.6e-5
    )  # printed to 0.001 %


def test_largest_activations_are_the_same(ours, theirs):
    np.testing.assert_allclose(ours[1]["max"], [f["largest"] for f in theirs], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["promotes", "suppresses"])
def test_promoted_and_suppressed_tokens_are_the_same_in_the_same_order(ours, theirs, name):
    for mine, feature in zip(ours[1][name], theirs, strict=True):
        listed = [token for token in feature[name] if token != 0]  # padding is never listed here
        assert len(listed) >= 9
        assert mine[: len(listed)].tolist() == listed


def test_the_strongest_examples_are_the_same(ours, theirs):
    for latent, feature in enumerate(theirs[:-1]):
        once: dict[
            int, tuple[int, float]
        ] = {}  # SAEDashboard shows a context as often as it is among the strongest
        for context, position, value in feature["top"]:
            once.setdefault(context, (position, value))
        mine = top_examples(*ours, latent)
        assert len(once) >= 5
        assert [(context, position) for context, position, _ in mine[: len(once)]] == [
            (context, position) for context, (position, _) in once.items()
        ]
        np.testing.assert_allclose(
            [v for *_, v in mine[: len(once)]], [v for _, v in once.values()], atol=1e-4
        )


@pytest.mark.slow
def test_saedashboard_still_finds_what_was_recorded(case, theirs, tmp_path):
    root = Path(os.environ.get("FEATUREFLOW_PEERS", ""))
    if not (root / "saedashboard" / "bin" / "python").is_file():
        pytest.skip(
            "no environment: bash benchmarks/peers/make_environments.sh, then FEATUREFLOW_PEERS"
        )
    found = ask(case, root, tmp_path / "case")["features"]
    for now, recorded in zip(found, theirs, strict=True):
        assert now["promotes"] == recorded["promotes"]
        assert now["suppresses"] == recorded["suppresses"]
        assert [example[:2] for example in now["top"]] == [
            example[:2] for example in recorded["top"]
        ]
        assert now["density"] == pytest.approx(recorded["density"], abs=1e-6)
        assert now["largest"] == pytest.approx(recorded["largest"], rel=1e-4, abs=1e-4)


def top_examples(corpus: Corpus, columns: Columns, latent: int) -> list[tuple[int, int, float]]:
    """Context, position and activation of the strongest examples of a latent."""
    first, last = columns["example_offset"][latent : latent + 2]
    tab = columns["example_tab"][first:last] == TABS.index("top")
    rows, values = (
        columns["example_row"][first:last][tab],
        columns["example_value"][first:last][tab],
    )
    return [
        (int(r) // LENGTH, int(r) % LENGTH, float(v)) for r, v in zip(rows, values, strict=True)
    ]
