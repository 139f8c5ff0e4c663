"""Neurons that open on one token and write another, and features that known neurons write."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.pytorch_utils import Conv1D

from data.model.language_model import LanguageModel, Random
from data.model.sources import LoadedModel, attention_for, build_random
from featureflow.errors import UserError
from featureflow.sites import parse_site
from pipeline.lenses import memories, writers
from pipeline.lenses.parts.neurons import record_neurons, values, values_of_heads, written_by
from pipeline.run import Run
from pipeline.trace.frozen import frozen
from sae import Sae
from sae.activations import Relu


def test_neurons_and_what_they_write_make_the_mlps_output(run: Run) -> None:
    ids = torch.arange(4, 20).view(2, 8)
    site = parse_site("L1.mlp")
    a = record_neurons(run.model, ids, [1])[1]
    out = run.model.activations(ids, [site])[site]
    torch.testing.assert_close(a @ values(run.model, 1), out, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("module", [torch.nn.Linear(6, 6), Conv1D(6, 6), Conv1D(6, 9)])
def test_what_an_input_of_a_projection_writes_is_what_its_module_does(module) -> None:
    """GPT-2's Conv1D keeps its weight the other way round, which a square one does not show."""
    n_in = 9 if getattr(module, "nx", 6) == 9 else 6
    units = module(torch.eye(n_in)) - module(torch.zeros(1, n_in))
    torch.testing.assert_close(written_by(module, 6), units.detach(), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def gemma() -> LanguageModel:
    """It adds a norm of the sublayer's output to the stream, and caps its attention's logits."""
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Gemma2Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, head_dim=8, **shape
    )  # fmt: skip
    config._attn_implementation = attention_for(config)
    hf = Gemma2ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in hf.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    tokenizer = build_random(Random()).tokenizer
    loaded = LoadedModel(hf=hf.eval().requires_grad_(False), tokenizer=tokenizer, folder=None)
    return LanguageModel(name="gemma", loaded=loaded)


def test_what_writers_write_goes_through_the_norm_before_the_stream(gemma) -> None:
    """On each token, what its inputs write lies along what is added."""
    ids = torch.arange(4, 20).view(2, 8)
    z, attention, mlp = (parse_site(f"L1.{kind}") for kind in ("z", "attn", "mlp"))
    seen = gemma.activations(ids, [z, attention, mlp])
    heads = seen[z] @ values_of_heads(gemma, 1)
    neurons = record_neurons(gemma, ids, [1])[1] @ values(gemma, 1)
    for made, added in ((heads, seen[attention]), (neurons, seen[mlp])):
        assert torch.cosine_similarity(made, added, dim=-1).min() > 0.999


def test_an_attention_that_caps_its_logits_is_not_held(gemma) -> None:
    with pytest.raises(UserError, match="caps its logits"), frozen(gemma):
        pass


def test_agreement_is_that_of_the_planted_pairs() -> None:
    """Neuron i opens on token i; the tokens after are i + 10 for even neurons, 99 for odd ones."""
    token = np.tile(np.arange(8), 30)
    a = torch.eye(8)[torch.from_numpy(token)]
    next_id = np.where(token % 2 == 0, token + 10, 99)
    ten = np.stack([np.arange(8) + 10, np.arange(8) + 50], 1)
    found, triggers = memories.agreement(a, ten, next_id)
    assert (token[triggers] == np.arange(8)[:, None]).all()
    np.testing.assert_array_equal(found["one"], [1, 0] * 4)
    np.testing.assert_array_equal(found["ten"], [1, 0] * 4)
    other, _ = memories.agreement(a, ten[memories.permuted(8, 0)], next_id)
    assert other["one"].sum() == 0
    order = memories.permuted(50, 3)
    assert sorted(order) == list(range(50))
    assert (order != np.arange(50)).all()


def test_the_writers_of_a_known_direction_are_named() -> None:
    """Neurons 3, 17 and 40 write the direction that latent 0 reads."""
    generator = torch.Generator().manual_seed(0)
    n, d = 300, 16
    direction = torch.nn.functional.normalize(torch.randn(d, generator=generator), dim=0)
    written = torch.randn(50, d, generator=generator)
    written -= (written @ direction)[:, None] * direction  # nobody else writes it
    written[[3, 17, 40]] = direction * torch.tensor([2.0, 1.0, 1.0])[:, None]
    inputs = torch.rand(n, 50, generator=generator)
    on = torch.arange(n) % 3 == 0
    inputs[:, [3, 17, 40]] = on[:, None].float()
    W = torch.stack([direction, -direction])
    sae = Sae(
        W_enc=W,
        b_enc=torch.tensor([-1.0, -1.0]),
        W_dec=W,
        b_dec=torch.zeros(d),
        b_in=torch.zeros(d),
        activation=Relu(),
    )
    config = writers.Config(n_named=3)
    document = np.arange(n) // 10
    table, row = writers.of_site(
        sae, inputs, written, inputs @ written, np.arange(50), document, config
    )
    mine = table[table["latent"] == 0].sort_values("rank")
    assert mine["writer"].tolist()[0] == 3
    assert set(mine["writer"]) == {3, 17, 40}
    np.testing.assert_allclose(mine["share"], [0.5, 0.25, 0.25], atol=0.01)
    assert row["silenced"] == 1.0
    assert row["control"] < 0.2
