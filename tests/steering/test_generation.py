"""Generation: pairs share their luck, batches and padding change nothing, steering reaches every
written token."""

from __future__ import annotations

import pytest
import torch

from featureflow.errors import UserError
from steering.edits import Add
from steering.generation import Sampling, generate, stream
from steering.hooks import applied
from steering.plan import Node, Plan
from steering.scopes import Generated
from steering.sequences import encoded

PROMPTS = ["I think", "Last night the road was", "A"]
SHORT = Sampling(n_tokens=6)
STRONG = Plan(nodes=(Node(at="L1/3", scale=8.0), Node(at="L2/5", scale=8.0)), edit=Add())


def texts(samples):
    return [(s.prompt, s.sample, s.ids) for s in samples]


def test_a_plan_of_strength_zero_writes_what_its_unsteered_twin_writes(model, saes):
    made = generate(
        model, saes, PROMPTS, [None, STRONG.with_strength(0.0), STRONG], n_samples=2, sampling=SHORT
    )
    assert texts(made.of_plan(0)) == texts(made.of_plan(1))
    assert texts(made.of_plan(0)) != texts(made.of_plan(2))


def test_batches_do_not_change_what_is_written(model, saes):
    together = generate(model, saes, PROMPTS, [None, STRONG], n_samples=2, sampling=SHORT)
    apart = generate(
        model, saes, PROMPTS, [None, STRONG], n_samples=2, sampling=SHORT, batch_size=1
    )
    assert texts(together.samples) == texts(apart.samples)
    alone = generate(model, saes, PROMPTS[1:2], [STRONG], n_samples=1, sampling=SHORT)
    assert (
        alone.samples[0].ids
        == next(s for s in together.of_plan(1) if s.prompt == PROMPTS[1] and s.sample == 0).ids
    )


def test_greedy_text_is_the_argmax_of_uncached_steered_passes(model, saes):
    made = generate(
        model, saes, PROMPTS[:1], [STRONG], sampling=Sampling(n_tokens=5, temperature=0)
    )
    ids = encoded(model, PROMPTS[0])
    for token, log_prob in zip(made.samples[0].ids, made.samples[0].log_probs, strict=True):
        with applied(model, saes, STRONG), torch.no_grad():
            log_probs = model.hf(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert token == int(log_probs.argmax())
        assert log_prob == pytest.approx(float(log_probs[token]), abs=1e-4)
        ids.append(token)


def test_steering_reaches_every_token_it_should(model, saes):
    plan = Plan(nodes=STRONG.nodes[:1], edit=Add(), scope=Generated())
    made = generate(model, saes, PROMPTS[:1], [plan], sampling=Sampling(n_tokens=6, temperature=0))
    written = len(made.samples[0].ids)
    assert made.reports[0].n_touched() == written - 1  # the last token is never read


def test_sampling_follows_the_models_distribution(model, saes):
    """One step, many samples: frequencies against the softmax, within four standard errors."""
    made = generate(
        model,
        saes,
        ["I think"],
        [None],
        n_samples=1500,
        sampling=Sampling(n_tokens=1, temperature=1.0, top_p=1.0),
        batch_size=500,
    )
    with torch.no_grad():
        p = model.hf(input_ids=torch.tensor([encoded(model, "I think")])).logits[0, -1].softmax(-1)
    counts = (
        torch.bincount(torch.tensor([s.ids[0] for s in made.samples]), minlength=model.d_vocab)
        / 1500
    )
    error = (p * (1 - p) / 1500).sqrt()
    assert ((counts - p).abs() <= 4.5 * error + 1e-3).all()


def test_top_p_keeps_only_the_nucleus(model, saes):
    made = generate(
        model,
        saes,
        ["I think"],
        [None],
        n_samples=200,
        sampling=Sampling(n_tokens=1, top_p=0.2, temperature=1.0),
        batch_size=200,
    )
    with torch.no_grad():
        p = model.hf(input_ids=torch.tensor([encoded(model, "I think")])).logits[0, -1].softmax(-1)
    ordered = p.sort(descending=True)
    nucleus = set(ordered.indices[: int((ordered.values.cumsum(0) < 0.2).sum()) + 1].tolist())
    assert {s.ids[0] for s in made.samples} <= nucleus


def test_streaming_gives_the_same_tokens(model, saes):
    made = generate(model, saes, PROMPTS[:1], [None, STRONG], sampling=SHORT)
    steps = list(stream(model, saes, PROMPTS[0], [None, STRONG], sampling=SHORT))
    for plan in (0, 1):
        streamed = [step.ids[step.rows.index(plan)] for step in steps if plan in step.rows]
        assert tuple(streamed) == made.of_plan(plan)[0].ids


def test_too_long_and_nothing_and_nonsense_are_refused(model, saes):
    with pytest.raises(UserError, match="context"):
        generate(model, saes, ["A"], [None], sampling=Sampling(n_tokens=10_000))
    with pytest.raises(UserError, match="nothing"):
        generate(model, saes, [], [None])
    with pytest.raises(UserError) as caught:
        Sampling(n_tokens=0, temperature=-1, top_p=2, top_k=0)
    assert len(caught.value.problems) == 4
