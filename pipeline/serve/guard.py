"""What every local server here shares: the port, whom it answers, the body, the model's turn.

1. `Guarded` puts checks before an app's routes. A server on this machine answers only requests that
   name this machine (`Host`), since a web page elsewhere can reach it under a name of its own, and
   none that a page from elsewhere sends (`Origin`). A server that listens elsewhere relies on its
   token, which is compared in constant time. A refusal reads what the client still sends (up to a
   bound), so that the client sees the answer, and ends the connection.
2. `json_body` reads an object of bounded size that can be written as text.
3. `ModelTurns` runs one generator at a time in one thread. Others wait for their turn for a while.
   When the client goes away, its generator is closed after the step that it is in.
4. `Server` opens the port, or says why it cannot, and runs the app on uvicorn.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import re
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from typing import Any, TypeVar, cast

import anyio
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Receive, Scope, Send

from featureflow.errors import UserError

_MOST_DRAINED, _DRAIN_S = 16 << 20, 1.0
_LOCAL_NAMES = ("127.0.0.1", "localhost", "::1")
_HOST = re.compile(r"(?:\[([^\]]*)\]|([^:\[\]]*))(?::\d*)?")
_END: Any = object()
T = TypeVar("T")


def is_local(host: str) -> bool:
    """Whether a host to listen on is reached from this machine only."""
    return host.strip("[]").lower() in _LOCAL_NAMES


class Guarded(Starlette):
    """Routes behind the checks. `given` finds the token in a request (None: it needs none), `error`
    makes the answer to what is refused or wrong."""

    def __init__(
        self,
        routes: Sequence[BaseRoute],
        *,
        only_local: bool,
        token: str,
        given: Callable[[Request], str | None],
        error: Callable[[int, str], Response],
    ) -> None:
        self._only_local, self._token, self._given, self._error = only_local, token, given, error
        super().__init__(
            routes=routes, exception_handlers={HTTPException: self._wrong, UserError: self._wrong}
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        with suppress(ClientDisconnect):
            if refusal := self._refusal(request):
                response = await self._wrong(request, HTTPException(*refusal))
                await response(scope, receive, send)
            else:
                await super().__call__(scope, receive, send)

    def _refusal(self, request: Request) -> tuple[int, str] | None:
        """Status and sentence for a request that is not answered."""
        origin = request.headers.get("Origin")
        asked = [request.headers.get("Host", "")]
        asked += [] if origin is None else [origin.partition("://")[2]]
        if self._only_local and not all(_names_this_machine(host.strip()) for host in asked):
            return 403, "only requests that name this machine are answered"
        given, token = self._given(request), self._token.encode()
        if given is not None and not hmac.compare_digest(given.encode(errors="replace"), token):
            return 401, "the token is missing or wrong"
        return None

    async def _wrong(self, request: Request, error: Any) -> Response:
        """The answer to an error, when the client has sent what it was about to send (up to a
        bound): refused while it still sends, it would see a broken pipe and not the answer."""
        n_read = 0
        with anyio.move_on_after(_DRAIN_S), suppress(RuntimeError):  # the body has been read
            async for chunk in request.stream():
                n_read += len(chunk)
                if n_read > _MOST_DRAINED:
                    break
        is_http = isinstance(error, HTTPException)
        response = self._error(
            *((error.status_code, error.detail) if is_http else (400, str(error)))
        )
        response.headers["Connection"] = "close"
        return response


def _names_this_machine(host: str) -> bool:
    named = _HOST.fullmatch(host)
    return bool(named and is_local(named[1] or named[2] or ""))


async def json_body(request: Request, *, at_most: int) -> dict[str, Any]:
    """The object in the body. Raises UserError for anything else."""
    content, declared = bytearray(), int(request.headers.get("Content-Length", 0))
    if declared <= at_most:
        async for chunk in request.stream():
            content += chunk
            if len(content) > at_most:
                break
    if not 0 < (n := max(declared, len(content))) <= at_most:
        raise UserError(
            "the body is missing or too large", expected=f"1 … {at_most} bytes", found=str(n)
        )
    try:
        document = json.loads(content)
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UserError("the body holds half a character", found=f"\\u{ord(half):04x}") from error
    except (ValueError, RecursionError) as error:
        raise UserError("the body is not JSON", found=str(error)) from error
    if not isinstance(document, dict):
        raise UserError("the body is not an object", found=type(document).__name__)
    return document


class Streamed(StreamingResponse):
    """A stream whose source is closed when the client has gone, also while it waits to send."""

    async def stream_response(self, send: Send) -> None:
        async with aclosing(cast(AsyncGenerator, self.body_iterator)):
            await super().stream_response(send)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """What the work gives; it is cancelled when the client goes away. Raises ClientDisconnect."""
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ClientDisconnect
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class ModelTurns:
    """One model, one thread, one request at a time; others wait `wait_s` for their turn."""

    def __init__(self, *, wait_s: float) -> None:
        self._wait_s = wait_s
        self._turn = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def items(
        self, generator: Generator[T, None, None], *, stop: Callable[[], None] = lambda: None
    ) -> AsyncGenerator[T, None]:
        """The generator's items, each made in the thread. The generator is closed in any case
        before the next turn; `stop` asks a long step to end. Raises HTTPException 429 when the turn
        does not come."""
        try:
            async with asyncio.timeout(self._wait_s):
                await self._turn.acquire()
        except TimeoutError:
            raise HTTPException(429, "the model is busy with another request") from None
        try:
            while (item := await self._in_thread(next, generator, _END)) is not _END:
                yield item
        finally:
            stop()
            with anyio.CancelScope(shield=True):
                await self._in_thread(generator.close)
            self._turn.release()

    def _in_thread(self, function: Callable[..., Any], *args: Any) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function, *args)


class Server:
    """An app on an open port; port 0 takes a free one. Raises UserError where it cannot listen."""

    def __init__(self, app: ASGIApp, *, host: str, port: int) -> None:
        name = host.strip("[]")
        family = socket.AF_INET6 if ":" in name else socket.AF_INET
        try:
            self._socket = socket.create_server((name, port), family=family)
        except (OSError, OverflowError) as error:
            raise UserError(
                "cannot listen here",
                where=f"{host}:{port}",
                found=str(error),
                fix="choose another --port or --host",
            ) from error
        self.port: int = self._socket.getsockname()[1]
        self.address = f"http://{f'[{name}]' if ':' in name else name}:{self.port}"
        config = uvicorn.Config(
            app,
            lifespan="off",
            ws="none",
            http="h11",
            loop="asyncio",
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=1,
            headers=[("X-Content-Type-Options", "nosniff"), ("Referrer-Policy", "no-referrer")],
        )
        self._uvicorn = uvicorn.Server(config)

    def run(self) -> None:
        """Answer requests until SIGINT or SIGTERM, or the end of `running`."""
        self._uvicorn.run(sockets=[self._socket])

    @contextmanager
    def running(self) -> Iterator[str]:
        """Inside, a thread answers requests; gives the address."""
        thread = threading.Thread(target=self.run, name="server", daemon=True)
        thread.start()
        try:
            yield self.address
        finally:
            self._uvicorn.should_exit = True
            thread.join()
