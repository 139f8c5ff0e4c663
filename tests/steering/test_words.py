"""What is expected to be said, against slow references; the benchmark of equal KL."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.steering_words import changes, summary_of, tilted
from steering.dose import NeutralText
from steering.generation import Sampling
from steering.teacher_forced import expected_share

SAMPLING = Sampling(temperature=0.8, top_k=12, top_p=0.7)


def slow_share(log_probs: list[float], tokens: set[int], sampling: Sampling) -> float:
    """The likeliest tokens, one after another, until they hold `top_p` of what `top_k` hold."""
    weights = {t: np.exp(lp / sampling.temperature) for t, lp in enumerate(log_probs)}
    order = sorted(weights, key=lambda t: -weights[t])[: sampling.top_k]
    total, before, kept = sum(weights[t] for t in order), 0.0, []
    for token in order:
        if before < sampling.top_p * total:
            kept.append(token)
        before += weights[token]
    return sum(weights[t] for t in kept if t in tokens) / sum(weights[t] for t in kept)


def test_the_expected_share_is_that_of_the_sampling_rule():
    log_probs = (
        torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).mul(2).log_softmax(-1)
    )
    tokens = {1, 5, 7, 20, 21}
    found = expected_share(log_probs, sorted(tokens), SAMPLING)
    expected = [slow_share(row.tolist(), tokens, SAMPLING) for row in log_probs]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_at_temperature_0_the_likeliest_token_is_expected():
    log_probs = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    best = log_probs.argmax(-1)
    greedy = Sampling(temperature=0.0, top_k=12, top_p=0.7)
    found = expected_share(log_probs, [int(best[0])], greedy)
    assert found.tolist() == (best == best[0]).float().tolist()


def test_a_tilt_of_logits_has_the_dose_and_raises_only_its_words():
    log_probs = torch.randn(30, 40, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    text = NeutralText(batch=None, log_probs=log_probs, next_ids=torch.full((30,), 1))  # type: ignore[arg-type]
    gain, kl, rise = tilted(text, (1, 5), 0.2)
    assert kl == pytest.approx(0.2, rel=1e-3)
    assert gain > 0
    assert rise < 0, "every next token is one of the words"
    elsewhere = NeutralText(batch=None, log_probs=log_probs, next_ids=torch.full((30,), 2))  # type: ignore[arg-type]
    assert tilted(elsewhere, (1, 5), 0.2)[2] > 0


def test_kl_words_and_loss_are_those_of_plain_sums():
    before, after = torch.randn(2, 300, 20, generator=torch.Generator().manual_seed(2)).log_softmax(
        -1
    )
    following = torch.arange(300) % 20
    following[::7] = -1
    text = NeutralText(batch=None, log_probs=before, next_ids=following)  # type: ignore[arg-type]
    kl, said, rise = changes(text, after, (3, 4))
    p, q = after.double().numpy(), before.double().numpy()
    assert kl == pytest.approx(float((np.exp(p) * (p - q)).sum(1).mean()), rel=1e-4)
    shares = [slow_share(row, {3, 4}, Sampling()) for row in p.tolist()]
    assert said == pytest.approx(100 * float(np.mean(shares)), rel=1e-4)
    known = [k for k in range(300) if k % 7]
    assert rise == pytest.approx(float(np.mean([q[k, k % 20] - p[k, k % 20] for k in known])))


def test_differences_are_paired_by_topic():
    """Every topic has a level of its own; the arm is always 1 above single and 0.5 below copied."""
    rows = [
        {"topic": topic, "corpus": corpus, "arm": arm, "gain": level + add, "rise": 0.1}
        for topic, level in (("a", 0.0), ("b", 10.0), ("c", 20.0))
        for corpus in ("wiki", "recipes")
        for arm, add in (("single", 0.0), ("copied", 1.5), ("flow", 1.0))
    ]
    found = summary_of(pd.DataFrame(rows)).set_index("arm")
    assert found.loc["flow", "single"] == "+1.000 [+1.000, +1.000] 3/3"
    assert found.loc["flow", "copied"] == "-0.500 [-0.500, -0.500] 0/3"
    assert found.loc["flow", "gain"] == pytest.approx(11.0)
