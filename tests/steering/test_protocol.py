"""The endpoint through the protocol's own client: a request gets what it asks for, or is refused by
the name of the field."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
import torch

from data.model.language_model import LanguageModel
from data.model.spec import Packaged
from pipeline.serve.endpoint import Endpoint, make_server
from pipeline.serve.protocol import HARMLESS, NEUTRAL
from steering.generation import Sampling, generate
from steering.plan import Node, Plan

FLOW = Plan(nodes=(Node(at="L1/3", scale=4.0),), strength=2.0, name="flow")
USER = [{"role": "user", "content": "the dog"}]


@pytest.fixture(scope="module")
def address(model, saes):
    endpoint = Endpoint(model=model, saes=saes, plans={"flow": FLOW})
    with make_server(endpoint, port=0).running() as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def written(model, saes, prompt: str, n: int = 1, **sampling) -> list[str]:
    made = generate(model, saes, [prompt], [None], n_samples=n, sampling=Sampling(**sampling))
    return [sample.text for sample in made.samples]


def ids_of(model, prompt: str) -> list[int]:
    return [model.tokenizer.bos_id, *model.tokenizer.encode(prompt)]


def test_several_choices_are_the_librarys_samples_of_one_seed(model, saes, client):
    expected = written(
        model, saes, "the dog", 3, n_tokens=6, temperature=1.0, top_p=1.0, top_k=model.d_vocab
    )
    made = client.completions.create(model=model.name, prompt="the dog", n=3, max_tokens=6, seed=0)
    assert [choice.text for choice in made.choices] == expected
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert len(set(expected)) > 1
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (
        len(ids_of(model, "the dog")),
        18,
    )
    assert made.usage.total_tokens == made.usage.prompt_tokens + 18
    streamed: dict[int, str] = {}
    options = {"include_usage": True}
    for part in client.completions.create(
        model=model.name, prompt="the dog", n=3, max_tokens=6, stream=True, stream_options=options
    ):
        for choice in part.choices:
            streamed[choice.index] = streamed.get(choice.index, "") + choice.text
    assert [streamed[index] for index in range(3)] == expected
    assert part.usage == made.usage


def test_log_probabilities_are_those_of_the_model(model, client):
    """Against one pass over prompt and answer."""
    made = client.completions.create(
        model=model.name, prompt="the dog", max_tokens=4, temperature=0, logprobs=3
    ).choices[0]
    ids = ids_of(model, "the dog")
    tokens = [
        next(i for i in range(model.d_vocab) if model.tokenizer.token_text(i) == text)
        for text in made.logprobs.tokens
    ]
    log_probs = model.logits(torch.tensor([ids + tokens]))[0, len(ids) - 1 :].log_softmax(-1)
    for place, token in enumerate(tokens):
        assert made.logprobs.token_logprobs[place] == pytest.approx(
            float(log_probs[place, token]), abs=1e-4
        )
        values, best = log_probs[place].topk(3)
        named = [model.tokenizer.token_text(int(i)) for i in best]
        assert list(made.logprobs.top_logprobs[place]) == named
        assert list(made.logprobs.top_logprobs[place].values()) == pytest.approx(
            values.tolist(), abs=1e-4
        )
    assert made.text.startswith(made.logprobs.tokens[0])
    assert made.logprobs.text_offset[0] == 0
    none = client.completions.create(model=model.name, prompt="the dog", max_tokens=4, logprobs=0)
    assert len(none.choices[0].logprobs.token_logprobs) == 4
    assert none.choices[0].logprobs.top_logprobs is None
    chat = client.chat.completions.create(
        model=model.name, messages=USER, max_tokens=2, logprobs=True, top_logprobs=2
    ).choices[0]
    assert [len(each.top_logprobs) for each in chat.logprobs.content] == [2, 2]
    assert all(each.bytes for each in chat.logprobs.content)


def test_echo_and_a_stop_string_on_the_last_token(model, saes, client):
    (text,) = written(model, saes, "the dog", n_tokens=6, temperature=0)
    asked = {"model": model.name, "prompt": "the dog", "temperature": 0, "max_tokens": 6}
    echoed = client.completions.create(**asked, echo=True).choices[0]
    assert (echoed.text, echoed.finish_reason) == ("the dog" + text, "length")
    stopped = client.completions.create(**asked, stop=[text[-1]]).choices[0]
    assert (stopped.text, stopped.finish_reason) == (text[: text.index(text[-1])], "stop")
    (first,) = written(model, saes, "the dog", n_tokens=1, temperature=0)
    last = client.completions.create(**{**asked, "max_tokens": 1}, stop=[first[-1]]).choices[0]
    assert (last.text, last.finish_reason) == (first[: first.index(first[-1])], "stop")


@pytest.mark.parametrize("temperature", [1e-9, 1e-40, 1e-300])
def test_a_temperature_near_zero_is_greedy(model, saes, client, temperature):
    expected = written(model, saes, "the dog", n_tokens=4, temperature=0)
    made = client.completions.create(
        model=model.name, prompt="the dog", max_tokens=4, temperature=temperature
    )
    assert [made.choices[0].text] == expected


def test_a_push_that_breaks_the_model_is_an_error_and_no_text(model, client):
    asked = {"model": model.name, "prompt": "the dog", "max_tokens": 4, "logprobs": 2}
    before = client.completions.create(**asked).choices
    far = {"steering": {"plan": "flow", "strength": 1e300}}
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="smaller strength"):
            client.completions.create(**asked, stream=stream, extra_body=far)
    assert client.completions.create(**asked).choices == before


def test_models_are_listed_and_found_by_name_and_others_are_not(model, client):
    assert [entry.id for entry in client.models.list()] == [model.name, f"{model.name}:flow"]
    assert client.models.retrieve(f"{model.name}:flow").id == f"{model.name}:flow"
    for name in ("gpt-4", f"{model.name}:other", model.name.upper()):
        with pytest.raises(openai.NotFoundError, match="no model"):
            client.models.retrieve(name)
        with pytest.raises(openai.NotFoundError, match="no model"):
            client.completions.create(model=name, prompt="a", max_tokens=1)
        with pytest.raises(openai.NotFoundError, match="no model"):
            client.chat.completions.create(model=name, messages=USER, max_tokens=1, stream=True)


def test_null_is_the_default_and_harmless_fields_change_nothing(model, address):
    asked = {"prompt": "a", "max_tokens": 3}
    url = f"{address}/v1/completions"
    plain = httpx.post(url, json=asked).json()["choices"]
    optional = ("model", "n", "stop", "logprobs", "stream", "seed", "steering", "top_p", "echo")
    nulls = dict.fromkeys(optional)
    assert httpx.post(url, json={**asked, **nulls}).json()["choices"] == plain
    given = {**dict.fromkeys(HARMLESS, "x"), **NEUTRAL}
    assert httpx.post(url, json={**asked, **given}).json()["choices"] == plain


def test_a_body_in_chunks_is_read(address):
    content = json.dumps({"prompt": "a", "max_tokens": 2}).encode()
    parts = (content[i : i + 5] for i in range(0, len(content), 5))
    answer = httpx.post(f"{address}/v1/completions", content=parts)
    assert answer.status_code == 200
    too_large = (b"x" * 65536 for _ in range(40))
    answer = httpx.post(f"{address}/v1/completions", content=too_large)
    assert (answer.status_code, "too large" in answer.text) == (400, True)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("the dog", "the dog"),
        ([{"type": "text", "text": "the "}, {"type": "text", "text": "dog"}], "the dog"),
        ([], ""),
        (None, ""),
    ],
)
def test_a_chat_goes_through_the_models_template(model, saes, client, content, text):
    prompt = f"system: be brief\nuser: {text}\nassistant:"
    ids = model.tokenizer.encode(prompt)
    log_probs = model.logits(torch.tensor([ids]))[0, -1]
    made = client.chat.completions.create(
        model=model.name,
        messages=[{"role": "system", "content": "be brief"}, {"role": "user", "content": content}],
        max_tokens=1,
        temperature=0,
        logprobs=True,
    )
    expected = model.tokenizer.token_text(int(log_probs.argmax()))
    assert made.choices[0].logprobs.content[0].token == expected
    assert made.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hello",
        [{"role": "user"}],
        [{"content": "a"}],
        [{"role": "tool", "content": "a"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": 0}],
        [{"role": "user", "content": False}],
        [{"role": "user", "content": {}}],
        [{"role": "user", "content": {"text": "a"}}],
        [{"role": "user", "content": ["a"]}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": "a", "name": "eve"}],
    ],
)
def test_messages_of_another_form_are_refused(address, messages):
    answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": messages})
    assert (answer.status_code, "messages" in answer.text) == (400, True)


@pytest.mark.parametrize(("name", "value"), [("best_of", True), ("presence_penalty", False)])
def test_true_is_not_one_and_false_not_zero(address, name, value):
    answer = httpx.post(f"{address}/v1/completions", json={"prompt": "a", name: value})
    assert (answer.status_code, name in answer.text) == (400, True)


def test_a_model_without_a_template_and_a_template_that_refuses_say_so(model, client, monkeypatch):
    ask = {"model": model.name, "messages": USER}
    monkeypatch.setattr(model.tokenizer.hf, "chat_template", "{{ raise_exception('no dogs') }}")
    with pytest.raises(openai.BadRequestError, match="no dogs"):
        client.chat.completions.create(**ask)
    monkeypatch.setattr(model.tokenizer.hf, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match=f"{model.name} has no chat template"):
        client.chat.completions.create(**ask)


def test_lines_of_a_stream_end_nowhere_but_at_their_end(model, address, monkeypatch):
    """Clients that split lines as Python does must not cut an event in two."""
    odd = "a\u0085b\u2028c\u2029"
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids: odd * len(ids))
    asked = {"prompt": "a", "max_tokens": 2, "stream": True}
    lines = httpx.post(f"{address}/v1/completions", json=asked).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line[6:7] == "{"]
    assert "".join(event["choices"][0]["text"] for event in events) == odd * 2
    assert set(lines) - {"", "data: [DONE]"} == {line for line in lines if line[:7] == "data: {"}


@pytest.mark.smollm2
def test_the_packaged_instruct_model_answers_as_itself():
    packaged = LanguageModel.open(Packaged())
    with make_server(Endpoint(model=packaged, saes={}), port=0).running() as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        made = client.chat.completions.create(
            model=packaged.name,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            temperature=0,
        ).choices[0]
    assert made.message.content == "The capital of France is Paris."
    assert made.finish_reason == "stop"
