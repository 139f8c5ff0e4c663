"""`featureflow atlas serve`: the site over http on this machine, with "test this text" and live
steering.

On this machine only localhost names are answered (pipeline/serve/guard.py), and the model only
with the token. When the server listens elsewhere, every file needs the token too, which the
printed address leaves in a cookie. Requests to the model wait for their turn. Bodies, texts and
samples have limits. Answers are lines of JSON, sent as they are made. When the reader goes away,
or asks for `/api/cancel`, the work stops after its current step. Nothing outside the site folder is
served.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from featureflow.errors import Problem, UserError
from pipeline.serve.guard import (
    Guarded,
    ModelTurns,
    Server,
    Streamed,
    is_local,
    json_body,
    unless_gone,
)
from pipeline.serve.live import MAX_NEW_TOKENS, MAX_SAMPLES, MAX_TOKENS, LiveAtlas, Record

_COOKIE, _MAX_BODY = "featureflow_atlas", 64 << 10


class _Text(BaseModel):
    model_config = ConfigDict(strict=True)
    text: str

    def records(self, live: LiveAtlas) -> Generator[Record, None, None]:
        return live.read_text(self.text)


class _Steer(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    features: list[str]
    prompt: str
    dose: float = 0.2
    n_samples: int = 1
    n_new_tokens: int = 60
    seed: int = 0

    def records(self, live: LiveAtlas) -> Generator[Record, None, None]:
        return live.steer(**self.model_dump())


class _Trace(BaseModel):
    model_config = ConfigDict(strict=True)
    prompt: str
    answer: str | None = None
    foil: str | None = None
    chat: bool = False

    def records(self, live: LiveAtlas) -> Generator[Record, None, None]:
        return live.trace(**self.model_dump())


class _Change(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    prompt: str
    features: list[str]
    token: int
    factor: float = 0.0
    other: str | None = None
    chat: bool = False

    def records(self, live: LiveAtlas) -> Generator[Record, None, None]:
        return live.change(**self.model_dump())


class _Plan(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    prompt: str
    features: list[str]
    token: int
    factor: float = 0.0
    chat: bool = False

    def records(self, live: LiveAtlas) -> Generator[Record, None, None]:
        return live.plan(**self.model_dump())


_Question = _Text | _Steer | _Trace | _Change | _Plan
_QUESTIONS: dict[str, type[_Question]] = {
    "text": _Text,
    "steer": _Steer,
    "trace": _Trace,
    "trace/edit": _Change,
    "trace/plan": _Plan,
}


def make_server(
    live: LiveAtlas,
    *,
    host: str = "127.0.0.1",
    port: int = 8765,
    token: str | None = None,
    wait_s: float = 30.0,
) -> tuple[Server, str]:
    """A server, not yet running, and the address to open (with its token). Port 0 takes a free one.
    Raises UserError where it cannot listen."""
    token, only_local = token or secrets.token_urlsafe(24), is_local(host)
    turns = ModelTurns(wait_s=wait_s)
    site = _Site(directory=live.site_folder, html=True)
    if not only_local:
        site.cookie = f"{_COOKIE}={token}; HttpOnly; SameSite=Strict; Path=/"

    async def answer(request: Request) -> Response:
        kind = _QUESTIONS[request.url.path.removeprefix("/api/")]
        return await _answer(live, turns, request, kind)

    async def cancel(request: Request) -> Response:
        live.stop()
        return JSONResponse({"stopped": True})

    async def health(request: Request) -> Response:
        return JSONResponse(_health(live))

    app = Guarded(
        [
            Route("/api/health", health, methods=["GET"]),
            Route("/api/cancel", cancel, methods=["POST"]),
            *(Route(f"/api/{name}", answer, methods=["POST"]) for name in _QUESTIONS),
            Mount("/", site),
        ],
        only_local=only_local,
        token=token,
        given=lambda request: _given(request, only_local=only_local),
        error=lambda status, message: PlainTextResponse(message, status),
    )
    server = Server(app, host=host, port=port)
    return server, f"{server.address}/?token={token}"


def _given(request: Request, *, only_local: bool) -> str | None:
    """The model asks for the token in a header. Files, elsewhere, for the one in the address (the
    page itself) or in the cookie that it leaves."""
    if request.url.path.startswith("/api/"):
        return request.headers.get("X-Atlas-Token", "")
    query, cookies = request.query_params, request.cookies
    return None if only_local else query.get("token") or cookies.get(_COOKIE, "")


class _Site(StaticFiles):
    """The files; `cookie` is left with each of them."""

    cookie = ""

    async def get_response(self, path: str, scope: Scope) -> Response:
        if scope["method"] not in ("GET", "HEAD"):
            raise HTTPException(
                404, f"there is /api/cancel and {', '.join(f'/api/{name}' for name in _QUESTIONS)}"
            )
        response = await super().get_response(path, scope)
        if self.cookie:
            response.headers["Set-Cookie"] = self.cookie
        return response


async def _answer(
    live: LiveAtlas, turns: ModelTurns, request: Request, kind: type[_Question]
) -> Response:
    body = await json_body(request, at_most=_MAX_BODY)
    try:
        made = kind.model_validate(body).records(live)
    except ValidationError as error:
        problems = tuple(
            Problem(what=e["msg"], where=".".join(map(str, e["loc"]))) for e in error.errors()
        )
        raise UserError("a field is missing or of the wrong type", problems=problems) from error
    records = turns.items(made, stop=live.stop)
    first = await unless_gone(request, anext(records, None))  # an error can still be the answer
    return Streamed(_lines(first, records), media_type="application/x-ndjson")


async def _lines(
    record: Record | None, records: AsyncGenerator[Record, None]
) -> AsyncGenerator[str, None]:
    async with aclosing(records):
        try:
            while record is not None:
                yield json.dumps(record) + "\n"
                record = await anext(records, None)
        except UserError as error:
            yield json.dumps({"error": str(error)}) + "\n"


def _health(live: LiveAtlas) -> Record:
    limits = {
        "max_tokens": MAX_TOKENS,
        "max_new_tokens": MAX_NEW_TOKENS,
        "max_samples": MAX_SAMPLES,
    }
    return {
        "live": True,
        "model": live.model.name,
        "limits": limits,
        "steering": True,
        "tracing": True,
    }
