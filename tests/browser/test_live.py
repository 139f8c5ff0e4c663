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

pytestmark = pytest.mark.browser
TOKEN = "a-token"


class _Handler(SimpleHTTPRequestHandler):
    asked: list[tuple[str, Any]] = []  # noqa: RUF012 shared on purpose: what the page sent
    busy = False
    whole = True

    def do_GET(self) -> None:
        if self.path.startswith("/api/health"):
            return self._lines(
                [{"live": True, "model": "tiny", "limits": {"max_tokens": 16}, "steering": True}]
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


def test_without_a_token_nothing_is_asked(page: Any, address: str) -> None:
    open_live(page, address.split("?")[0], "try")
    assert "featureflow atlas serve" in page.text("main")
    assert page.complaints() == []
    assert _Handler.asked == []
