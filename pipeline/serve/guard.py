"""What every local server here checks before it does anything: who is asked, with which token, and
how large a body.

1. `listen` opens the port, or says why it cannot.
2. `is_asked_here`: a server on this machine answers only requests that name this machine, since a
   web page elsewhere can reach it under a name of its own that it lets point here, and no request
   that a page from elsewhere sends (its `Origin`). A server that listens elsewhere relies on its
   token.
3. `has_token` compares in constant time, whatever characters were sent.
4. `json_body` reads an object of at most `max_body` bytes.

A refusal closes the connection: a body that was not read must not be taken for the next request,
which could name any host. Standard library only.
"""

from __future__ import annotations

import hmac
import json
import re
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from featureflow.errors import UserError

_MOST_DRAINED, _DRAIN_S = 16 << 20, 1.0
_LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
_HOST = re.compile(r"(?:\[([^\]]*)\]|([^:\[\]]*))(?::\d*)?")


def is_local(host: str) -> bool:
    """Whether a host to listen on is reached from this machine only."""
    return host.strip("[]").lower() in _LOCAL_NAMES


def listen(handler: type[GuardedHandler], host: str, port: int) -> ThreadingHTTPServer:
    """A server ready for `serve_forever`; port 0 takes a free one. Raises UserError where it cannot
    listen."""
    try:
        return ThreadingHTTPServer((host, port), handler)
    except (OSError, OverflowError) as error:
        raise UserError(
            "cannot listen here",
            where=f"{host}:{port}",
            found=str(error),
            fix="choose another --port or --host",
        ) from error


def _names_this_machine(host: str) -> bool:
    named = _HOST.fullmatch(host)
    return bool(named and is_local(named[1] or named[2] or ""))


class GuardedHandler(BaseHTTPRequestHandler):
    """Set `token`, `only_local`, `name` and `max_body` in a subclass, and answer errors in
    `_error`."""

    token: str
    only_local: bool
    name: str
    max_body: int
    _was_read = False

    def is_asked_here(self) -> bool:
        """Whether the request names this machine as it is known to itself; refuses it otherwise."""
        self._was_read = False
        origin = self.headers.get("Origin")
        asked = [self.headers.get("Host") or ""] + (
            [] if origin is None else [origin.partition("://")[2]]
        )
        if self.only_local and not all(_names_this_machine(host.strip()) for host in asked):
            self.refuse(HTTPStatus.FORBIDDEN, f"{self.name} answers on localhost only")
            return False
        return True

    def has_token(self, given: str, otherwise: str) -> bool:
        """Whether the token is the right one; refuses the request with the sentence `otherwise` if
        not."""
        if not hmac.compare_digest(given.encode("utf-8", errors="replace"), self.token.encode()):
            self.refuse(HTTPStatus.UNAUTHORIZED, otherwise)
            return False
        return True

    def json_body(self) -> dict[str, Any]:
        """The object in the body. Raises UserError for anything else."""
        length = self._declared()
        if not 0 < length <= self.max_body:
            found = (self.headers.get("Content-Length") or "0")[:40]
            raise UserError(
                "the body is missing or too large",
                expected=f"1 … {self.max_body} bytes",
                found=found,
            )
        self._was_read = True
        try:
            document = json.loads(self.rfile.read(length))
        except (ValueError, RecursionError) as error:
            raise UserError("the body is not JSON", found=str(error)) from error
        if not isinstance(document, dict):
            raise UserError("the body is not an object", found=type(document).__name__)
        return document

    def refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer with an error and end the connection, when the client has sent what it was about
        to send (up to a bound): closed while it still sends, it would see a broken pipe and not the
        answer."""
        self.close_connection = True
        self._error(status, message)
        left = 0 if self._was_read else min(self._declared(), _MOST_DRAINED)
        self.connection.settimeout(_DRAIN_S)
        with suppress(OSError):
            while left > 0 and (piece := self.rfile.read1(min(left, 1 << 16))):
                left -= len(piece)

    def _declared(self) -> int:
        """The length of the body, as the request says it; 0 for what is no length."""
        text = self.headers.get("Content-Length") or "0"
        return int(text) if text.isdecimal() and len(text) < 20 else 0

    def _error(self, status: HTTPStatus, message: str) -> None:
        raise NotImplementedError

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the caller of `make_server` decides what is shown."""
