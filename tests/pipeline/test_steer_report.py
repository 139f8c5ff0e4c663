"""The steering page: escaped text, marked words, the same pairs drawn for every arm."""

from __future__ import annotations

import re

import pandas as pd
import pytest

from pipeline.lenses.steering.report import write_steer_report

ARMS, DOSES = ("single", "flow"), (0.1, 0.2)


@pytest.fixture
def page(tmp_path) -> str:
    (tmp_path / "figures").mkdir()
    samples = pd.DataFrame(
        {
            "feature": "L1/2",
            "arm": arm,
            "target": dose,
            "prompt": f"prompt {k}:",
            "sample": 0,
            "unsteered": f" plain {k}",
            "steered": f" <b>eggs</b> and eggshells {arm} {dose} {k}",
        }
        for arm in ARMS
        for dose in DOSES
        for k in range(8)
    )
    effects = pd.DataFrame(
        {
            "feature": "L1/2",
            "arm": arm,
            "target": dose,
            "measure": measure,
            "unsteered": 0.0,
            "steered": 2.5,
            "low": 1.0,
            "high": 4.0,
        }
        for arm in ARMS
        for dose in DOSES
        for measure in ("top_tokens", "active", "coherent", "nll")
    )
    features = [
        {
            "feature": "L1/2",
            "label": "is active on ‘<eggs>’",
            "top_tokens": [" eggs", " egg"],
            "flow": [{"feature": "L1/2", "cosine": 1.0}],
        }
    ]
    return write_steer_report(
        tmp_path, samples, effects, features, ["a remark"], {"dose": 0.1}, dose=0.1, seed=4
    ).read_text()


def test_text_is_escaped_and_own_words_are_marked_only_as_words(page):
    assert "<b>" not in page
    assert "&lt;b&gt;<mark>eggs</mark>&lt;/b&gt; and eggshells" in page
    assert "‘&lt;eggs&gt;’" in page


def test_every_arm_and_dose_shows_the_same_drawn_pairs(page):
    text = r"<em>(prompt \d):</em>[^<]*&lt;b&gt;<mark>eggs</mark>&lt;/b&gt; and eggshells "
    drawn = {
        (arm, dose): re.findall(f"{text}{arm} {dose} ", page) for arm in ARMS for dose in DOSES
    }
    assert len({tuple(found) for found in drawn.values()}) == 1
    assert len(next(iter(drawn.values()))) == 3


def test_the_page_asks_no_network_and_shows_intervals(page):
    assert not re.search(r"(src|href)=.https?:", page)
    assert "default-src 'none'" in page
    assert "2.5 (+1 to +4)" in page
