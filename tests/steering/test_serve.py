"""The endpoint's manners: whom it answers, what it refuses, one request at a time, text that is
whole."""

from __future__ import annotations

import http.client
import importlib
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from tokenizers import decoders

from featureflow.errors import UserError
from pipeline.serve.endpoint import Endpoint, make_server
from pipeline.serve.guard import is_local
from pipeline.serve.streamed_text import SettledText
from steering.plan import Node, Plan

FLOW = Plan(nodes=(Node(at="L1/3", scale=4.0),), strength=2.0, name="flow")


@contextmanager
def served(endpoint: Endpoint, **options: Any) -> Iterator[int]:
    server = make_server(endpoint, port=0, **options)
    with server.running():
        yield server.port


@pytest.fixture
def endpoint(model, saes) -> Endpoint:
    return Endpoint(model=model, saes=saes, plans={"flow": FLOW})


@pytest.fixture
def port(endpoint) -> Iterator[int]:
    with served(endpoint) as port:
        yield port


def ask(
    port: int, body: object, path: str = "/v1/completions", method: str = "POST", **headers: str
):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    text = body if isinstance(body, (str, bytes)) or body is None else json.dumps(body)
    connection.request(
        method, path, text, {name.replace("_", "-"): value for name, value in headers.items()}
    )
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def raw(port: int, content: bytes) -> bytes:
    """Everything that comes back until the server ends the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(content)
        parts = []
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:1234", 200),
        ("http://127.0.0.1", 200),
        ("https://evil.example", 403),
        ("null", 403),
    ],
)
def test_no_page_from_elsewhere_is_answered(port, origin, status):
    """A web page may send a plain POST to this machine without asking first; its browser names
    where it is from."""
    assert ask(port, None, "/v1/models", "GET", Origin=origin)[0] == status
    assert ask(port, {"prompt": "a", "max_tokens": 1}, Origin=origin)[0] == status


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("127.0.0.1", 200),
        ("[::1]", 200),
        ("[::1]:8089", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1:80:evil.example", 403),
        ("[::1]evil.example", 403),
        ("", 403),
    ],
)
def test_only_requests_that_name_this_machine_are_answered(port, host, status):
    assert ask(port, None, "/v1/models", "GET", Host=host)[0] == status
    assert ask(port, {"prompt": "a", "max_tokens": 1}, Host=host)[0] == status


def test_what_listens_elsewhere_is_known_by_other_names_too(endpoint):
    with served(endpoint, host="0.0.0.0") as port:
        assert ask(port, None, "/v1/models", "GET", Host="steering.example")[0] == 200
    assert [is_local(host) for host in ("::1", "[::1]", "Localhost", "0.0.0.0", "", "::")] == [
        True
    ] * 3 + [False] * 3


def test_without_the_token_nothing_is_answered(model, saes):
    with served(Endpoint(model=model, saes=saes, token="sesame")) as port:
        for given in ("", "Bearer wrong", "Bearer sésame", "Bearer sesame2", "Bearer "):
            assert ask(port, None, "/v1/models", "GET", Authorization=given)[0] == 401
            assert ask(port, {"prompt": "a", "max_tokens": 1}, Authorization=given)[0] == 401
        assert ask(port, None, "/v1/models", "GET")[0] == 401
        assert ask(port, {"prompt": "a", "max_tokens": 1}, Authorization="Bearer sesame")[0] == 200


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("not json", "JSON"),
        ("[]", "not an object"),
        ("[" * 100_000, "JSON"),
        ("", "missing"),
        ('"' + "x" * (1 << 20) + '"', "too large"),
        ('{"prompt": "\\ud83d"}', "half a character"),
        ('{"\\udc00": 1}', "half a character"),
        (b'{"prompt": "\xff"}', "JSON"),
        ({"prompt": "a", "stop": 5}, "stop"),
        ({"prompt": "a", "stop": ["a", 5]}, "stop.1"),
        ({"prompt": "a", "steering": {"plan": "flow", "strength": "much"}}, "steering.strength"),
        ({"prompt": "a", "steering": {"strength": 1}}, "0 plans"),
        ({"prompt": "a", "steering": {"plan": "flow", "document": {}}}, "2 plans"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature"),
        ({"prompt": "a", "max_tokens": float("inf")}, "max_tokens"),
        ({"prompt": "a", "max_tokens": True}, "max_tokens"),
        ({"prompt": "a", "max_tokens": 513}, "at most 512"),
        ({"prompt": "a", "n": 0, "best": 1, "logprobs": -1}, "n: "),
        ({"prompt": "a", "n": 0, "best": 1, "logprobs": -1}, "best: this endpoint does not serve"),
        ({"prompt": "a", "n": 0, "best": 1, "logprobs": -1}, "logprobs: "),
        ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
        ({"prompt": "a", "tools": [{}]}, "tools"),
        ({"prompt": "a", "echo": True, "logprobs": 0}, "echo"),
    ],
)
def test_bad_bodies_are_answered_with_a_sentence(port, body, word):
    status, text = ask(port, body)
    assert status == 400
    assert word in json.loads(text)["error"]["message"]


@pytest.mark.parametrize("length", ["-1", "many", "1e3", "9" * 400, "99999999999"])
def test_a_length_that_is_none_is_refused(port, length):
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
    )
    assert b"HTTP/1.1 400" in raw(port, request.encode())


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/completions/../models", "/v1/files"])
def test_there_is_nothing_else(port, path):
    assert ask(port, None, path, "GET")[0] == 404
    assert ask(port, {"prompt": "a"}, path)[0] == 404


def test_a_refused_request_cannot_carry_another_in_its_body(port):
    """A page elsewhere may send any body, and the second request would name a host of its own
    choice."""
    inner = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    for host, path in (("evil.example", "/v1/completions"), ("localhost", "/elsewhere")):
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(inner)}\r\n\r\n".encode()
        )
        answered = raw(port, head + inner)
        assert answered.count(b"HTTP/1.1") == 1
        assert b'"object": "list"' not in answered
    chunked = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    assert raw(port, chunked + inner).count(b"HTTP/1.1") == 1


class Slow:
    """The model with passes that take `seconds`; `steered` says for each whether a plan was on."""

    def __init__(self, model, seconds: float) -> None:
        self._model, self._n_hooks = model, n_hooks(model)
        self.seconds, self.steered = seconds, []

    def __enter__(self):
        self._handle = self._model.hf.register_forward_pre_hook(self._before)
        return self

    def __exit__(self, *_) -> None:
        self._handle.remove()

    def _before(self, *_) -> None:
        self.steered.append(n_hooks(self._model) > self._n_hooks + 1)
        time.sleep(self.seconds)


def n_hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())


@pytest.mark.parametrize(("wait_s", "others"), [(60.0, 200), (0.05, 429)])
def test_requests_wait_for_their_turn_and_are_refused_after_a_while(model, saes, wait_s, others):
    """The first one holds the model until the others wait, or were refused."""
    body = {"prompt": "a", "max_tokens": 3, "temperature": 0}
    found, held, free = [], threading.Event(), threading.Event()

    def hold(*_) -> None:
        held.set()
        free.wait(60)

    def one() -> None:
        found.append(ask(port, body))

    handle = model.hf.register_forward_pre_hook(hold)
    try:
        with served(Endpoint(model=model, saes=saes, wait_s=wait_s)) as port:
            threads = [threading.Thread(target=one) for _ in range(4)]
            threads[0].start()
            assert held.wait(60)
            for thread in threads[1:]:
                thread.start()
            if others == 429:
                for thread in threads[1:]:
                    thread.join()
            free.set()
            for thread in threads:
                thread.join()
    finally:
        handle.remove()
    assert sorted(status for status, _ in found) == [200, *[others] * 3]
    texts = {json.loads(text)["choices"][0]["text"] for status, text in found if status == 200}
    assert len(texts) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_the_model_at_once_and_takes_its_plan_along(
    model, saes, stream
):
    body = {"prompt": "a", "max_tokens": 100, "model": f"{model.name}:flow", "stream": stream}
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}"
    with (
        served(Endpoint(model=model, saes=saes, plans={"flow": FLOW})) as port,
        Slow(model, 0.1) as slow,
    ):
        connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        connection.sendall(head.encode() + b"\r\n\r\n" + content)
        while len(slow.steered) < 3:
            time.sleep(0.01)
        linger = struct.pack("ii", 1, 0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)  # gone at once
        connection.close()
        started, before = time.monotonic(), len(slow.steered)
        assert ask(port, {"prompt": "b", "max_tokens": 2})[0] == 200
        assert time.monotonic() - started < 2
    assert all(slow.steered[:before])
    assert not any(slow.steered[-2:])
    assert len(slow.steered) < before + 6


def test_a_taken_port_is_said_so(endpoint, port):
    with pytest.raises(UserError, match="cannot listen"):
        make_server(endpoint, port=port)
    with pytest.raises(UserError, match="cannot listen"):
        make_server(endpoint, port=70_000)


def spelled(pieces: list[str]):
    """A decoder of tokens that are bytes or texts, as of tokenizers that fall back to bytes (Llama,
    Gemma)."""
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return lambda ids: decoder.decode([pieces[i] for i in ids])


@pytest.mark.parametrize("character", ["é", "€", "😀"])
def test_a_character_of_several_byte_tokens_is_sent_whole_and_the_text_goes_on(character):
    pieces = ["so ", *(f"<0x{byte:02X}>" for byte in character.encode()), " it", " is"]
    decode = spelled(pieces)
    text = SettledText(decode)
    sent = [text.add(token) for token in range(len(pieces))]
    assert sent == ["so ", *[""] * (len(character.encode()) - 1), character, " it", " is"]
    assert text.rest() == ""


def test_what_never_becomes_whole_is_sent_at_the_end():
    decode = spelled(["a", "<0xF0>", "<0x9F>"])
    text = SettledText(decode)
    assert [text.add(token) for token in range(3)] == ["a", "", ""]
    assert text.rest() == decode([0, 1, 2])[1:]


@pytest.mark.parametrize(
    ("words", "stops", "sent", "rest", "is_stopped"),
    [
        (["a", "\n", "\n", "b"], ["\n\n"], ["a", "", ""], "", True),
        (["a", "\n", "b", "\n"], ["\n\n"], ["a", "", "\nb", ""], "\n", False),
        (["x END", "S", "!"], ["ENDS"], ["x ", ""], "", True),
        (["x EN", "ENDS"], ["ENDS"], ["x ", "EN"], "", True),
        (["ab", "c"], ["bc", "b"], ["a"], "", True),
        (["ab"], [""], ["ab"], "", False),
    ],
)
def test_a_stop_string_is_never_sent_not_even_its_beginning(words, stops, sent, rest, is_stopped):
    text = SettledText(lambda ids: "".join(words[i] for i in ids), stops)
    found = []
    for token in range(len(words)):
        found.append(text.add(token))
        if text.is_stopped:
            break
    assert (found, text.rest(), text.is_stopped) == (sent, rest, is_stopped)


def test_an_answer_ends_before_its_stop_string_streamed_or_not(endpoint, port):
    body = {"prompt": "the dog", "max_tokens": 12, "temperature": 0}
    whole = json.loads(ask(port, body)[1])["choices"][0]["text"]
    stop = whole[4:8]
    expected = whole[: whole.index(stop)]
    stopped = json.loads(ask(port, {**body, "stop": stop})[1])["choices"][0]
    events = ask(port, {**body, "stop": [stop], "stream": True})[1].split("\n\n")
    pieces = [
        json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")
    ]
    assert (stopped["text"], stopped["finish_reason"]) == (expected, "stop")
    assert "".join(piece["choices"][0]["text"] for piece in pieces) == expected


def test_without_the_packages_of_the_extra_the_error_names_it(monkeypatch):
    package = importlib.import_module("pipeline.serve")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="starlette and uvicorn") as caught:
        importlib.reload(package)
    assert "featureflow[serve]" in str(caught.value)
