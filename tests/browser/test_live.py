"""The live pages against a small local server that speaks the published interface."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.browser.synthetic.traces import trace
from tests.browser.synthetic.world import HOSTILE_TEXTS

pytestmark = pytest.mark.browser
TOKEN = "a-token"


class _Handler(SimpleHTTPRequestHandler):
    asked: list[tuple[str, Any]] = []  # noqa: RUF012 shared on purpose: what the page sent
    busy = False
    whole = True

    def do_GET(self) -> None:
        if self.path.startswith("/api/health"):
            return self._lines(
                [
                    {
                        "live": True,
                        "model": "tiny",
                        "limits": {"max_tokens": 16},
                        "steering": True,
                        "tracing": True,
                    }
                ]
            )
        return super().do_GET()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.asked.append((self.headers["X-Atlas-Token"], json.loads(body or b"null")))
        if self.busy:
            return self.send_error(429)
        if self.path == "/api/text":
            first = {"tokens": [8, 9], "pieces": ["<b>one", " two"]}
            fired = {
                "site": 0,
                "at": [0, 1],
                "latent": [5, 17],
                "value": [2.5, 1.0],
                "share": [0.5, 0.1],
            }
            return self._lines([first, fired, {"links": [[0, 17, 0, 5, 1]]}, {"done": True}])
        if self.path.startswith("/api/trace/"):
            changed = {"before": [[" Paris", 0.8]], "after": [["<b>Rome", 0.5]], "kl": 1.25,
                       "text": "<i>then"}  # fmt: skip
            plan = {"plan": '{"nodes": []}'}
            return self._lines([plan if "plan" in self.path else {"changed": changed}])
        if self.path == "/api/trace":
            whole = trace(HOSTILE_TEXTS)
            early = {**whole, "supernodes": [
                {**node, "removed": None, "kl": None, "top": [], "doses": []}
                for node in whole["supernodes"]], "edges": [], "checks": []}  # fmt: skip
            return self._lines(
                [{"trace": early}, {"status": "Removing"}, {"trace": whole}, {"done": True}]
            )
        grown = [  # the text so far, after every token
            {"arm": arm, "sample": 0, "text": text[:n]}
            for arm, text in (("unsteered", "plain"), ("steered", "<i>bent"))
            for n in (3, len(text))
        ]
        ending = [{"done": True}] if self.whole else []
        return self._lines([{"status": "finding the strength"}, *grown, *ending])

    def _lines(self, records: list[dict[str, Any]]) -> None:
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def address(atlas_folder: Path) -> Iterator[str]:
    _Handler.asked.clear()
    _Handler.busy, _Handler.whole = False, True
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(atlas_folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/?token={TOKEN}"
    server.shutdown()
    server.server_close()


def open_live(page: Any, address: str, route: str) -> None:
    page.driver.get("about:blank")
    page.driver.get_log("browser")
    page.driver.get(f"{address}#/{route}")
    page.wait("return document.querySelector('main')?.dataset.shown")
    page.settle()


def test_a_typed_text_is_read_and_shown_as_text(page: Any, address: str) -> None:
    open_live(page, address, "try")
    page.js("document.querySelector('.try textarea').value = 'one two'")
    page.click(".try .primary")
    page.wait("return document.querySelector('.live-text button')")
    assert page.texts(".live-text button") == ["<b>one", " two"]
    assert page.js(
        "return [...document.querySelectorAll('main tbody td')].map((c) => c.textContent)"
    )[:1] == ["L0/17"]
    assert "L0/5" in page.text("main tbody")
    assert (TOKEN, {"text": "one two"}) in _Handler.asked
    assert page.complaints() == []


def test_steering_shows_both_arms_and_a_busy_model_is_said(page: Any, address: str) -> None:
    open_live(page, address, "L3/30")
    page.click("form.live .primary")
    page.wait("return document.querySelector('form.live').innerText.includes('<i>bent')")
    assert page.texts("form.live blockquote p") == ["plain", "<i>bent"]
    assert page.text("form.live [role=status]") == ""
    _Handler.whole = False
    page.click("form.live .primary")
    page.wait("return document.querySelector('form.live [role=status]').innerText === 'Stopped.'")
    _Handler.busy = True
    page.click("form.live .primary")
    page.wait("return document.querySelector('form.live').innerText.includes('busy')")


def test_a_prompt_is_traced_and_a_supernode_changed(page: Any, address: str) -> None:
    open_live(page, address, "trace")
    page.js("document.querySelector('form.try textarea').value = 'The capital of France is'")
    page.click("form.try .primary")
    page.wait("return document.querySelectorAll('.live-trace .supernode').length === 3")
    assert (TOKEN, {"prompt": "The capital of France is"}) in _Handler.asked
    page.wait("return document.querySelector('.change button')")
    page.js("document.querySelectorAll('.change button')[0].click()")
    page.wait("return document.querySelector('.change').innerText.includes('<i>then')")
    sent = _Handler.asked[-1][1]
    assert sent["factor"] == 0
    assert sent["features"] == ["L0/30", "L2/30"]
    assert "<b>Rome 0.50" in page.text(".change")
    page.js("document.querySelector('.change input').value = 'Another'")
    page.js("document.querySelectorAll('.change button')[4].click()")
    page.wait("return !document.querySelector('.change [role=status]').innerText")
    assert _Handler.asked[-1][1]["other"] == "Another"
    saved = page.download(lambda: page.js("document.querySelectorAll('.change button')[3].click()"))
    assert json.loads(saved.read_text()) == {"nodes": []}
    assert page.complaints() == []


def test_without_a_token_nothing_is_asked(page: Any, address: str) -> None:
    open_live(page, address.split("?")[0], "try")
    assert "featureflow atlas serve" in page.text("main")
    assert page.complaints() == []
    assert _Handler.asked == []
