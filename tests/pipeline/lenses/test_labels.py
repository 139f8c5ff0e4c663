"""Labels are counted on the scoring documents: against the scores of the describe stage and a plain
loop over documents."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.context import RunContext
from pipeline.describe.corpus import HELD_OUT
from pipeline.findings import Finding
from pipeline.lenses import labels
from pipeline.run import Run
from tests.pipeline.small_run import DESCRIBE, SmallRun


@pytest.fixture(scope="module")
def small(small_run: SmallRun) -> Run:
    return Run.open(small_run.root, context=RunContext(n_threads=1))


@pytest.fixture(scope="module")
def finding(small: Run) -> Finding:
    return labels.look(small, labels.Config(n_resamples=200))


def test_every_accepted_label_scores_what_the_describe_stage_says(
    small: Run, finding: Finding
) -> None:
    table = small.features.labels
    best = table[table["accepted"]].sort_values("rank").drop_duplicates("feature")
    said = best.set_index("feature")["score"].sort_index()
    found = finding.columns.set_index("feature")["label_f1"].sort_index()
    assert len(found) > 20
    assert list(found.index) == list(said.index)
    assert np.allclose(found, said, atol=1e-4)


def test_only_what_holds_on_the_scoring_documents_is_counted(small: Run, finding: Finding) -> None:
    features = small.features.table
    table = small.features.labels
    best = table[table["accepted"]].sort_values("rank").drop_duplicates("feature")
    holding = best[best["score"] >= DESCRIBE.min_f1]
    assert 0 < len(holding) < len(best), "some accepted labels do not hold"
    n_alive = int(features["alive"].sum())
    assert finding.headline["holding_share"] == round(len(holding) / n_alive, 4)
    about_all = holding[~holding["rule"].str.startswith("strong_")]
    assert finding.headline["holding_share_all_activations"] >= round(len(about_all) / n_alive, 4)
    assert finding.headline["accepted_share"] == round(len(best) / n_alive, 4)
    kinds = finding.tables["kinds"]
    assert kinds["n_holding"].sum() == len(holding)
    assert kinds["n_accepted"].sum() == len(best)


def test_intervals_are_over_documents(finding: Finding, small: Run) -> None:
    """A rule's interval by a plain loop: whole documents drawn again, never tokens."""
    corpus, table = small.features.corpus, small.features.labels
    rows = table[table["accepted"] & (table["rule"] == "token")].iloc[0]
    short, latent = rows["site"], int(rows["latent"])
    site = next(each for each in small.features.sites if each.short == short)
    x = np.asarray(small.store.read(site, 0, small.store.n_rows))
    dense = small.saes[site].encode(torch.from_numpy(x)).numpy()[:, latent] > 0
    scored = corpus.kept & (corpus.part == HELD_OUT)
    named = np.isin(corpus.token, rows["values"])
    documents = np.unique(corpus.document[scored])
    parts = [
        [
            int((scored & (corpus.document == d) & mask).sum())
            for mask in (dense & named, dense, named)
        ]
        for d in documents
    ]
    counts = np.array(parts, dtype=float)
    rng = np.random.default_rng(1)
    draws = counts[rng.integers(len(counts), size=(2000, len(counts)))].sum(axis=1)
    f1 = 2 * draws[:, 0] / np.maximum(draws[:, 1] + draws[:, 2], 1e-12)
    found = finding.columns.set_index("feature").loc[f"{short}/{latent}"]
    assert found["f1_low"] == pytest.approx(np.quantile(f1, 0.025), abs=0.08)
    assert found["f1_high"] == pytest.approx(np.quantile(f1, 0.975), abs=0.08)
    top = finding.tables["summary"].iloc[0]
    assert top["holding_share_low"] <= top["holding_share"] <= top["holding_share_high"]


def test_the_rule_of_another_feature_holds_less_often(finding: Finding) -> None:
    assert finding.headline["control_share"] < finding.headline["holding_share"] / 2
