"""`featureflow atlas serve`: the site over http on this machine, with "test this text" and live
steering.

On this machine only localhost names are answered (pipeline/serve/guard.py), and the model only
with the token; listening elsewhere, every file needs the token too, which the printed address
leaves in a cookie. One request at a time; bodies, texts and samples have limits. Answers are lines
of JSON, sent as they are made; when the reader goes away, or asks for `/api/cancel`, the work stops
after its current step. Nothing outside the site folder is served.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from featureflow.errors import UserError
from pipeline.serve.guard import GuardedHandler, is_local, listen
from pipeline.serve.live import MAX_NEW_TOKENS, MAX_SAMPLES, MAX_TOKENS, LiveAtlas, Record

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".txt": "text/plain; charset=utf-8",
}
_COOKIE = "featureflow_atlas"


def make_server(
    live: LiveAtlas, *, host: str = "127.0.0.1", port: int = 8765, token: str | None = None
) -> tuple[ThreadingHTTPServer, str]:
    """A server, not yet running, and the address to open (with its token). Port 0 takes a free one.
    Raises UserError where it cannot listen."""
    token = token or secrets.token_urlsafe(24)
    shared = {"live": live, "token": token, "lock": threading.Lock(), "only_local": is_local(host)}
    server = listen(type("Handler", (_Handler,), shared), host, port)
    return server, f"http://{host}:{server.server_address[1]}/?token={token}"


class _Handler(GuardedHandler):
    live: LiveAtlas
    lock: threading.Lock
    protocol_version = "HTTP/1.0"
    name = "this atlas"
    max_body = 64 << 10

    def do_GET(self) -> None:
        if not self.is_asked_here():
            return
        path = unquote(urlsplit(self.path).path)
        if path == "/api/health":
            if self._has_token():
                self._json(self._health())
            return
        if self.only_local or self._may_read():
            self._file(path.lstrip("/") or "index.html")

    def do_POST(self) -> None:
        if not self.is_asked_here() or not self._has_token():
            return
        path = urlsplit(self.path).path
        if path == "/api/cancel":
            self.live.stop()
            return self._json({"stopped": True})
        makers = {"/api/text": self._text, "/api/steer": self._steer}
        if path not in makers:
            return self._error(
                HTTPStatus.NOT_FOUND, "there is /api/text, /api/steer and /api/cancel"
            )
        try:
            body = self.json_body()
        except UserError as error:
            return self._error(HTTPStatus.BAD_REQUEST, str(error))
        if not self.lock.acquire(blocking=False):
            return self._error(HTTPStatus.TOO_MANY_REQUESTS, "another request is running")
        try:
            self._stream(lambda: makers[path](body))
        finally:
            self.lock.release()
        return None

    def _text(self, body: Mapping[str, Any]) -> Iterator[Record]:
        return self.live.read_text(_typed(body, "text", str))

    def _steer(self, body: Mapping[str, Any]) -> Iterator[Record]:
        features = _typed(body, "features", list)
        return self.live.steer(
            [str(f) for f in features],
            _typed(body, "prompt", str),
            dose=float(_typed(body, "dose", int | float, 0.2)),
            n_samples=_typed(body, "n_samples", int, 1),
            n_new_tokens=_typed(body, "n_new_tokens", int, 60),
            seed=_typed(body, "seed", int, 0),
        )

    def _stream(self, make: Callable[[], Iterator[Record]]) -> None:
        """Send records as they come. An error before the first is an answer of its own, later one
        is a record."""
        started = False
        try:
            for record in make():
                if not started:
                    self._head(HTTPStatus.OK, "application/x-ndjson")
                    started = True
                self.wfile.write(
                    json.dumps(record, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n"
                )
                self.wfile.flush()
        except (BrokenPipeError, ConnectionResetError):
            self.live.stop()
        except UserError as error:
            if started:
                self.wfile.write(json.dumps({"error": str(error)}).encode() + b"\n")
            else:
                self._error(HTTPStatus.BAD_REQUEST, str(error))

    def _health(self) -> Record:
        limits = {
            "max_tokens": MAX_TOKENS,
            "max_new_tokens": MAX_NEW_TOKENS,
            "max_samples": MAX_SAMPLES,
        }
        return {"live": True, "model": self.live.model.name, "limits": limits, "steering": True}

    def _file(self, name: str) -> None:
        root: Path = self.live.cards.folder.resolve()
        path = (root / name).resolve()
        if not path.is_relative_to(root) or not path.is_file() or path.suffix not in _TYPES:
            return self._error(HTTPStatus.NOT_FOUND, "no such file in the atlas")
        content = path.read_bytes()
        self._head(HTTPStatus.OK, _TYPES[path.suffix], len(content), cookie=not self.only_local)
        self.wfile.write(content)
        return None

    def _has_token(self) -> bool:
        return self._allowed(self.headers.get("X-Atlas-Token") or "")

    def _may_read(self) -> bool:
        """Files carry the token in the address (the page itself) or in the cookie that it
        leaves."""
        given = parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        cookies = (self.headers.get("Cookie") or "").split(";")
        kept = [
            value
            for name, _, value in (c.strip().partition("=") for c in cookies)
            if name == _COOKIE
        ]
        return self._allowed(given or (kept[0] if kept else ""))

    def _allowed(self, given: str) -> bool:
        return self.has_token(
            given, "the token is missing or wrong; open the address that was printed"
        )

    def _json(self, document: Record) -> None:
        content = json.dumps(document).encode()
        self._head(HTTPStatus.OK, "application/json", len(content))
        self.wfile.write(content)

    def _error(self, status: HTTPStatus, message: str) -> None:
        content = message.encode("utf-8", errors="replace")
        self._head(status, "text/plain; charset=utf-8", len(content))
        self.wfile.write(content)

    def _head(
        self,
        status: HTTPStatus,
        content_type: str,
        length: int | None = None,
        *,
        cookie: bool = False,
    ) -> None:
        self.send_response(status)
        if cookie:
            self.send_header(
                "Set-Cookie", f"{_COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"
            )
        self.send_header("Content-Type", content_type)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()


def _typed(body: Mapping[str, Any], name: str, kind: Any, otherwise: Any = None) -> Any:
    value = body.get(name, otherwise)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(
            "a field is missing or of the wrong type", where=name, found=type(value).__name__
        )
    return value
