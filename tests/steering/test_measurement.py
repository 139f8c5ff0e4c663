"""Measurements against their definitions: statistics, readings, teacher-forced scores,
discovery."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site
from pipeline.lenses.steering.topic_samples import ConceptClassifier, lexicon_hits
from sae import Sae, TopKActivation
from steering.dose import NeutralText
from steering.features import (
    TextStates,
    auroc,
    difference_of_means,
    profile_features,
    rank_features,
    read_texts,
)
from steering.gates import agreement, with_threshold_gate
from steering.generation import Sampling, generate
from steering.hooks import applied
from steering.plan import Node, Plan
from steering.reading import CoherenceLimits, Reading, Target, is_coherent, read_back, repetition
from steering.sequences import encoded
from steering.teacher_forced import log_likelihoods, output_score, selectivity

L1 = Site(1, "resid_post")
PLAN = Plan(nodes=(Node(at="L1/3", scale=4.0),))
TEXTS = ["The cat sat on the mat.", "A law is a rule.", "Rain fell."]


def test_readings_are_what_the_unsteered_model_says(model, saes):
    made = generate(
        model, saes, ["I think", "The old house"], [PLAN], sampling=Sampling(n_tokens=5)
    ).samples
    target = Target(feature=FeatureId(L1, 3), scale=2.0, top_tokens=frozenset(made[0].ids[:2]))
    for sample, reading in zip(made, read_back(model, saes, made, [target]), strict=True):
        prompt = encoded(model, sample.prompt)
        ids = torch.tensor([[*prompt, *sample.ids]])
        with torch.no_grad(), model.recorded([L1]) as seen:
            log_probs = model.hf(input_ids=ids).logits[0].log_softmax(-1)
        own = range(len(prompt), ids.shape[1])
        nll = -np.mean([float(log_probs[place - 1, ids[0, place]]) for place in own])
        a = saes[L1].encode(seen[L1][0])[len(prompt) :, 3]
        assert reading.nll == pytest.approx(nll, rel=1e-4)
        assert reading.activation[0] == pytest.approx(float(a.mean()) / 2.0, rel=1e-3, abs=1e-6)
        assert reading.active[0] == pytest.approx(float((a > 0).float().mean()))
    assert read_back(model, saes, made, [target])[0].top_tokens[0] >= 40


def test_loops_and_gibberish_are_not_coherent():
    assert repetition([1, 2, 3, 1, 2, 3, 1, 2, 3]) == pytest.approx(4 / 7)
    limits = CoherenceLimits(nll_low=2, nll_high=5, repetition_high=0.3, squeeze_low=0.4)
    good = {
        "nll": 3.0,
        "activation": (),
        "active": (),
        "top_tokens": (),
        "repetition": 0.1,
        "squeeze": 0.6,
        "n_tokens": 20,
    }
    assert is_coherent(Reading(**good), limits)
    for change in (
        {"nll": 9.0},
        {"nll": 0.5},
        {"repetition": 0.8},
        {"squeeze": 0.2},
        {"n_tokens": 4},
    ):
        assert not is_coherent(Reading(**{**good, **change}), limits)


def test_log_likelihoods_one_text_at_a_time(model):
    for text, value in zip(TEXTS, log_likelihoods(model, TEXTS, prefix="Well"), strict=True):
        ids, skipped = encoded(model, f"Well {text}"), len(encoded(model, "Well"))
        with torch.no_grad():
            log_probs = model.hf(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = np.mean(
            [float(log_probs[place - 1, ids[place]]) for place in range(skipped, len(ids))]
        )
        assert value == pytest.approx(expected, rel=1e-4)


def test_selectivity_is_a_difference_of_differences(model, saes):
    found = selectivity(model, saes, PLAN, TEXTS[:2], TEXTS[2:])
    before = log_likelihoods(model, TEXTS)
    with applied(model, saes, PLAN):
        after = log_likelihoods(model, TEXTS)
    change = np.subtract(after, before)
    assert found.score == pytest.approx(change[:2].mean() - change[2:].mean(), abs=1e-6)
    assert selectivity(model, saes, PLAN.with_strength(0.0), TEXTS[:2], TEXTS[2:]).score == 0


def test_profiles_by_hand():
    """Six tokens, one latent: is active on token 7 both times and once on token 9 of three."""
    row = torch.tensor([[1.0, 0.0]])
    sae = Sae(
        W_enc=row,
        b_enc=torch.zeros(1),
        W_dec=row,
        b_dec=torch.zeros(2),
        b_in=torch.zeros(2),
        activation=TopKActivation(k=1),
    )
    x = torch.tensor([[4.0, 0], [2.0, 0], [0, 1], [0, 1], [1.0, 0], [0, 3]])
    (found,) = profile_features(
        sae, L1, [x[:3], x[3:]], np.array([7, 7, 9, 9, 9, 5]), [0], max_frequency=1.0
    )
    assert found.density == pytest.approx(0.5)
    assert found.top_tokens == (7,)
    assert found.purity == pytest.approx(6 / 7)
    assert found.strong == pytest.approx(np.quantile([4, 2, 1], 0.95))


def test_output_scores_are_probabilities_after_steering(model, saes):
    """And the chain rule: KL = KL between the set and the rest + expected KL inside each."""
    tokens, texts = [40, 41, 300], ["I think it rains", "The house"]
    plan = Plan(nodes=(Node(at="L1/3", scale=8.0),), strength=0.5)
    found = output_score(model, saes, plan, tokens, NeutralText.prepare(model, texts))
    before, after, kl, within = [], [], [], []
    for text in texts:
        ids = torch.tensor([encoded(model, text)])
        with torch.no_grad():
            p = model.hf(input_ids=ids).logits[0, 1:].double().softmax(-1)
            with applied(model, saes, plan):
                q = model.hf(input_ids=ids).logits[0, 1:].double().softmax(-1)
        inside = torch.zeros(p.shape[-1], dtype=torch.bool)
        inside[tokens] = True
        before.append(p[:, inside].sum(-1)), after.append(q[:, inside].sum(-1))
        kl.append((q * (q / p).log()).sum(-1))
        parts = [(q[:, part], p[:, part]) for part in (inside, ~inside)]
        within.append(
            sum(
                (b * ((b / b.sum(-1, True)) / (a / a.sum(-1, True))).log()).sum(-1)
                for b, a in parts
            )
        )
    for name, values in (("before", before), ("after", after), ("kl", kl)):
        assert getattr(found, name) == pytest.approx(float(torch.cat(values).mean()), rel=2e-3)
    assert found.kl - found.kl_between == pytest.approx(float(torch.cat(within).mean()), rel=2e-3)
    assert abs(found.on_target_share) == pytest.approx(found.kl_between / found.kl)


def test_auroc_counts_pairs():
    values = np.array([[3.0], [1.0], [2.0], [2.0]])
    topic = np.array([True, True, False, False])
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in (3, 1) for b in (2, 2)]
    assert auroc(values, topic)[0] == pytest.approx(np.mean(pairs))


def test_discovery_finds_the_planted_latent():
    generator = torch.Generator().manual_seed(0)
    latents = torch.rand(40, 6, generator=generator) * (
        torch.rand(40, 6, generator=generator) < 0.5
    )
    is_topic = [place < 20 for place in range(40)]
    latents[:20, 4] += 1.0
    latents[:, 5] = 0
    states = TextStates(vectors={L1: latents}, latents={L1: latents})
    ranked = rank_features(states, is_topic)
    assert ranked[0].feature == FeatureId(L1, 4)
    assert ranked[0].auroc == 1
    assert all(contrast.feature.latent != 5 for contrast in ranked)
    assert int(difference_of_means(states, is_topic)[L1].argmax()) == 4
    with pytest.raises(UserError, match="both kinds"):
        rank_features(states, [True] * 40)


def test_text_states_do_not_depend_on_the_batch(model, saes):
    together = read_texts(model, saes, TEXTS)
    for place, text in enumerate(TEXTS):
        alone = read_texts(model, saes, [text])
        torch.testing.assert_close(
            together.latents[L1][place], alone.latents[L1][0], atol=1e-5, rtol=1e-4
        )


def test_the_classifier_and_the_lexicon_tell_topics_apart():
    topic = [
        f"the soup of {word} with bread and butter"
        for word in ["leek", "bean", "corn", "kale", "rice"]
    ]
    other = [
        f"the judge read the {word} in court and left"
        for word in ["plea", "oath", "bill", "case", "writ"]
    ]
    made = ConceptClassifier.train(topic, other)
    assert (
        made.auroc(["bread with soup", "butter and bread"], ["court and judge", "the judge left"])
        == 1
    )
    found = lexicon_hits("Pizza pizza pizza and two soups.", frozenset({"pizza", "soup"}))
    assert (found.distinct, found.rate) == (2, pytest.approx(100 * 4 / 6))


def test_the_threshold_gate_agrees_with_topk_on_the_mean(saes):
    exact = saes[L1].replace(activation=TopKActivation(k=5))
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(1))
    found = agreement(exact, with_threshold_gate(exact, x), x)
    assert found.recall > 0.7
    assert found.precision > 0.7
    assert not math.isnan(found.recall)
    with pytest.raises(UserError, match="TopK"):
        with_threshold_gate(saes[L1], x)
