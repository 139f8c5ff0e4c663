"""Traces of planted networks, whose causes are known, and of a small run against edits by hand."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import resources
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pandas as pd
import pytest
import torch
from torch import nn

from featureflow.errors import UserError
from featureflow.sites import Site, parse_site
from pipeline.cli import run_command
from pipeline.run import Run
from pipeline.trace.attribution import attribution_of, read_attribution
from pipeline.trace.batch import checks_over, read_prompts
from pipeline.trace.counterfactual import counterfactual
from pipeline.trace.document import document_of
from pipeline.trace.editing import edit_prompt, plan_json, plan_of
from pipeline.trace.kept import fitting_traces
from pipeline.trace.prompt import trace_prompt
from pipeline.trace.stream import Target, edited, edits_of, run_whole, traced
from pipeline.trace.supernodes import flows_of
from pipeline.trace.trace import TraceOptions, iter_trace, trace_of
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


@pytest.mark.parametrize(("huge", "sinks"), [(1.0, [0]), (300.0, [0, 3])])
def test_the_start_token_and_rows_of_huge_norm_stay_whole(huge, sinks):
    """Its row is one node, scored by its whole part of y; no feature of it is scored or removed."""
    embedding = torch.tensor([[5.0, 1.0], [2.0, 1.0], [1.0, 2.0], [huge, 1.0]])
    everywhere = lambda h: h + h.sum(1, keepdim=True)  # noqa: E731 the last token reads all
    found = planted(embedding, [lambda h: h * 1.0, everywhere], torch.eye(2), [0, 1, 2, 3, 1])
    nodes = found.traced.nodes[found.traced.nodes["cut"] == "L0"]
    whole = nodes[nodes["kind"] == "sink"].set_index("token")
    assert list(whole.index) == sinks
    for token in sinks:
        assert set(nodes[nodes["token"] == token]["kind"]) == {"sink"}
        row = embedding[found.traced.ids[token]]
        assert whole.loc[token, "score"] == pytest.approx(float(row[0] - row[1]))
    assert not set(sinks) & set(found.nodes.query("cut == 'L0'")["token"])
    assert set(nodes[nodes["kind"] == "feature"]["token"]) == set(range(5)) - set(sinks)


def test_a_value_is_set_once_and_does_not_compound_from_cut_to_cut():
    """Twice x at both layers is twice x at the end, not four times."""
    embedding = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    keep = lambda h: h * 1.0  # noqa: E731
    flows = {"L0/0": 7, "L1/0": 7}
    found = planted(embedding, [keep, keep], torch.eye(2), [0, 1], flows=flows, n_removed=9)
    doses = dict(found.supernodes.iloc[0]["doses"])
    assert doses == pytest.approx({0.0: -1, 0.5: 0.5, 1.0: 2, 2.0: 5})
    members = found.members(0)
    moved = edited(found.traced, [members.assign(to=10.0)])
    assert float(moved.y[0]) == pytest.approx(9)


def test_a_model_without_gradients_is_one_clear_error():
    net = Net(torch.eye(2), [Function(lambda h: h.round())], torch.eye(2))
    net.forward = lambda input_ids, use_cache=False: SimpleNamespace(
        logits=net.embedding[input_ids].detach()
    )
    target = Target(answer=0, foil=1)
    with pytest.raises(UserError, match="no gradient"):
        traced(Planted(net), {L0: basis(2)}, [0, 1], [], target)


@pytest.fixture(scope="module")
def run(small_run) -> Run:
    return Run.open(small_run.root)


TEXT = "The river runs to the sea."


@pytest.fixture(scope="module")
def river(run):
    return run.trace(TEXT)


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


def test_edits_that_begin_at_different_layers_are_what_whole_runs_give(run):
    found = trace_prompt(run, TEXT, options=TraceOptions(n_removed=2)).traced
    features = found.nodes[found.nodes["kind"] == "feature"]
    best = [
        here.loc[[here["score"].abs().idxmax()]] for _, here in features.groupby("cut", sort=False)
    ]
    sets = [best[-1], features.iloc[:0], best[0], pd.concat([best[1], best[-1]])]
    readings = [
        (parse_site(each["cut"].iloc[0]), len(found.ids) - 1, [3, 5], torch.tensor([1.0, -2.0]))
        for each in best
    ]
    together = edited(found, sets, readings=readings)
    for row, each in enumerate(sets):
        edits = edits_of(found.saes, [each])
        logits = run_whole(found.model, [found.ids], edits, n_last=1)[0, -1]
        torch.testing.assert_close(together.logits[row], logits, rtol=1e-4, atol=1e-4)
        for number, (cut, token, latents, weights) in enumerate(readings):
            with found.model.edited({site: edit for site, edit in edits.items() if site < cut}):
                h = found.model.activations(torch.tensor([found.ids]), [cut])[cut][0, token]
            expected = float(found.saes[cut].pre_activations(h)[latents] @ weights)
            assert float(together.read[row, number]) == pytest.approx(expected, abs=1e-4)


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
        (TEXT, {"memory_gb": 1e-6}, "memory"),
        (TEXT, {"chat": True}, "chat template"),
    ],
)
def test_what_cannot_be_traced_is_one_clear_error(run, prompt, options, word):
    with pytest.raises(UserError, match=word):
        trace_prompt(run, prompt, **options)


def test_members_of_a_flow_agree_directly_with_the_one_at_the_cut_before(run):
    graph = run.graph
    for cuts in (graph.sites, graph.sites[::2]):
        flows = flows_of(graph, tuple(cuts))
        assert flows
        assert {feature.split("/")[0] for feature in flows} <= {site.short for site in cuts}
        for trunk in graph.trunks(None, min_length=2):
            for a, b in pairwise(f for f in trunk.features if f.site in cuts):
                agrees = graph.node(b)["birth_layer"] <= a.site.layer
                assert agrees == (flows[str(a)] == flows[str(b)])


def test_the_trace_grows_in_three_steps_to_what_it_is_at_once(run):
    model = run.exact_model
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(TEXT)]
    target, cuts = Target(answer=5, foil=6), list(run.saes)[:2]
    steps = list(iter_trace(model, run.saes, ids, target=target, cuts=cuts, flows={}))
    predicted, removed, whole = steps
    assert predicted.supernodes["removed"].isna().all()
    assert "control" not in removed.supernodes
    assert (removed.supernodes["removed"] == whole.supernodes["removed"]).all()
    assert len(whole.checks) > 5


def test_the_heads_parts_add_up_to_what_attention_writes(run, river):
    """Against the last layer's strength read from the stream by hand."""
    found = river
    assert len(found.heads)
    for number, rows in found.heads.groupby("supernode"):
        row = found.supernodes.set_index("supernode").loc[number]
        site, token = parse_site(row["peak"]), int(row["token"])
        members = found.members(number).query("cut == @site.short")["latent"].tolist()
        sae, g = run.saes[site], found.traced.gradient[site][0, token]
        w = sae.W_enc[members].T @ (sae.W_dec[members] @ g)
        ids = torch.tensor([found.traced.ids])
        sites = [Site(layer, "attn_out") for layer in range(site.layer + 1)]
        seen = run.exact_model.activations(ids, sites)
        wrote = sum(float(h[0, token] @ w) for h in seen.values())
        assert rows["heads"].iloc[0] == pytest.approx(wrote, abs=1e-5)
        n = run.exact_model.hf.config.num_attention_heads * (site.layer + 1)
        if n <= len(rows):
            assert rows["part"].sum() == pytest.approx(wrote, abs=1e-4)
        assert (rows["source"] >= 0).all()
        assert (rows["source"] <= token).all()


def test_the_command_prints_a_trace_and_keeps_it_with_the_run(small_run, tmp_path, capsys):
    shutil.copytree(small_run.root, tmp_path / "run")
    words = ["trace", TEXT, "--artifacts", str(tmp_path), "--recipe", "run"]
    assert run_command([*words, "--removed", "4", "--shown", "3"]) == 0
    text = capsys.readouterr().out
    for word in ("against", "y = ", "identity", "completeness", "largest activations", "control"):
        assert word in text
    folder = Path(text.splitlines()[-1])
    assert folder.parent == tmp_path / "run" / "traces"
    assert folder.name.startswith("the-river-runs-to-the-sea-")
    tables = {path.stem for path in folder.glob("*.parquet")}
    assert tables == {"supernodes", "edges", "checks", "nodes", "heads"}
    run = Run.open(tmp_path / "run")
    document = run.kept_trace(folder.name)
    assert len(document["supernodes"]) == 4
    assert document["prompt"] == TEXT
    digests = {name: artifact.digest for name, artifact in run.artifacts.items()}
    assert fitting_traces(run.root, digests).keys() == {folder.name}
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["inputs"]["describe"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="do not belong together"):
        Run.open(tmp_path / "run").kept_trace(folder.name)
    with pytest.raises(UserError, match="no trace"):
        run.kept_trace("../link")
    assert fitting_traces(run.root, digests) == {}


def test_many_prompts_are_traced_and_summed_up(small_run, tmp_path, capsys):
    shutil.copytree(small_run.root, tmp_path / "run")
    file = tmp_path / "prompts.txt"
    file.write_text(TEXT + "\n\n" + json.dumps({"prompt": "A stone, a bird.", "foil": " a"}) + "\n")
    words = ["trace", "--prompts", str(file), "--artifacts", str(tmp_path), "--recipe", "run"]
    assert run_command([*words, "--removed", "3"]) == 0
    text = capsys.readouterr().out
    assert "2 of 2: A stone, a bird." in text
    assert "in several prompts" in text or "completeness" in text
    assert len(list((tmp_path / "run" / "traces").iterdir())) == 2
    assert run_command(["trace", *words[3:]]) == 2
    file.write_text('{"prompt": 5}\n{"word": "x"}\n')
    with pytest.raises(UserError) as error:
        read_prompts(file)
    assert len(error.value.problems) == 2


def test_checks_are_averaged_over_prompts(run):
    documents = [
        document_of(run.trace(text, options=TraceOptions(n_removed=3)), run, text)
        for text in (TEXT, "A stone and a bird.")
    ]
    rows = checks_over(documents).set_index("check")
    values = [
        next(each["value"] for each in d["checks"] if each["check"] == "completeness")
        for d in documents
    ]
    assert rows.loc["completeness", "mean"] == pytest.approx(sum(values) / 2)
    assert rows.loc["completeness", "n"] == 2


def test_without_a_label_a_supernode_is_named_by_its_tokens_before_late_layers(small_run):
    run = Run.open(small_run.root)
    run.features.table["label_accepted"] = False
    cards = run.features.table.set_index("feature")
    document = document_of(run.trace(TEXT, cuts=["L0", "L1", "L2"]), run, TEXT)
    for node in document["supernodes"]:
        tokens = cards.loc[node["members"][-1]["feature"], "tokens"]
        early = f"active on {', '.join(f'‘{token}’' for token in tokens)}"
        late = f"promotes {', '.join(node['promotes'])}"
        assert node["name"] == (late if node["first_layer"] == 2 else early)
    assert {node["first_layer"] for node in document["supernodes"]} > {0}


def test_the_attribution_graph_is_shown_whole_and_read_back(run, river, tmp_path):
    document = document_of(river, run, TEXT)
    graph = attribution_of(document, slug="river")
    schema = resources.files("pipeline.site") / "schemas" / "attribution-graph.schema.json"
    jsonschema.validate(graph, json.loads(schema.read_text()))
    ids = [node["node_id"] for node in graph["nodes"]]
    assert len(set(ids)) == len(ids)
    assert {e["source"] for e in graph["links"]} | {e["target"] for e in graph["links"]} <= set(ids)
    influence = [node["influence"] for node in graph["nodes"] if node["influence"] is not None]
    assert len(influence) > 10
    assert max(influence) <= graph["metadata"]["node_threshold"]
    n_tokens = len(document["pieces"])
    often = Counter((n["layer"], n["feature"], n["ctx_idx"]) for n in graph["nodes"])
    assert max(often.values()) <= n_tokens * 2 / 3
    assert {n["feature_type"] for n in graph["nodes"]} >= {"mlp reconstruction error", "logit"}
    first = document["supernodes"][0]
    assert graph["qParams"]["supernodes"][0][0] == first["name"]
    path = tmp_path / "river.json"
    path.write_text(json.dumps(graph))
    read = read_attribution(path)
    assert read["pieces"] == document["pieces"]
    assert [s["name"] for s in read["supernodes"]][:12] == [
        s["name"] for s in document["supernodes"]
    ][:12]
    assert read["supernodes"][0]["predicted"] == pytest.approx(first["removed"], abs=1e-4)
    edges = {(e["source"], e["target"]) for e in document["edges"] if e["drawn"]}
    order = [s["id"] for s in document["supernodes"]]
    assert {(order[e["source"]], order[e["target"]]) for e in read["edges"]} == edges


def test_a_graph_of_circuit_tracer_is_kept_for_the_atlas(small_run, tmp_path, capsys):
    """Its error of layer 1 has the id of feature 1 of layer 0; it is told by its type."""

    def node(name, layer, kind, **rest):
        return {"node_id": name, "layer": layer, "ctx_idx": 0, "feature_type": kind, **rest}

    graph = {
        "metadata": {"scan": "gemma", "prompt": "A b", "prompt_tokens": ["A", " b"]},
        "qParams": {"supernodes": [["letters", "0_1_0"]], "pinnedIds": []},
        "nodes": [
            node("E_5_0", "E", "embedding"),
            node("0_1_0", "0", "cross layer transcoder", clerp="A", influence=0.4),
            node("3_9_0", "3", "logit", is_target_logit=True, clerp='Output "c"'),
        ],
        "links": [{"source": "0_1_0", "target": "3_9_0", "weight": 0.25}],
    }
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(graph))
    shutil.copytree(small_run.root, tmp_path / "run")
    words = ["--artifacts", str(tmp_path), "--recipe", "run"]
    assert run_command(["trace", "--graph", str(path), *words]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    kept = Run.open(tmp_path / "run").kept_trace(folder.name)
    assert kept["foreign"] == "gemma"
    assert [(s["name"], s["predicted"]) for s in kept["supernodes"]] == [("letters", 0.25)]
    assert kept["target"] == {"text": 'Output "c"'}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda g: g.pop("nodes"), "nodes"),
        (lambda g: g["nodes"][0].update(ctx_idx=999), "no token"),
        (lambda g: g["nodes"][0].pop("layer"), "layer"),
        (lambda g: g["links"].append({"source": "x", "target": "y", "weight": 1}), "no node"),
        (lambda g: g["metadata"].update(prompt_tokens=[1]), "prompt_tokens"),
    ],
)
def test_what_is_no_attribution_graph_is_refused_with_its_places(
    run, river, tmp_path, change, word
):
    graph = attribution_of(document_of(river, run, TEXT), slug="river")
    change(graph)
    path = tmp_path / "graph.json"
    path.write_text(json.dumps(graph))
    with pytest.raises(UserError, match=word):
        read_attribution(path)


def test_a_pickle_is_refused(tmp_path):
    path = tmp_path / "graph.pt"
    path.write_bytes(b"x")
    with pytest.raises(UserError, match="pickle"):
        read_attribution(path)


def switch(h):
    """The answer's coordinate is won unless both of two features are gone: x0 + x1 against 1."""
    said = torch.stack([h[..., 0] + h[..., 1], torch.ones_like(h[..., 0]), h[..., 2]], -1)
    return said


def test_the_smallest_change_that_flips_the_answer_is_found_by_really_doing_it():
    """Either of two features keeps the answer above the foil; only both together flip it."""
    embedding = torch.tensor([[0.0, 0.0, 0.0], [2.0, 3.0, 0.1]])
    keep = lambda h: h * 1.0  # noqa: E731
    found = planted(embedding, [keep, switch], torch.eye(3), [0, 1], n_removed=9, edge_share=9)
    effect = {row.features: int(row.supernode) for row in found.supernodes.itertuples()}
    at_first = replace(found, supernodes=found.supernodes[
        found.supernodes["features"].isin(["L0/0", "L0/1", "L0/2"])])  # fmt: skip
    flip = counterfactual(at_first)
    assert set(flip.supernodes) == {effect["L0/0"], effect["L0/1"]}
    assert flip.factors == (0.0, 0.0)
    assert flip.flips
    assert flip.y == pytest.approx(-1)
    assert flip.kl_rest == 0  # only the last token is changed
    alone = counterfactual(at_first, most=1)
    assert not alone.flips


def test_a_change_is_the_clamp_by_hand_and_a_value_can_come_from_another_prompt(run):
    model, token = run.exact_model, 3
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(TEXT)]
    site = next(iter(run.saes))
    sae = run.saes[site]
    h = model.activations(torch.tensor([ids]), [site])[site][0]
    latent = int(sae.encode(h)[token].argmax())

    def set_to(value):
        def edit(h):
            h = h.clone()
            h[0, token] += (value - sae.encode(h[0, token])[latent]) * sae.W_dec[latent]
            return h

        with model.edited({site: edit}):
            return model.logits(torch.tensor([ids]))[0, -1].softmax(-1)

    features = [f"{site.short}/{latent}"]
    z = float(sae.encode(h)[token, latent])
    doubled = edit_prompt(run, TEXT, features, token, factor=2.0, n_new_tokens=2)
    expected = set_to(2 * z).topk(5).values.tolist()
    assert [p for _, p in doubled["after"]] == pytest.approx(expected, abs=1e-4)
    other = "A stone and a bird and a stone."
    theirs = [model.tokenizer.bos_id, *model.tokenizer.encode(other)]
    values = sae.encode(model.activations(torch.tensor([theirs]), [site])[site][0])[1:, latent]
    moved = edit_prompt(run, TEXT, features, token, other=other, n_new_tokens=0)
    expected = set_to(float(values.max())).topk(5).values.tolist()
    assert [p for _, p in moved["after"]] == pytest.approx(expected, abs=1e-4)
    with pytest.raises(UserError, match="no such features"):
        edit_prompt(run, TEXT, ["L77/1"], token)
    with pytest.raises(UserError, match="no token"):
        edit_prompt(run, TEXT, features, 99)


def test_a_supernode_becomes_a_steering_plan_of_this_run(run, tmp_path):
    site = next(iter(run.saes))
    ids = torch.tensor(
        [[run.exact_model.tokenizer.bos_id, *run.exact_model.tokenizer.encode(TEXT)]]
    )
    latent = int(
        run.saes[site].encode(run.exact_model.activations(ids, [site])[site][0])[3].argmax()
    )
    plan = plan_of(run, TEXT, [f"{site.short}/{latent}"], 3, factor=0)
    path = tmp_path / "plan.json"
    path.write_text(plan_json(plan))
    assert run.steering.read_plan(path).nodes == plan.nodes
    assert plan.edit.kind == "ablate"
