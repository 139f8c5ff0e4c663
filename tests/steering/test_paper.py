"""The paper's experiments on a small random model: their modes and formulas against hooks written
by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from featureflow.sites import FeatureId, Site
from pipeline.lenses.steering.topic_samples import ConceptClassifier
from pipeline.lenses.steering.topics import TopicSetup
from pipeline.lenses.steering_paper import (
    Config,
    Paper,
    activation,
    deactivation,
    finding_of,
    paper_of,
    seeds_of,
)
from pipeline.steering_run import Steering
from steering.arms import Scales
from steering.features import Contrast
from steering.teacher_forced import OutputScore, log_likelihoods
from tests.steering.conftest import steering_of

TOPICS = ("food", "law")
CONFIG = Config(
    remaining=(0.5, 0.0, -4.0),
    strengths=(0.05, 0.2),
    n_layers=4,
    n_prompts=2,
    n_texts=3,
    n_new_tokens=8,
)


def setup_of(steering: Steering, topic: str) -> TopicSetup:
    seed = FeatureId(Site(1, "resid_post"), 3)
    contrast = Contrast(feature=seed, auroc=0.9, d_prime=1.0, active_rate=0.5)
    classifier = ConceptClassifier.train(
        ["bread and butter", "bread again"] * 2, ["a court case", "a court rule"] * 2
    )
    flow = steering.flow(seed)
    return TopicSetup(
        topic=topic,
        seed=contrast,
        contrasts=(contrast,),
        output=OutputScore(before=0.1, after=0.2, kl=0.1, kl_between=0.05),
        flow=flow,
        control=steering.flow(FeatureId(seed.site, 9)),
        scales=Scales(
            norms=steering.norms, activations={feature: 1.0 for feature, _ in flow.steps}
        ),
        classifier=classifier,
        classifier_auroc=1.0,
        lexicon=frozenset({"bread"}),
        differences={},
    )


@pytest.fixture(scope="module")
def paper(model, saes) -> Paper:
    return paper_of(steering_of(model, saes), CONFIG)


@pytest.fixture(scope="module")
def tables(paper):
    setups = [setup_of(paper.steering, topic) for topic in TOPICS]
    off = [deactivation(paper, setup, [setup.seed.feature]) for setup in setups]
    on = [activation(paper, setup) for setup in setups]
    return off, on


def test_removing_a_feature_is_the_hook_written_by_hand(paper, tables, model, saes):
    table = tables[0][0]
    site, latent, r = Site(1, "resid_post"), 3, -4.0
    sae = saes[site]

    def hook(h):
        a = sae.encode(h.reshape(-1, h.shape[-1]).float())[:, latent].view(h.shape[:-1])
        changed = h + (r - 1) * a[..., None] * sae.W_dec[latent]
        changed[:, 0] = h[:, 0]
        return changed

    texts = paper.sampler.texts("food", "test")[0]
    before = log_likelihoods(model, texts)
    with model.edited({site: hook}):
        after = [log_likelihoods(model, [text])[0] for text in texts]
    row = table[(table["mode"] == "seeds") & (table["r"] == r)].iloc[0]
    assert row["removed"] == pytest.approx(np.mean(before) - np.mean(after), abs=1e-5)
    assert abs(row["removed"]) > 1e-4


def test_layers_up_to_the_last_are_the_whole_flow(tables):
    off, on = tables[0][0], tables[1][0]
    last = off[(off["mode"] == "up to") & (off["layer"] == 3)].set_index("r")["removed"]
    whole = off[off["mode"] == "whole flow"].set_index("r")["removed"]
    np.testing.assert_allclose(last[whole.index], whole)
    last = on[(on["mode"] == "up to") & (on["layer"] == 3)].set_index("s")["kl"]
    whole = on[(on["mode"] == "whole flow") & (on["schedule"] == "constant")].set_index("s")["kl"]
    np.testing.assert_allclose(last[whole.index], whole)
    first = on[(on["mode"] == "layer") & (on["layer"] == 1)].set_index("s")["kl"]
    seeds = on[on["mode"] == "seeds"].set_index("s")["kl"]
    np.testing.assert_allclose(first[seeds.index], seeds)


def test_only_whole_flows_are_sampled_and_pushes_grow_with_s(tables):
    on = tables[1][0]
    assert on["success"].notna().equals(on["layer"].isna())
    for (_, _), part in on[on["layer"].isna()].groupby(["mode", "schedule"]):
        assert part.sort_values("s")["kl"].is_monotonic_increasing


def test_a_flow_is_cut_at_a_weak_link_and_seeds_share_no_flow(model, saes):
    steering = steering_of(model, saes, cosines=(1.0, 0.9, 0.3, 0.9))
    same_flow, other = FeatureId(Site(0, "resid_post"), 3), FeatureId(Site(2, "resid_post"), 3)
    found = setup_of(steering, "food")
    setup = replace(
        found,
        contrasts=tuple(replace(found.seed, feature=feature) for feature in (same_flow, other)),
    )
    assert seeds_of(steering, setup, 5) == [setup.seed.feature, other]


def test_the_text_sets_what_the_paper_saw_beside_what_was_found(tables):
    off, on = (pd.concat(parts, ignore_index=True) for parts in tables)
    finding = finding_of(off, on, seed=0)
    assert "| the paper saw | this model shows |" in finding.text
    found = finding.tables["findings"]
    assert set(found["experiment"]) == {"deactivation", "activation"}
    whole = off[(off["r"] == 0.0) & (off["mode"] == "whole flow")].set_index("topic")["removed"]
    random = off[(off["r"] == 0.0) & (off["mode"] == "random")].set_index("topic")["removed"]
    assert f"{(whole - random).mean():+.3f} [" in found["this model shows"].str.cat()
    grid = finding.tables["removed"].set_index(["mode", "r"])["removed"]
    assert grid["whole flow", 0.0] == pytest.approx(whole.mean())
    labels = [axis.get_ylabel() for axis in finding.figure().axes]
    assert {"removed, nats a token", "selectivity, nats a token"} <= set(labels)


def test_random_controls_are_none_of_the_flow(tables, paper):
    row = tables[0][0].query("mode == 'random'").iloc[0]
    assert row["n_nodes"] == 4
    assert not torch.isnan(torch.tensor(row["removed"]))
