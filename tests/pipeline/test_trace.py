"""Traces of planted networks, whose causes are known, and of a small run against edits by hand."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from featureflow.errors import UserError
from featureflow.sites import Site, parse_site
from pipeline.cli import run_command
from pipeline.lenses.base import fitting
from pipeline.run import Run
from pipeline.trace.prompt import trace_prompt
from pipeline.trace.stream import Target
from pipeline.trace.trace import TraceOptions, trace_of
from sae import Relu, Sae

L0, L1 = Site(0, "resid_post"), Site(1, "resid_post")


class Net(nn.Module):
    """Blocks that map the stream, between an embedding and a readout."""

    def __init__(self, embedding, blocks, readout) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding)
        self.readout = nn.Parameter(readout)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, input_ids, use_cache=False):
        h = self.embedding[input_ids]
        for block in self.blocks:
            h = block(h)
        return SimpleNamespace(logits=h @ self.readout)


class Planted:
    """A net with sites after its blocks."""

    def __init__(self, net: Net) -> None:
        self.hf, self.name = net, "planted"

    @contextmanager
    def edited(self, edits):
        with ExitStack() as handles:
            for site, edit in edits.items():
                hook = self.hf.blocks[site.layer].register_forward_hook(
                    lambda module, args, out, edit=edit: edit(out)
                )
                handles.callback(hook.remove)
            yield


class Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, h):
        return self.function(h)


def basis(width: int) -> Sae:
    """Every coordinate is a feature."""
    return Sae(
        W_enc=torch.eye(width),
        b_enc=torch.zeros(width),
        W_dec=torch.eye(width),
        b_dec=torch.zeros(width),
        b_in=torch.zeros(width),
        activation=Relu(),
    )


def planted(embedding, blocks, readout, ids, *, flows=None, foil=1, **options):
    net = Net(embedding, [Function(block) for block in blocks], readout)
    saes = {Site(layer, "resid_post"): basis(embedding.shape[1]) for layer in range(len(blocks))}
    target = Target(answer=0, foil=foil)
    return trace_of(
        Planted(net),
        saes,
        ids,
        target=target,
        cuts=list(saes),
        flows=flows or {},
        options=TraceOptions(**{"share": 1.0, **options}),
    )


def test_in_a_linear_net_score_removal_and_integrated_gradients_agree():
    generator = torch.Generator().manual_seed(0)
    embedding, readout = (torch.rand(n, m, generator=generator) for n, m in ((6, 5), (5, 3)))
    first, second = (torch.rand(5, 5, generator=generator) for _ in range(2))

    def block(weight):
        def function(h):
            before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
            return h @ weight + before

        return function

    found = planted(embedding, [block(first), block(second)], readout, [0, 3, 4, 5], n_removed=99)
    nodes = found.supernodes
    assert len(nodes) == found.n_groups > 10
    assert nodes["removed"].to_numpy() == pytest.approx(nodes["predicted"].to_numpy(), abs=1e-5)
    checks = found.checks.set_index("check")["value"]
    assert checks["identity"] < 1e-6
    assert checks["sum"] < 1e-5
    assert checks["completeness"] < 1e-5
    assert not nodes["differs"].any()
    edges = found.edges.dropna()
    assert len(edges) > 10
    assert edges["removed"].to_numpy() == pytest.approx(edges["predicted"].to_numpy(), abs=1e-5)


def test_a_saturated_gate_has_no_gradient_but_a_removal_and_the_trace_says_that_they_differ():
    """y = tanh(8 x): where x = 1 the slope is 4e-6 and the effect 1."""
    embedding = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    gate = lambda h: torch.tanh(8 * h)  # noqa: E731
    found = planted(embedding, [lambda h: h * 1.0, gate], torch.eye(2), [0, 1], n_removed=9)
    first = found.supernodes.set_index("features").loc["L0/0"]
    assert abs(first["predicted"]) < 1e-4
    assert first["removed"] == pytest.approx(1, abs=1e-4)
    assert first["differs"]


def induction(n: int = 5, sharp: float = 12.0):
    """Width 3n: the token, the token before it, what is said next. The first block copies the token
    before; the second looks for places whose token before is the present token, and says theirs."""

    def previous(h):
        token = h[..., :n]
        before = torch.cat([torch.zeros_like(token[:, :1]), token[:, :-1]], 1)
        return torch.cat([token, before, h[..., 2 * n :]], -1)

    def match(h):
        token, before = h[..., :n], h[..., n : 2 * n]
        scores = sharp * token @ before.transpose(1, 2)
        late = torch.ones(scores.shape[1:], dtype=torch.bool).triu()
        pattern = scores.masked_fill(late, -1e9).softmax(-1)
        return torch.cat([token, before, h[..., 2 * n :] + pattern @ token], -1)

    embedding = torch.cat([torch.eye(n), torch.zeros(n, 2 * n)], 1)
    readout = torch.cat([torch.zeros(2 * n, n), torch.eye(n)], 0)
    return embedding, [previous, match], readout


def test_a_hand_set_induction_net_names_the_previous_token_and_the_match():
    """A B C D A → B: at L0 the match needs `before = A` on B, and what B is; at L1 the answer."""
    a, b, c, d, start = 2, 0, 3, 1, 4
    embedding, blocks, readout = induction()
    found = planted(embedding, blocks, readout, [start, a, b, c, d, a], n_removed=20)
    effect = {(row.features, row.token): row.removed for row in found.supernodes.itertuples()}
    before_is_a, b_itself = (f"L0/{5 + a}", 2), (f"L0/{b}", 2)
    says_b, now_a = (f"L1/{10 + b}", 5), (f"L0/{a}", 5)
    causes = (before_is_a, b_itself, says_b, now_a)
    for node in causes:
        assert effect[node] > 0.7, node
    others = [value for node, value in effect.items() if node not in causes]
    assert max(map(abs, others), default=0) < 0.35
    number = {(r.features, r.token): r.supernode for r in found.supernodes.itertuples()}
    edges = {(e.source, e.target): e.removed for e in found.edges.itertuples()}
    assert edges[number[before_is_a], number[says_b]] > 0.7
    assert edges[number[b_itself], number[says_b]] > 0.7


def test_members_of_one_flow_on_one_token_are_removed_together_and_not_twice():
    """x goes on through both layers: taking it off at both is taking it off once."""
    embedding = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    keep = lambda h: h * 1.0  # noqa: E731
    flows = {"L0/0": 7, "L1/0": 7}
    found = planted(embedding, [keep, keep], torch.eye(2), [0, 1], flows=flows, n_removed=9)
    first = found.supernodes.iloc[0]
    assert (first["features"], first["flow"]) == ("L0/0 L1/0", 7)
    assert first["removed"] == pytest.approx(3)
    assert first["predicted"] == pytest.approx(3)  # the largest cut's, not 6


@pytest.fixture(scope="module")
def run(small_run) -> Run:
    return Run.open(small_run.root)


TEXT = "The river runs to the sea."


def test_a_removal_is_what_an_edit_by_hand_gives(run):
    found = trace_prompt(run, TEXT, options=TraceOptions(n_removed=6))
    model, traced = run.exact_model, found.traced
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(TEXT)]
    assert list(traced.ids) == ids
    row = found.supernodes[~found.supernodes["features"].str.contains(" ")].iloc[0]
    site, latent = parse_site(row["features"].split("/")[0]), int(row["features"].split("/")[1])
    sae = run.saes[site]

    def without(h):
        h = h.clone()
        z = sae.encode(h[0, row["token"]])[latent]
        h[0, row["token"]] -= z * sae.W_dec[latent]
        return h

    plain = model.logits(torch.tensor([ids]))[0, -1]
    with model.edited({site: without}):
        after = model.logits(torch.tensor([ids]))[0, -1]
    answer, foil = plain.topk(2).indices.tolist()
    assert (traced.target.answer, traced.target.foil) == (answer, foil)
    expected = (plain[answer] - plain[foil]) - (after[answer] - after[foil])
    assert row["removed"] == pytest.approx(float(expected), abs=1e-4)
    checks = found.checks.set_index("check")["value"]
    assert checks["identity"] < 1e-4
    assert checks["sum"] < 1e-4


def test_the_gradient_is_the_slope_of_the_logits(run):
    """Against a small step along one feature."""
    found = trace_prompt(run, TEXT, options=TraceOptions(n_removed=2)).traced
    features = found.nodes[found.nodes["kind"] == "feature"]
    row = features.loc[features["score"].abs().idxmax()]
    site, step = parse_site(row["cut"]), 1e-2
    direction = run.saes[site].W_dec[int(row["latent"])] * row["z"]

    def pushed(sign):
        def edit(h):
            h = h.clone()
            h[0, int(row["token"])] += sign * step * direction
            return h

        with run.exact_model.edited({site: edit}):
            logits = run.exact_model.logits(torch.tensor([found.ids]))[0, -1]
        return float(logits[found.target.answer] - logits[found.target.foil])

    assert (pushed(1) - pushed(-1)) / (2 * step) == pytest.approx(row["score"], rel=0.02, abs=1e-4)


def test_a_feature_is_explained_by_what_comes_before_it(run):
    last = list(run.saes)[-1]
    h = run.exact_model.activations(
        torch.tensor([[run.exact_model.tokenizer.bos_id, *run.exact_model.tokenizer.encode(TEXT)]]),
        [last],
    )[last][0]
    latent = int(run.saes[last].encode(h)[3].argmax())
    found = trace_prompt(run, TEXT, feature=f"{last.short}/{latent}@3")
    pre = float(run.saes[last].pre_activations(h)[3, latent])
    assert found.traced.y == pytest.approx(pre, abs=1e-4)
    assert all(parse_site(cut) < last for cut in found.nodes["cut"])
    assert (found.nodes["token"] <= 3).all()


@pytest.mark.parametrize(
    ("prompt", "options", "word"),
    [
        ("  ", {}, "empty"),
        ("word " * 4000, {}, "does not fit"),
        (TEXT, {"answer": " several tokens"}, "not one token"),
        (TEXT, {"answer": "a", "foil": "a"}, "the same token"),
        (TEXT, {"feature": "L2/3"}, "no token of the prompt"),
        (TEXT, {"feature": "L2/3@99"}, "no token of the prompt"),
        (TEXT, {"feature": "L2/99999@1"}, "no feature"),
        (TEXT, {"feature": "L0/1@1"}, "no cut lies before"),
        (TEXT, {"cuts": ["L77"]}, "no SAE at these cuts"),
        (TEXT, {"options": TraceOptions(n_removed=10**6)}, "memory"),
        (TEXT, {"chat": True}, "chat template"),
    ],
)
def test_what_cannot_be_traced_is_one_clear_error(run, prompt, options, word):
    with pytest.raises(UserError, match=word):
        trace_prompt(run, prompt, **options)


def test_the_command_prints_a_trace_and_keeps_it_with_the_run(small_run, tmp_path, capsys):
    shutil.copytree(small_run.root, tmp_path / "run")
    words = ["trace", TEXT, "--artifacts", str(tmp_path), "--recipe", "run"]
    assert run_command([*words, "--removed", "4", "--shown", "3"]) == 0
    text = capsys.readouterr().out
    for word in ("against", "y = ", "identity", "completeness", "largest activations", "control"):
        assert word in text
    folder = Path(text.splitlines()[-1])
    assert folder.name.startswith("trace-the-river-runs-to-the-sea-")
    kept = Run.open(tmp_path / "run").lens(folder.name)
    assert set(kept.tables) == {"supernodes", "edges", "checks", "nodes"}
    assert len(kept.tables["supernodes"]) == 4
    assert (folder / "figure.png").is_file()
    assert fitting(Run.open(tmp_path / "run")).keys() == {folder.name}
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["inputs"]["train"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        Run.open(tmp_path / "run").lens(folder.name)
    assert fitting(Run.open(tmp_path / "run")) == {}
