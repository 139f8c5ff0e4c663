"""Early detection on activations whose truth is planted: the ancestor is active on 8 of 10 tokens
of the feature and on as many others, and more strongly where it is right."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site
from pipeline.flow.queries import ChainStep
from pipeline.lenses.early_detection import Config, look
from tests.steering.linear_net import sae_with

SITES = [Site(layer, "resid_post") for layer in range(4)]


def planted_run(length: int = 4) -> SimpleNamespace:
    """1,000 tokens of two documents; the feature is active on 100 of each. Latent 0 is the flow,
    latent 1 is active at random on a fifth of the tokens."""
    generator = np.random.default_rng(0)
    feature = np.tile(np.arange(500) < 100, 2)
    right, wrong = np.tile(np.arange(500) < 80, 2), np.tile(np.arange(500) >= 420, 2)
    ancestor = np.where(right, 3.0 + generator.random(1000), np.where(wrong, 1.0, 0.0))
    other = (generator.random(1000) < 0.2).astype(float)
    rows = {site: torch.tensor(np.stack([ancestor, other], 1)).float() for site in SITES}
    rows[SITES[-1]][:, 0] = torch.tensor(feature.astype(np.float32))
    saes = {site: sae_with(torch.eye(2)) for site in SITES}

    def held_out(_: int):
        read = lambda site: iter([rows[site]])  # noqa: E731
        read.rows = np.arange(1000)
        return read

    nodes = pd.DataFrame(
        [(site.short, 0, True) for site in SITES], columns=["site", "latent", "alive"]
    )
    chain = [ChainStep(feature=FeatureId(s, 0), cosine=1.0, q_value=0.0) for s in SITES[-length:]]
    return SimpleNamespace(
        graph=SimpleNamespace(nodes=nodes, chain=lambda feature, forward: chain),
        steering=SimpleNamespace(
            saes={SITES[-1]: saes[SITES[-1]]},
            random_features=lambda feature, seed: [FeatureId(feature.site, 1)],
        ),
        saes=saes,
        held_out=held_out,
        tokens=SimpleNamespace(document=np.repeat([0, 1], 500)),
        each=lambda label, items: items,
        artifact=lambda stage: SimpleNamespace(path=stage),
    )


def test_recall_and_precision_are_those_that_were_planted():
    found = look(planted_run(), Config(n_sites=1, distances=(1, 3))).tables["summary"]
    assert found["ahead"].tolist() == [1, 3]
    assert found["recall"].tolist() == pytest.approx([0.8, 0.8])
    assert found["precision"].tolist() == pytest.approx([0.5, 0.5])
    assert found["base_rate"].tolist() == pytest.approx([0.2, 0.2])
    assert found["precision_random"].tolist() == pytest.approx([0.2, 0.2], abs=0.05)


def test_a_gate_that_asks_for_strong_activations_gives_up_recall_for_precision():
    gate = look(planted_run(), Config(n_sites=1, distances=(1,))).tables["gate"]
    by_quantile = gate.set_index("quantile")
    assert by_quantile.loc[0.5, "precision"] == pytest.approx(1.0)
    assert by_quantile.loc[0.5, "recall"] == pytest.approx(0.8, abs=0.02)
    assert by_quantile.loc[0.9, "recall"] < 0.4


def test_a_feature_without_an_ancestor_is_said():
    with pytest.raises(UserError, match="no feature has an ancestor"):
        look(planted_run(length=1), Config(n_sites=1, distances=(2,)))
