"""What leaves the project: files read back, wrappers that behave like the model, an endpoint that
speaks the protocol.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
import torch
from gguf import GGUFReader
from safetensors import safe_open

from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.describe.chat import ChatModel
from pipeline.lenses.steering.judge import (
    AXBENCH,
    SAE_TS,
    Judge,
    Judged,
    question_text,
    read_rating,
    readable_share,
    spread,
    verdict_of,
)
from pipeline.serve.endpoint import Endpoint, make_server
from steering.edits import Add, Floor
from steering.exports import neuronpedia_request, write_gguf, write_vectors
from steering.generation import Sampling, generate, stream
from steering.hooks import applied
from steering.plan import Node, Plan
from steering.plan_files import plan_document
from steering.scopes import AfterToken
from steering.wrapper import SteeredModel

FLOW = Plan(
    nodes=(
        Node(at="L1/3", scale=4.0, weight=0.5),
        Node(at="L2/5", scale=6.0, weight=0.5),
        Node(at="L2/7", scale=1.0),
    ),
    strength=1.5,
    name="flow",
)
IDS = torch.tensor([[5, 9, 11, 9, 30, 7]])


def test_a_control_vector_read_back_steers_like_the_plan(model, saes, tmp_path):
    """Directions from the file, added by hand at the output of their blocks, against the plan
    itself."""
    path = write_gguf(FLOW, saes, tmp_path / "flow.gguf", model_type="llama")
    read = {tensor.name: torch.tensor(tensor.data) for tensor in GGUFReader(path).tensors}
    assert sorted(read) == ["direction.1", "direction.2"]
    handles = [
        model.hf.base_model.layers[int(name[-1])].register_forward_hook(
            lambda module, inputs, out, v=vector: (
                (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v
            )
        )
        for name, vector in read.items()
    ]
    with torch.no_grad():
        by_hand = model.hf(input_ids=IDS).logits
    for handle in handles:
        handle.remove()
    with torch.no_grad(), applied(model, saes, replace(FLOW, skip_first=0)):
        torch.testing.assert_close(model.hf(input_ids=IDS).logits, by_hand, atol=1e-5, rtol=1e-4)


def test_what_a_control_vector_cannot_hold_is_refused_with_the_reason(saes, tmp_path):
    with pytest.raises(UserError, match="depends on the activation"):
        write_gguf(replace(FLOW, edit=Floor()), saes, tmp_path / "a.gguf", model_type="llama")
    early = replace(FLOW, nodes=(Node(at="L0/1"), *FLOW.nodes), scope=AfterToken(token=3))
    with pytest.raises(UserError) as caught:
        write_gguf(early, saes, tmp_path / "b.gguf", model_type="llama")
    assert "block 0" in str(caught.value)
    assert "every token" in str(caught.value)


def test_plain_vectors_carry_their_plan(saes, tmp_path):
    with safe_open(write_vectors(FLOW, saes, tmp_path / "v.safetensors"), "pt") as stream:
        vector = stream.get_tensor("blocks.2.hook_resid_post")
        document = json.loads(stream.metadata()["plan"])
    expected = 1.5 * (
        0.5 * 6.0 * saes[Site(2, "resid_post")].W_dec[5] + saes[Site(2, "resid_post")].W_dec[7]
    )
    torch.testing.assert_close(vector, expected)
    assert document["nodes"][0]["at"] == "L1/3"


def test_neuronpedias_request_names_every_feature():
    sources = {Site(1, "resid_post"): "1-res", Site(2, "resid_post"): "2-res"}
    body = neuronpedia_request(FLOW, model_id="m", sources=sources, prompt="I think")
    assert [(f["layer"], f["index"], f["strength"]) for f in body["features"]] == [
        ("1-res", 3, 3.0),
        ("2-res", 5, 4.5),
        ("2-res", 7, 1.5),
    ]
    with pytest.raises(UserError, match="no source"):
        neuronpedia_request(FLOW, model_id="m", sources={}, prompt="x")


@pytest.mark.parametrize(
    "plan", [replace(FLOW, edit=Add(keep_norm=True)), replace(FLOW, scope=AfterToken(token=3))]
)
def test_neuronpedia_is_not_asked_for_what_it_would_do_otherwise(plan):
    sources = {Site(1, "resid_post"): "1-res", Site(2, "resid_post"): "2-res"}
    with pytest.raises(UserError, match="Neuronpedia"):
        neuronpedia_request(plan, model_id="m", sources=sources, prompt="I think")


def test_a_steered_model_is_called_like_the_model(model, saes):
    steered = SteeredModel(model, saes, FLOW)
    with torch.no_grad():
        plain = model.hf(input_ids=IDS).logits
        got = steered(input_ids=IDS).logits
        with applied(model, saes, FLOW):
            expected = model.hf(input_ids=IDS).logits
    assert torch.equal(got, expected)
    assert not torch.equal(got, plain)
    assert steered.config is model.hf.config
    with torch.no_grad():
        assert torch.equal(model.hf(input_ids=IDS).logits, plain)


def test_generate_of_the_wrapper_is_greedy_decoding_with_the_plan(model, saes):
    """Against our own loop: the plan is applied at every decoding step, with the cache, under left
    padding."""
    from steering.sequences import encoded, padded

    prompts = ["I think that", "A"]
    ours = generate(model, saes, prompts, [FLOW], sampling=Sampling(n_tokens=6, temperature=0))
    batch = padded([encoded(model, prompt) for prompt in prompts])
    out = SteeredModel(model, saes, FLOW).generate(
        batch.ids,
        attention_mask=batch.real.long(),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
    )
    for row, sample in zip(out[:, batch.ids.shape[1] :].tolist(), ours.samples, strict=True):
        assert tuple(row[: len(sample.ids)]) == sample.ids
    with pytest.raises(UserError, match="beams"):
        SteeredModel(model, saes, FLOW).generate(IDS, num_beams=2)


def test_an_evaluation_harness_scores_and_continues_with_the_steered_model(model, saes):
    """The two requests of lm-evaluation-harness, as its Hugging Face adapter makes them:
    log-likelihoods of continuations from one right-padded batch (mask and cache left to the model),
    and left-padded greedy continuation until a stop. Against our own passes with the plan applied,
    one sequence at a time."""
    steered = SteeredModel(model, saes, FLOW).eval()
    pairs = [([5, 6, 7], [8, 9]), ([11], [12, 13, 14])]
    width = max(len(context) + len(continuation) for context, continuation in pairs) - 1
    rows = [(context + continuation)[:-1] for context, continuation in pairs]
    batch = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=steered.device)
    with torch.no_grad():
        log_probs = steered(batch).logits.log_softmax(-1)
    for row, (context, continuation) in enumerate(pairs):
        end = len(context) + len(continuation) - 1
        got = (
            log_probs[row, end - len(continuation) : end]
            .gather(1, torch.tensor(continuation)[:, None])
            .sum()
        )
        with torch.no_grad(), applied(model, saes, FLOW):
            alone = (
                model.hf(input_ids=torch.tensor([context + continuation])).logits[0].log_softmax(-1)
            )
        expected = alone[len(context) - 1 : -1].gather(1, torch.tensor(continuation)[:, None]).sum()
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    contexts = torch.tensor([[5, 6, 7], [0, 0, 11]])
    made = steered.generate(
        input_ids=contexts,
        attention_mask=torch.tensor([[1, 1, 1], [0, 0, 1]]),
        max_length=7,
        do_sample=False,
        pad_token_id=0,
        use_cache=True,
    )
    assert made.shape[1] <= 7
    for row, context in zip(made.tolist(), ([5, 6, 7], [11]), strict=True):
        ids = list(context)
        for token in row[3:]:
            with torch.no_grad(), applied(model, saes, FLOW) as run:
                run.expect_prompt(len(context))
                assert int(model.hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


@pytest.fixture(scope="module")
def address(model, saes):
    endpoint = Endpoint(
        model=model,
        saes=saes,
        plans={"flow": FLOW, "idle": replace(FLOW, scope=AfterToken(token=499))},
    )
    with make_server(endpoint, port=0).running() as address:
        yield address


def ask(url, body=None, headers=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        url, data=data, headers={"Content-Type": "application/json", **(headers or {})}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()


def refused(url, body, headers=None):
    with pytest.raises(urllib.error.HTTPError) as caught:
        ask(url, body, headers)
    return caught.value.code, caught.value.read().decode()


def test_the_endpoint_lists_plans_as_models(model, address):
    names = [entry["id"] for entry in json.loads(ask(f"{address}/v1/models"))["data"]]
    assert names == [model.name, f"{model.name}:flow", f"{model.name}:idle"]


def test_the_endpoint_writes_what_the_library_writes(model, saes, address):
    body = {"prompt": "I think", "max_tokens": 5, "temperature": 0, "logprobs": 1}
    steered = json.loads(ask(f"{address}/v1/completions", {**body, "model": f"{model.name}:flow"}))
    made = generate(
        model, saes, ["I think"], [FLOW], sampling=Sampling(n_tokens=5, temperature=0)
    ).samples[0]
    assert steered["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(
        list(made.log_probs), abs=1e-4
    )
    assert steered["steering"]["tokens"] > 0
    sent = {**body, "steering": {"document": plan_document(FLOW)}}
    by_document = json.loads(ask(f"{address}/v1/completions", sent))
    assert by_document["choices"][0]["text"] == steered["choices"][0]["text"]
    events = ask(f"{address}/v1/completions", {**sent, "stream": True}).split("\n\n")
    assert events[-2] == "data: [DONE]"
    pieces = [
        json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]
    ]
    assert steered["choices"][0]["text"].startswith("".join(pieces))


def test_bad_requests_are_refused_with_the_reason(model, address):
    url = f"{address}/v1/completions"
    for body, word in (
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": "a", "temperature": "hot"}, "number"),
        ({"prompt": "a", "steering": {"document": {"schema": 1}}}, "nodes"),
        ({"prompt": "a", "max_tokens": 3, "steering": {"plan": "idle"}}, "touched no token"),
    ):
        code, text = refused(url, body)
        assert code == 400
        assert word in text
    for name in ("m", f"{model.name}:none", "", "m:flow"):
        code, text = refused(url, {"prompt": "a", "model": name})
        assert (code, f"no model {name!r}" in text) == (404, True)
    assert refused(url, {"prompt": "a", "steering": {"plan": "none"}})[0] == 404
    assert refused(url, {"prompt": "a"}, {"Host": "evil.example"})[0] == 403


def events(text):
    return [
        json.loads(line.removeprefix("data: "))
        for line in text.split("\n\n")
        if line.startswith("data: {")
    ]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_stream_carries_what_the_whole_answer_does(model, address, path):
    chat = path.startswith("chat")
    body = {"messages": [{"role": "user", "content": "the dog"}], "logprobs": True}
    body = body if chat else {"prompt": "the dog", "logprobs": 0}
    body |= {"model": f"{model.name}:flow", "max_tokens": 5, "temperature": 0}
    url = f"{address}/v1/{path}"
    whole = json.loads(ask(url, body))["choices"][0]
    parts = [e["choices"][0] for e in events(ask(url, {**body, "stream": True}))]

    def text(choice, key):
        return choice[key]["content"] if chat else choice["text"]

    def values(choice):
        told = choice["logprobs"] or {}
        return (
            [each["logprob"] for each in told.get("content", [])]
            if chat
            else told.get("token_logprobs", [])
        )

    assert "".join(text(part, "delta") for part in parts) == text(whole, "message")
    assert [value for part in parts for value in values(part)] == pytest.approx(values(whole))
    assert len(values(whole)) == 5
    assert [part["finish_reason"] for part in parts][-2:] == [None, whole["finish_reason"]]


def test_a_streamed_request_fails_as_loudly_as_a_whole_one(address):
    url = f"{address}/v1/completions"
    code, text = refused(url, {"prompt": "word " * 3000, "stream": True})
    assert (code, "do not fit" in text) == (400, True)
    idle = events(
        ask(url, {"prompt": "a", "max_tokens": 3, "steering": {"plan": "idle"}, "stream": True})
    )
    assert "touched no token" in idle[-1]["error"]["message"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Rating: [[2]]", 2),
        ("It reads well, so: [[ 1 ]].", 1),
        (" 0\nBecause", 0),
        ("Rating: 2", 2),
        ("2.", 2),
        ("[[3]]", None),
        ("[[-1]]", None),
        ("7 out of 10", None),
        ("2/2", 2),
        ("1 out of 2, since it wanders", 1),
        ("<think>0 is too low, so [[1]]?</think>Rating: [[2]]", 2),
        ("<think>It is about cooking, so Rating: [[2]]", None),
        ("Rating: [[1]] or Rating: [[2]]", None),
        ("Rating: [[1]], in short [[1]]", 1),
        ("On a scale from [[0]] to [[2]]: [[1]]", None),
        ("0 = not at all, 1 = in part, 2 = clearly", None),
        ("0 to 2", None),
        ("1, or maybe 2", None),
        ("-1", None),
        ("Rating: 1 (0 would be broken)", None),
        ("2, since 2 fits", 2),
        ("1. The text is coherent and sensible.", None),
        ("1) It reads well", None),
        ("1.5", None),
        ("from 0 to 2", None),
        ("I would say 2", None),
        ("1: it is broken. 2: it reads well.", None),
        ("Rating: 1 : in part", None),
        ("", None),
        ("user: Rate", None),
    ],
)
def test_only_an_answer_in_form_is_read(answer, expected):
    assert read_rating(AXBENCH.questions[0], answer) == expected


def test_totals_are_the_papers():
    def total(rubric, *answers):
        named = {
            question.name: answer
            for question, answer in zip(rubric.questions, answers, strict=True)
        }
        return verdict_of(rubric, named).total

    assert total(AXBENCH, "[[2]]", "[[1]]", "[[2]]") == pytest.approx(1.5)
    assert total(AXBENCH, "[[2]]", "[[0]]", "[[2]]") == 0
    assert total(AXBENCH, "[[2]]", "hm", "[[2]]") is None
    assert total(SAE_TS, "[[10]]", "[[5.5]]") is None
    assert total(SAE_TS, "[[10]]", "[[1]]") == 0
    assert total(SAE_TS, "[[4]]", "[[7]]") == pytest.approx(3 / 9 * 6 / 9)
    verdicts = [
        verdict_of(SAE_TS, {"behaviour": b, "coherence": "[[3]]"}) for b in ("[[1]]", "[[9]]", "no")
    ]
    assert readable_share(SAE_TS, verdicts) == pytest.approx(
        {"behaviour": 2 / 3, "coherence": 1.0, "all": 2 / 3}
    )
    assert spread(SAE_TS, verdicts) == {"behaviour": 2, "coherence": 1}


def test_a_judge_asks_a_real_endpoint_and_says_what_it_could_not_read(model, saes, address):
    """The endpoint's model is random: what it answers is what the model writes after the
    question."""
    judge = Judge(chat=ChatModel(url=f"{address}/v1", model=model.name), max_tokens=6)
    each = Judged(concept="cooking", prompt="I think", text="I think soup")
    (verdict,) = judge.judge(AXBENCH, [each])
    question = f"user: {question_text(AXBENCH.questions[1], each)}\nassistant:"
    ids, sampling = tuple(model.tokenizer.encode(question)), Sampling(n_tokens=6, temperature=0)
    steps = list(stream(model, saes, ids, [None], sampling=sampling))
    written = model.tokenizer.decode([step.ids[0] for step in steps])
    assert verdict.answers["relevance"] == written
    assert verdict.total is None or set(verdict.ratings) == set(verdict.answers)
    with pytest.raises(UserError, match="404"):
        Judge(chat=ChatModel(url=address, model="m"), max_tokens=2).judge(SAE_TS, [each])
