"""A local endpoint that speaks OpenAI's completions protocol, with steering plans named per
request.

    GET  /v1/models                 the model, and `<model>:<plan>` for each plan
    POST /v1/completions            {"model": "smollm2-135m:cooking", "prompt": "I think",
    "max_tokens": 40, …}
    POST /v1/chat/completions       the same with messages, joined as lines "role: content"

What a request may say and what is answered: pipeline/serve/protocol.py. It listens on 127.0.0.1
unless told otherwise, serves one request at a time, refuses large bodies and foreign Host headers
(pipeline/serve/guard.py), and can ask for a bearer token. A client that goes away ends its
generation. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from itertools import chain
from typing import Any

from featureflow.errors import UserError
from pipeline.serve.guard import GuardedHandler, is_local, listen
from pipeline.serve.protocol import (
    IDLE,
    Endpoint,
    Request,
    answer,
    choice_of,
    error_document,
    head_of,
    is_idle,
    parse_request,
    pieces_of,
    reason_of,
    touched_by,
)
from steering.tally import SteeringReport

__all__ = ["Endpoint", "make_server"]

_GRACE_S = 0.5  # a client may send its next request before this thread has let go of the last one


def make_server(
    endpoint: Endpoint, *, host: str = "127.0.0.1", port: int = 8089
) -> ThreadingHTTPServer:
    """A server ready for `serve_forever`; port 0 takes a free one. Raises UserError where it cannot
    listen."""
    shared = {"endpoint": endpoint, "token": endpoint.token, "only_local": is_local(host)}
    server = listen(type("Handler", (_Handler,), shared), host, port)
    server.daemon_threads = True
    return server


class _Handler(GuardedHandler):
    endpoint: Endpoint
    protocol_version = "HTTP/1.1"
    name = "this endpoint"
    max_body = 1 << 20

    def do_GET(self) -> None:
        if not self._is_allowed():
            return
        if self.path != "/v1/models":
            return self.refuse(
                HTTPStatus.NOT_FOUND, "there is GET /v1/models and POST /v1/completions"
            )
        base = self.endpoint.model.name
        names = [base, *(f"{base}:{plan}" for plan in self.endpoint.plans)]
        self._json(
            {
                "object": "list",
                "data": [{"id": n, "object": "model", "owned_by": "featureflow"} for n in names],
            }
        )

    def do_POST(self) -> None:
        if not self._is_allowed():
            return None
        if self.path not in ("/v1/completions", "/v1/chat/completions"):
            return self.refuse(
                HTTPStatus.NOT_FOUND, "there is POST /v1/completions and /v1/chat/completions"
            )
        try:
            request = parse_request(self.endpoint, self.json_body(), is_chat="chat" in self.path)
        except UserError as error:
            return self.refuse(HTTPStatus.BAD_REQUEST, str(error))
        if not self.endpoint.lock.acquire(timeout=_GRACE_S):
            return self.refuse(HTTPStatus.TOO_MANY_REQUESTS, "another request is running")
        try:
            self._stream(request) if request.wants_stream else self._json(
                answer(self.endpoint, request)
            )
        except UserError as error:
            self._error(HTTPStatus.BAD_REQUEST, str(error))
        finally:
            self.endpoint.lock.release()
        return None

    def _is_allowed(self) -> bool:
        if not self.is_asked_here():
            return False
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return not self.token or self.has_token(given, "a bearer token is needed")

    def _stream(self, request: Request) -> None:
        """Closing the pieces takes the plan off the model, also when the client has gone: before
        the next request."""
        reports: list[SteeringReport] = []
        with closing(pieces_of(self.endpoint, request, reports)) as pieces:
            first = next(
                pieces, None
            )  # what is wrong with a request shows here, while an error can be the answer
            self._stream_head()
            with suppress(BrokenPipeError, ConnectionResetError):
                try:
                    self._events(request, chain([] if first is None else [first], pieces), reports)
                except UserError as error:
                    self._event(error_document(HTTPStatus.BAD_REQUEST, str(error)))

    def _stream_head(self) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True

    def _events(
        self,
        request: Request,
        pieces: Iterable[tuple[str, int, float]],
        reports: Sequence[SteeringReport],
    ) -> None:
        head = head_of(request, "chunk")
        sent = 0
        for piece in pieces:
            self._event(
                {**head, "choices": [choice_of(request, piece[0], None, [piece], delta=True)]}
            )
            sent += 1
        touched = touched_by(request, reports)
        if is_idle(request, touched):
            self._event(error_document(HTTPStatus.BAD_REQUEST, IDLE))
        else:
            last = choice_of(request, "", reason_of(request, sent), delta=True)
            self._event({**head, "choices": [last], "steering": touched})
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, document: Mapping[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode())
        self.wfile.flush()

    def _json(self, document: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        content = json.dumps(document, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(content)

    def _error(self, status: HTTPStatus, message: str) -> None:
        self._json(error_document(status, message), status)
