"""Traces through transcoders against a slow linear copy of the model, edits by hand, and
circuit-tracer itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from data.model.language_model import LanguageModel
from data.model.spec import Random
from featureflow.errors import UserError
from featureflow.sites import Site, parse_site
from pipeline.run import Run
from pipeline.trace.document import document_of, lines_of
from pipeline.trace.stream import Target, input_of, traced
from pipeline.trace.trace import TraceOptions, trace_of
from pipeline.trace.transcoders import direct_effects, scores_of
from sae import Relu, Sae
from sae.formats import write_circuit_tracer
from tests.sae.peers import run_peer

N_LAYERS, D, N_LATENTS = 3, 16, 20
IDS = [256, 40, 77, 300, 41, 90]
TARGET = Target(answer=301, foil=17)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.open(
        Random(n_layers=N_LAYERS, d_model=D, n_heads=2, d_mlp=24, scale=2.0), dtype="float32"
    )


def transcoder(layer: int, width: int = D, *, skip: bool = True) -> Sae:
    g = torch.Generator().manual_seed(layer)
    return Sae(
        W_enc=torch.randn(N_LATENTS, width, generator=g),
        b_enc=torch.randn(N_LATENTS, generator=g) - 1,
        W_dec=torch.nn.functional.normalize(torch.randn(N_LATENTS, width, generator=g), dim=1),
        b_dec=torch.randn(width, generator=g) * 0.1,
        b_in=torch.randn(width, generator=g) * 0.1,
        activation=Relu(),
        W_skip=torch.randn(width, width, generator=g) * 0.1 if skip else None,
        metadata={"reads": f"blocks.{layer}.hook_resid_mid", "skip": skip},
    )


@pytest.fixture(scope="module")
def saes() -> dict[Site, Sae]:
    return {Site(layer, "mlp_out"): transcoder(layer) for layer in range(N_LAYERS)}


class LinearCopy:
    """A Llama written out: patterns and norm scales of the prompt are written down once, then
    vectors are added to MLP outputs and embeddings, and everything else follows linearly."""

    def __init__(self, model: LanguageModel, saes: dict[Site, Sae]) -> None:
        self.hf, self.saes = model.hf, [saes[site] for site in sorted(saes)]
        self.held: list[tuple[Tensor, ...]] = []
        self.last = torch.zeros(0)
        self.y, self.pre = self.run()

    @torch.no_grad()
    def run(self, at_mlp=(), at_embedding: Tensor | None = None, *, features=False):
        """y and the pre-activations `[layer, token, latent]` with vectors added."""
        h = self.hf.model.embed_tokens(torch.tensor(IDS))
        h = h if at_embedding is None else h + at_embedding
        first, pres = not self.held, []
        for layer, block in enumerate(self.hf.model.layers):
            mid, out = self._block(h, block, layer, first)
            sae, held = self.saes[layer], self.held[layer]
            pres.append((mid - sae.b_in) @ sae.W_enc.T + sae.b_enc)
            moved = mid - held[2]
            out = out + moved @ sae.W_skip.T
            if features:
                active = (held[2] - sae.b_in) @ sae.W_enc.T + sae.b_enc > 0
                active[0] = False
                out = out + (moved @ sae.W_enc.T * active) @ sae.W_dec
            for place, token, vector in at_mlp:
                if place == layer:
                    out[token] = out[token] + vector
            h = mid + out
        if first:
            self.last = scale_of(h, self.hf.model.norm)
        logits = self.hf.lm_head(h * self.last * self.hf.model.norm.weight)[-1]
        return float(logits[TARGET.answer] - logits[TARGET.foil]), torch.stack(pres)

    def _block(self, h, block, layer, first):
        attention, n_heads = block.self_attn, self.hf.config.num_attention_heads
        if first:
            x = h * scale_of(h, block.input_layernorm) * block.input_layernorm.weight
            q, k = (
                projection(x).view(len(x), n_heads, -1).transpose(0, 1)[None]
                for projection in (attention.q_proj, attention.k_proj)
            )
            turned = self.hf.model.rotary_emb(x[None], torch.arange(len(x))[None])
            q, k = apply_rotary_pos_emb(q, k, *turned)
            late = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
            scores = (q @ k.transpose(2, 3))[0] * attention.scaling
            pattern = scores.masked_fill(late, -1e9).softmax(-1)
            scale = scale_of(h, block.input_layernorm)
        else:
            scale, pattern = self.held[layer][:2]
        v = attention.v_proj(h * scale * block.input_layernorm.weight)
        z = pattern @ v.view(len(v), n_heads, -1).transpose(0, 1)
        mid = h + attention.o_proj(z.transpose(0, 1).flatten(1))
        if first:
            norm = block.post_attention_layernorm
            out = block.mlp(mid * scale_of(mid, norm) * norm.weight)
            self.held.append((scale, pattern, mid, out))
        return mid, self.held[layer][3].clone()


def scale_of(h: Tensor, norm) -> Tensor:
    return (h.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()


@pytest.fixture(scope="module")
def copy(model, saes) -> LinearCopy:
    return LinearCopy(model, saes)


@pytest.fixture(scope="module")
def found(model, saes):
    return traced(model, saes, IDS, sorted(saes), TARGET)


def test_direct_effects_are_those_of_the_model_written_out(found, saes, copy):
    assert found.y == pytest.approx(copy.y, abs=1e-4)
    graph = direct_effects(found, most=10_000)
    rows = list(graph.features.itertuples())
    n, n_tokens = len(rows), len(IDS)
    assert n > 60
    sources = []
    for row in rows:
        layer = parse_site(row.cut).layer
        vector = row.z * saes[Site(layer, "mlp_out")].W_dec[row.latent]
        sources.append(([(layer, row.token, vector)], None))
    for layer in range(N_LAYERS):
        mid, out = copy.held[layer][2:]
        error = out - saes[Site(layer, "mlp_out")](mid)
        error[0] = 0
        sources += [([(layer, token, error[token])], None) for token in range(n_tokens)]
    embedding = copy.hf.model.embed_tokens(torch.tensor(IDS)).detach()
    for token in range(n_tokens):
        one = torch.zeros_like(embedding)
        one[token] = embedding[token]
        sources.append(([], one))
    assert graph.effects.shape == (n + 1, len(sources))
    for column, (at_mlp, at_embedding) in enumerate(sources):
        y, pre = copy.run(at_mlp, at_embedding)
        change = [float((pre - copy.pre)[parse_site(r.cut).layer, r.token, r.latent]) for r in rows]
        real = torch.tensor([*change, y - copy.y])
        torch.testing.assert_close(graph.effects[:, column], real, rtol=1e-3, atol=2e-4)


def test_a_score_is_the_whole_effect_in_the_linear_model(found, saes, copy):
    features = found.nodes[found.nodes["kind"] == "feature"]
    assert set(features["token"]) == set(range(1, len(IDS)))
    for row in features.iloc[::5].itertuples():
        layer = parse_site(row.cut).layer
        vector = row.z * saes[Site(layer, "mlp_out")].W_dec[row.latent]
        y, _ = copy.run([(layer, row.token, vector)], features=True)
        assert row.score == pytest.approx(y - copy.y, rel=1e-3, abs=2e-4)


def test_the_graph_scores_are_those_of_the_matrix_of_all_paths():
    """Influence by (I − A)⁻¹, with errors and tokens as nodes without inputs."""
    g = torch.Generator().manual_seed(0)
    n, n_errors, n_tokens = 7, 4, 3
    effects = torch.randn(n + 1, n + n_errors + n_tokens, generator=g)
    effects[:, :n] *= torch.ones(n + 1, n).tril(-1)
    size = n + n_errors + n_tokens + 1
    whole = torch.zeros(size, size, dtype=torch.float64)
    whole[:n, :-1], whole[-1, :-1] = effects[:n].double(), effects[n].double()
    whole = whole.abs() / whole.abs().sum(1, keepdim=True).clamp(min=1e-10)
    influence = (torch.linalg.inv(torch.eye(size).double() - whole) - torch.eye(size).double())[-1]
    errors, tokens = influence[n : n + n_errors].sum(), influence[n + n_errors : -1].sum()
    weight = influence.clone()
    weight[-1] += 1
    known = 1 - whole[:, n : n + n_errors].sum(1)
    expected = (float(tokens / (tokens + errors)), float((known * weight).sum() / weight.sum()))
    assert scores_of(effects, n_errors) == pytest.approx(expected, rel=1e-4)


def test_a_removal_is_what_an_edit_of_the_mlp_output_gives(model, saes):
    options = TraceOptions(through="transcoders", n_removed=8, n_shown=4)
    whole = trace_of(model, saes, IDS, target=TARGET, cuts=sorted(saes), flows={}, options=options)
    checks = whole.checks.set_index("check")["value"]
    assert checks["identity"] < 1e-4
    assert checks["sum"] < 1e-5
    assert 0 < checks["replacement score"] < 1
    assert checks["replacement score"] < checks["completeness score"] < 1
    for row in whole.supernodes.itertuples():
        site, latent = parse_site(row.features.split("/")[0]), int(row.features.split("/")[1])
        source = input_of(saes[site], site)
        seen = {}

        def without(out, row=row, site=site, latent=latent, source=source, seen=seen):
            z = saes[site].encode(seen[source][0, row.token])[latent]
            out = out.clone()
            out[0, row.token] -= z * saes[site].W_dec[latent]
            return out

        def keep(h, source=source, seen=seen):
            seen[source] = h
            return h

        with model.edited({source: keep, site: without}):
            logits = model.logits(torch.tensor([IDS]))[0, -1]
        y = float(logits[TARGET.answer] - logits[TARGET.foil])
        assert row.removed == pytest.approx(whole.traced.y - y, abs=1e-4)


def test_a_run_without_transcoders_and_one_that_lacks_a_layer_are_errors(small_run, monkeypatch):
    run = Run.open(small_run.root)
    options = TraceOptions(through="transcoders")
    with pytest.raises(UserError, match="has no transcoders"):
        run.trace("The river", options=options)
    width, n_layers = run.exact_model.d_model, run.exact_model.n_layers
    given = {Site(i, "mlp_out"): transcoder(i, width) for i in range(n_layers)}
    monkeypatch.setitem(run.__dict__, "transcoders", given)
    with pytest.raises(UserError, match="cut at every layer"):
        run.trace("The river", options=options, cuts=["L1"])
    document = document_of(run.trace("The river runs", options=options), run, "The river runs")
    assert document["options"]["through"] == "transcoders"
    assert {"L0.mlp", "L1.mlp"} <= set(document["cuts"])
    assert not any(each["label"] for each in document["supernodes"])
    assert any("replacement score" in line for line in lines_of(document))
    del given[Site(1, "mlp_out")]
    with pytest.raises(UserError, match="a layer has no transcoder"):
        run.trace("The river", options=options)


@pytest.mark.slow
def test_circuit_tracer_gives_the_same_graph(model, saes, found, tmp_path: Path):
    model.hf.save_pretrained(tmp_path / "model")
    write_circuit_tracer(saes, tmp_path / "transcoders", model_name="a-model")
    arrays = {"ids": np.array(IDS), "answer": TARGET.answer, "foil": TARGET.foil}
    np.savez(tmp_path / "case.npz", **arrays)
    (scores,) = run_peer("circuit_tracer", "attribute", str(tmp_path))
    graph, theirs = direct_effects(found, most=10_000), np.load(tmp_path / "graph.npz")
    active = [(parse_site(r.cut).layer, r.token, r.latent) for r in graph.features.itertuples()]
    assert active == [tuple(row) for row in theirs["features"].tolist()]
    n = len(active)
    matrix = torch.from_numpy(theirs["effects"])
    assert matrix.shape[0] == graph.effects.shape[1] + 1
    torch.testing.assert_close(graph.effects[:n], matrix[:n, :-1], rtol=1e-3, atol=2e-4)
    torch.testing.assert_close(graph.effects[n], matrix[-1, :-1], rtol=1e-3, atol=2e-4)
    assert graph.replacement == pytest.approx(scores["replacement"], rel=1e-3)
    assert graph.completeness == pytest.approx(scores["completeness"], rel=1e-3)
