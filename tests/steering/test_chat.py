"""The chat client against a server on this machine that records what reaches it and answers what a
test tells it to."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from featureflow.errors import UserError
from pipeline.describe.chat import ChatModel, after_reasoning


class _Server:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str, dict[str, str], bytes]] = []
        self.status, self.headers, self.raw = 200, {}, b""
        self.answers({"choices": [{"message": {"content": "yes"}}]})
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.do_POST()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                outer.seen.append((self.command, self.path, dict(self.headers), body))
                if outer.raw:
                    self.wfile.write(outer.raw)
                    return
                self.send_response(outer.status)
                for name, value in outer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(outer.content)))
                self.end_headers()
                self.wfile.write(outer.content)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def answers(self, document: Any) -> None:
        self.content = document if isinstance(document, bytes) else json.dumps(document).encode()


@pytest.fixture
def server() -> Iterator[_Server]:
    made = _Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_a_question_goes_out_in_the_protocols_form_and_the_first_choice_comes_back(server):
    assert (
        ChatModel(url=server.url + "/", model="m", key="secret").ask("Is it?", max_tokens=7)
        == "yes"
    )
    ((method, path, headers, body),) = server.seen
    assert (method, path) == ("POST", "/v1/chat/completions")
    assert headers["Content-Type"] == "application/json"
    assert headers["Authorization"] == "Bearer secret"
    assert json.loads(body) == {
        "model": "m",
        "temperature": 0,
        "max_tokens": 7,
        "messages": [{"role": "user", "content": "Is it?"}],
    }


def test_without_a_key_none_is_sent_and_with_one_it_is_not_shown(server):
    ChatModel(url=server.url, model="m").ask("?", max_tokens=1)
    assert "Authorization" not in server.seen[0][2]
    assert "secret" not in repr(ChatModel(url=server.url, model="m", key="secret"))


@pytest.mark.parametrize(
    "document",
    [b"not json", b"", {}, {"choices": []}, {"choices": [{}]}, {"choices": "ab"}, [], None],
)
def test_an_answer_of_another_form_is_an_error_that_names_the_address(server, document):
    server.answers(document)
    with pytest.raises(UserError, match="did not answer") as caught:
        ChatModel(url=server.url, model="m").ask("?", max_tokens=1)
    assert server.url in str(caught.value)


def test_an_answer_of_null_is_empty_and_does_not_become_the_word_none(server):
    server.answers({"choices": [{"message": {"content": None}}]})
    assert ChatModel(url=server.url, model="m").ask("?", max_tokens=1) == ""


@pytest.mark.parametrize("content", [5, ["a"], False])
def test_an_answer_that_is_no_text_is_an_error(server, content):
    server.answers({"choices": [{"message": {"content": content}}]})
    with pytest.raises(UserError, match="without text"):
        ChatModel(url=server.url, model="m").ask("?", max_tokens=1)


@pytest.mark.parametrize(
    "raw", [b"junk\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{"]
)
def test_what_is_no_http_or_breaks_off_is_an_error_too(server, raw):
    server.raw = raw
    with pytest.raises(UserError, match="did not answer"):
        ChatModel(url=server.url, model="m").ask("?", max_tokens=1)


def test_what_the_server_says_against_it_is_told(server):
    server.status = 429
    server.answers(b"too many questions" + b"!" * 100_000)
    with pytest.raises(UserError, match="429: too many questions") as caught:
        ChatModel(url=server.url, model="m").ask("?", max_tokens=1)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_question_and_key_do_not_follow_a_redirection(server, status):
    elsewhere = _Server()
    server.status, server.headers = status, {"Location": elsewhere.url + "/chat/completions"}
    try:
        with pytest.raises(UserError, match=str(status)):
            ChatModel(url=server.url, model="m", key="secret").ask("?", max_tokens=1)
        assert elsewhere.seen == []
    finally:
        elsewhere.http.shutdown()
        elsewhere.http.server_close()


@pytest.mark.parametrize("url", ["ftp://x", "file:///etc", "127.0.0.1:8000/v1", ""])
def test_only_http_addresses_are_asked(url):
    with pytest.raises(UserError, match="not an http address"):
        ChatModel(url=url, model="m").ask("?", max_tokens=1)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:9", "http://127.0.0.1:port", "http://a b", "http://["]
)
def test_no_server_there_is_said_so(url):
    with pytest.raises(UserError, match="did not answer"):
        ChatModel(url=url, model="m", timeout_s=2).ask("?", max_tokens=1)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("plain", "plain"),
        ("<think>2, or 1?</think>\n\nRating: [[1]]", "Rating: [[1]]"),
        ("opened by the template … </think> so 2", "so 2"),
        ("<think>a</think>b<think>c</think> d ", "d"),
        ("<THINK>a</Think>b", "b"),
        ("[THINK]a[/THINK]b", "b"),
        ("<think>cut off at the token limit: Rating: [[2]]", ""),
        ("<think>a</think>b<think>again", ""),
        ("I think 2", "I think 2"),
        ("", ""),
    ],
)
def test_only_what_comes_after_the_reasoning_is_said(answer, said):
    assert after_reasoning(answer) == said
