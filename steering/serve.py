"""A local endpoint that speaks OpenAI's completions protocol, with steering plans named per request.

    GET  /v1/models                 the model, and `<model>:<plan>` for each plan
    POST /v1/completions            {"model": "smollm2-135m:cooking", "prompt": "I think", "max_tokens": 40, …}
    POST /v1/chat/completions       the same with messages, joined as lines "role: content"

A request may instead carry `"steering": {"plan": "cooking", "strength": 0.4}` or a whole plan document under
`"steering": {"document": {…}}`. `logprobs`, `seed`, `temperature`, `top_p`, `stop` and `stream` are honoured; the
answer says how many tokens steering touched, and a plan that touched none is an error, never silently plain text.

It listens on 127.0.0.1 unless told otherwise, serves one request at a time, refuses large bodies and foreign Host
headers (a web page must not reach it through a rebound name), and can ask for a bearer token. Standard library only.
"""

from __future__ import annotations

import hmac
import json
import threading
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from data.sites import Site
from sae.errors import UserError
from steering.generation import Sampling, Step, stream
from steering.plan import Plan
from steering.plan_files import plan_of_document
from steering.protocols import Dictionary, SteerableModel
from steering.tally import SteeringReport

_GRACE_S = 0.5  # a client may send its next request before this thread has let go of the last one
_MAX_BODY = 1 << 20
_LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """What is served. `plans` by name; `token` empty: no token is asked for."""

    model: SteerableModel
    saes: Mapping[Site, Dictionary]
    plans: Mapping[str, Plan] = field(default_factory=dict)
    token: str = ""
    max_new_tokens: int = 512
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A parsed request."""

    prompt: str
    plan: Plan | None
    sampling: Sampling
    seed: int
    stops: tuple[str, ...]
    wants_logprobs: bool
    wants_stream: bool
    is_chat: bool
    model_name: str


def make_server(endpoint: Endpoint, *, host: str = "127.0.0.1", port: int = 8089) -> ThreadingHTTPServer:
    """A server ready for `serve_forever`; port 0 takes a free one."""
    handler = type(
        "Handler", (_Handler,), {"endpoint": endpoint, "is_local": host in ("127.0.0.1", "localhost", "::1")}
    )
    try:
        server = ThreadingHTTPServer((host, port), handler)
    except OSError as error:
        raise UserError(
            "cannot listen here", where=f"{host}:{port}", found=str(error), mend="choose another port"
        ) from error
    server.daemon_threads = True
    return server


def parse_request(endpoint: Endpoint, body: Mapping[str, Any], *, is_chat: bool) -> Request:
    """Raises UserError for anything that is not served."""
    name = str(body.get("model", endpoint.model.name))
    try:
        limit = int(body.get("max_tokens", body.get("max_completion_tokens", 64)))
        sampling = Sampling(
            n_tokens=min(limit, endpoint.max_new_tokens),
            temperature=float(body.get("temperature", 1.0)),
            top_p=float(body.get("top_p", 1.0)),
        )
        seed = int(body.get("seed", 0))
    except (TypeError, ValueError) as error:
        raise UserError("a sampling parameter is no number", found=str(error)) from error
    stops = body.get("stop") or ()
    return Request(
        prompt=_prompt_of(body, is_chat),
        plan=_plan_of(endpoint, body, name),
        sampling=sampling,
        seed=seed,
        stops=(stops,) if isinstance(stops, str) else tuple(map(str, stops)),
        wants_logprobs=bool(body.get("logprobs")),
        wants_stream=bool(body.get("stream")),
        is_chat=is_chat,
        model_name=name,
    )


def _prompt_of(body: Mapping[str, Any], is_chat: bool) -> str:
    if not is_chat:
        prompt = body.get("prompt", "")
        if not isinstance(prompt, str):
            raise UserError("one prompt a request, as a string", where="prompt", found=type(prompt).__name__)
        return prompt
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "content" in m for m in messages):
        raise UserError("a chat needs messages with role and content", where="messages")
    return "\n".join(f"{m.get('role', 'user')}: {m['content']}" for m in messages) + "\nassistant:"


def _plan_of(endpoint: Endpoint, body: Mapping[str, Any], name: str) -> Plan | None:
    wanted = body.get("steering")
    if wanted is None:
        _, _, plan_name = name.partition(":")
        return _named(endpoint, plan_name) if plan_name else None
    if not isinstance(wanted, dict) or not {"plan", "document"} & set(wanted):
        raise UserError("steering needs a plan's name or a document", where="steering", expected='{"plan": "name"}')
    plan = (
        plan_of_document(wanted["document"], where="steering.document")
        if "document" in wanted
        else _named(endpoint, str(wanted["plan"]))
    )
    return plan.with_strength(float(wanted["strength"])) if "strength" in wanted else plan


def _named(endpoint: Endpoint, name: str) -> Plan:
    if name not in endpoint.plans:
        raise UserError(f"there is no plan {name!r}", expected=", ".join(sorted(endpoint.plans)) or "none is loaded")
    return endpoint.plans[name]


class _Handler(BaseHTTPRequestHandler):
    endpoint: Endpoint
    is_local: bool
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if not self._is_allowed():
            return
        if self.path != "/v1/models":
            return self._error(HTTPStatus.NOT_FOUND, "there is GET /v1/models and POST /v1/completions")
        base = self.endpoint.model.name
        names = [base, *(f"{base}:{plan}" for plan in self.endpoint.plans)]
        self._json({"object": "list", "data": [{"id": n, "object": "model", "owned_by": "featureflow"} for n in names]})

    def do_POST(self) -> None:
        if not self._is_allowed():
            return None
        if self.path not in ("/v1/completions", "/v1/chat/completions"):
            return self._error(HTTPStatus.NOT_FOUND, "there is POST /v1/completions and /v1/chat/completions")
        try:
            request = parse_request(self.endpoint, self._body(), is_chat="chat" in self.path)
        except UserError as error:
            return self._error(HTTPStatus.BAD_REQUEST, str(error))
        if not self.endpoint.lock.acquire(timeout=_GRACE_S):
            return self._error(HTTPStatus.TOO_MANY_REQUESTS, "another request is running")
        try:
            self._stream(request) if request.wants_stream else self._json(_answer(self.endpoint, request))
        except UserError as error:
            self._error(HTTPStatus.BAD_REQUEST, str(error))
        finally:
            self.endpoint.lock.release()
        return None

    def _body(self) -> dict[str, Any]:
        length = int(self.headers.get("Content-Length") or 0)
        if not 0 < length <= _MAX_BODY:
            raise UserError("the body is missing or too large", expected=f"1 … {_MAX_BODY} bytes", found=str(length))
        try:
            document = json.loads(self.rfile.read(length))
        except ValueError as error:
            raise UserError("the body is not JSON", found=str(error)) from error
        if not isinstance(document, dict):
            raise UserError("the body is not an object", found=type(document).__name__)
        return document

    def _is_allowed(self) -> bool:
        host = (self.headers.get("Host") or "").rsplit(":", 1)[0]
        if self.is_local and host not in _LOCAL_NAMES:
            self._error(HTTPStatus.FORBIDDEN, "this endpoint answers on localhost only")
            return False
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if self.endpoint.token and not hmac.compare_digest(given, self.endpoint.token):
            self._error(HTTPStatus.UNAUTHORIZED, "a bearer token is needed")
            return False
        return True

    def _stream(self, request: Request) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        head = _head(request, "chunk")
        reports: list[SteeringReport] = []
        for text, _, _ in _pieces(self.endpoint, request, reports):
            self._event({**head, "choices": [_choice(request, text, None, delta=True)]})
        last = {**head, "choices": [_choice(request, "", "stop", delta=True)], "steering": _touched(request, reports)}
        self._event(last)
        self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, document: Mapping[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(document, ensure_ascii=False)}\n\n".encode())
        self.wfile.flush()

    def _json(self, document: Mapping[str, Any], status: HTTPStatus = HTTPStatus.OK) -> None:
        content = json.dumps(document, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _error(self, status: HTTPStatus, message: str) -> None:
        self._json({"error": {"message": message, "type": "invalid_request_error", "code": status.value}}, status)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the caller of `make_server` decides what is shown."""


def _answer(endpoint: Endpoint, request: Request) -> dict[str, Any]:
    reports: list[SteeringReport] = []
    pieces = list(_pieces(endpoint, request, reports))
    touched = _touched(request, reports)
    if touched["tokens"] == 0 and request.plan is not None and request.plan.strength != 0:
        raise UserError(
            "the plan touched no token: this text would be unsteered", expected="a plan whose scope matches"
        )
    text = "".join(piece for piece, _, _ in pieces)
    tokens = [(piece, value) for piece, _, value in pieces]
    choice = _choice(request, text, "stop" if len(pieces) < request.sampling.n_tokens else "length")
    if request.wants_logprobs:
        choice["logprobs"] = {"tokens": [t for t, _ in tokens], "token_logprobs": [v for _, v in tokens]}
    return {**_head(request), "choices": [choice], "usage": {"completion_tokens": len(pieces)}, "steering": touched}


def _touched(request: Request, reports: Sequence[SteeringReport]) -> dict[str, Any]:
    """How many (token, node) pairs steering changed."""
    name = "" if request.plan is None else request.plan.name
    return {"plan": name, "tokens": sum(report.n_touched() for report in reports)}


def _pieces(endpoint: Endpoint, request: Request, reports: list[SteeringReport]) -> Iterator[tuple[str, int, float]]:
    """(new text, token, log-probability), until a stop. Text is decoded as a whole; only whole characters are sent."""
    ids: list[int] = []
    sent = ""
    steps = _steps(endpoint, request, reports)
    for step in steps:
        ids.append(step.ids[0])
        text = endpoint.model.tokenizer.decode(ids)
        text = text[:-1] if text.endswith("\ufffd") else text
        cut = min((place for stop in request.stops if (place := text.find(stop)) >= 0), default=None)
        text = text if cut is None else text[:cut]
        piece = text[len(sent) :] if text.startswith(sent) else ""
        sent += piece
        yield piece, step.ids[0], step.log_probs[0]
        if cut is not None:
            steps.close()
            return


def _steps(endpoint: Endpoint, request: Request, reports: list[SteeringReport]) -> Generator[Step, None, None]:
    plans: Sequence[Plan | None] = [request.plan]
    steps = stream(
        endpoint.model,
        endpoint.saes,
        request.prompt,
        plans,
        seed=request.seed,
        sampling=request.sampling,
        reports=reports,
    )
    ends = getattr(endpoint.model.hf.config, "eos_token_id", None)
    stops = ends if isinstance(ends, list) else [ends]
    for step in steps:
        if step.ids[0] not in stops:
            yield step


def _head(request: Request, suffix: str = "") -> dict[str, Any]:
    kind = "chat.completion" if request.is_chat else "text_completion"
    return {
        "id": f"cmpl-{uuid.uuid4().hex[:16]}",
        "object": f"{kind}.{suffix}" if suffix and request.is_chat else kind,
        "created": int(time.time()),
        "model": request.model_name,
    }


def _choice(request: Request, text: str, reason: str | None, *, delta: bool = False) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
    if request.is_chat:
        choice["delta" if delta else "message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    return choice
