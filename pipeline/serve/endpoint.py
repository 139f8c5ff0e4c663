"""A local endpoint that speaks OpenAI's completions and chat protocols, with steering plans.

    GET  /v1/models, /v1/models/{id}    the model, and `<model>:<plan>` for each plan
    POST /v1/completions                {"model": "smollm2-135m:cooking", "prompt": "I think", …}
    POST /v1/chat/completions           the same with messages, through the model's own template

1. A request names a plan in its model, or carries `"steering": {"plan": "cooking", "strength":
   0.4}` or a whole plan document under `"steering": {"document": {…}}`.
2. It is served as it asks or refused by the name of the field (pipeline/serve/protocol.py).
3. Requests wait for their turn (pipeline/serve/guard.py). The plan is off the model before the next
   one. The answer says how many tokens steering touched; a plan that touched none is an error (in a
   stream, its last event), never silently plain text.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.serve.guard import (
    Guarded,
    ModelTurns,
    Server,
    Streamed,
    is_local,
    json_body,
    unless_gone,
)
from pipeline.serve.protocol import (
    Asked,
    Chat,
    Completion,
    Token,
    error_document,
    log_probs,
    model_document,
    parsed,
)
from pipeline.serve.streamed_text import SettledText
from steering.generation import Sampling, stop_tokens, stream
from steering.hooks import SteeringReport
from steering.plan import Plan
from steering.plan_files import plan_of_document
from steering.sequences import Dictionary, Prompt, SteerableModel, encoded

_MAX_BODY, _N_TOKENS = 1 << 20, 64


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """What is served. `plans` by name; `token` empty: no token is asked for. A request waits at
    most `wait_s` for its turn. `check(plan, where=…)` raises UserError for the plan of a request
    that belongs to other SAEs."""

    model: SteerableModel
    saes: Mapping[Site, Dictionary]
    plans: Mapping[str, Plan] = field(default_factory=dict)
    token: str = ""
    max_new_tokens: int = 512
    wait_s: float = 30.0
    check: Callable[..., None] = lambda plan, where: None

    def names(self) -> dict[str, Plan | None]:
        """Every model that a request may name, with its plan."""
        base = self.model.name
        return {base: None, **{f"{base}:{name}": plan for name, plan in self.plans.items()}}

    def plan(self, name: str) -> Plan | None:
        """The plan of a model's name. Raises HTTPException 404 for an unknown one."""
        if name not in self.names():
            raise HTTPException(404, f"no model {name!r}, but {', '.join(self.names())}")
        return self.names()[name]


def make_server(endpoint: Endpoint, *, host: str = "127.0.0.1", port: int = 8089) -> Server:
    """A server, not yet running. Raises UserError where it cannot listen."""
    turns = ModelTurns(wait_s=endpoint.wait_s)

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [*map(model_document, endpoint.names())]})

    async def model(request: Request) -> Response:
        endpoint.plan(request.path_params["name"])
        return JSONResponse(model_document(request.path_params["name"]))

    async def completion(request: Request) -> Response:
        return await _answer(endpoint, turns, request, Completion)

    async def chat(request: Request) -> Response:
        return await _answer(endpoint, turns, request, Chat)

    app = Guarded(
        [
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/models/{name:path}", model, methods=["GET"]),
            Route("/v1/completions", completion, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ],
        only_local=is_local(host),
        token=endpoint.token,
        given=lambda request: _bearer(request) if endpoint.token else None,
        error=lambda status, message: JSONResponse(error_document(status, message), status),
    )
    return Server(app, host=host, port=port)


def _bearer(request: Request) -> str:
    return request.headers.get("Authorization", "").removeprefix("Bearer ")


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A request that is served."""

    endpoint: Endpoint
    asked: Completion | Chat
    prompt: Prompt
    n_prompt: int
    plan: Plan | None
    sampling: Sampling

    @classmethod
    def of(cls, endpoint: Endpoint, asked: Completion | Chat) -> _Job:
        """Raises UserError for what is not served, and HTTPException 404 for an unknown model."""
        model, most = endpoint.model, endpoint.max_new_tokens
        prompt = _prompt(model, asked)
        n_prompt = len(encoded(model, prompt))
        if asked.max_tokens is not None and asked.max_tokens > most:
            raise UserError(
                "more new tokens than this endpoint writes",
                where="max_tokens",
                expected=f"at most {most}",
                found=str(asked.max_tokens),
            )
        sampling = Sampling(
            n_tokens=asked.max_tokens
            or max(1, min(most if asked.is_chat else _N_TOKENS, model.n_context - n_prompt)),
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k or model.d_vocab,
            stop_at=_ends_of_turn(model) if asked.is_chat else (),
        )
        return cls(
            endpoint=endpoint,
            asked=asked,
            prompt=prompt,
            n_prompt=n_prompt,
            plan=_plan_of(endpoint, asked),
            sampling=sampling,
        )

    def head(self) -> dict[str, Any]:
        chunk = ".chunk" if self.asked.stream else ""
        return {
            "id": f"cmpl-{uuid.uuid4().hex[:16]}",
            "object": f"chat.completion{chunk}" if self.asked.is_chat else "text_completion",
            "created": int(time.time()),
            "model": self.asked.model or self.endpoint.model.name,
        }

    def choice(
        self, row: int, text: str, reason: str | None, tokens: Sequence[Token] = ()
    ) -> dict[str, Any]:
        written: dict[str, Any] = {"text": text}
        if self.asked.is_chat:
            part = "delta" if self.asked.stream else "message"
            written = {part: {"role": "assistant", "content": text}}
        listed = log_probs(self.asked, self.endpoint.model.tokenizer, tokens)
        return {"index": row, **written, "finish_reason": reason, "logprobs": listed}

    def usage(self, n_tokens: int) -> dict[str, int]:
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": n_tokens,
            "total_tokens": self.n_prompt + n_tokens,
        }

    def touched(self, reports: Sequence[SteeringReport]) -> dict[str, Any]:
        """How many (token, node) pairs steering changed. Raises UserError for a plan with a
        strength that changed nothing: its text would pass for steered."""
        n_tokens = sum(report.n_touched() for report in reports)
        if n_tokens == 0 and self.plan is not None and self.plan.strength != 0:
            raise UserError(
                "the plan touched no token: this text would be unsteered",
                expected="a plan whose scope matches",
            )
        return {"plan": "" if self.plan is None else self.plan.name, "tokens": n_tokens}


def _prompt(model: SteerableModel, asked: Completion | Chat) -> Prompt:
    if isinstance(asked, Completion):
        return asked.prompt
    messages = [message.model_dump() for message in asked.messages]
    return tuple(model.tokenizer.chat(messages, name=model.name))


def _ends_of_turn(model: SteerableModel) -> tuple[int, ...]:
    """The tokens that end a reply, beside those that end any text."""
    listed = (
        getattr(model.tokenizer.hf, "eos_token_id", None),
        getattr(getattr(model.hf, "generation_config", None), "eos_token_id", None),
    )
    ids = [i for each in listed for i in (each if isinstance(each, list) else [each])]
    return tuple({i for i in ids if i is not None})


def _plan_of(endpoint: Endpoint, asked: Asked) -> Plan | None:
    base = endpoint.model.name
    named, wanted = endpoint.plan(base if asked.model is None else asked.model), asked.steering
    if wanted is None:
        return named
    given = [each for each in (named, wanted.plan, wanted.document) if each is not None]
    if len(given) != 1:
        raise UserError(
            "one plan a request: by name or as a document",
            where="steering",
            expected='{"plan": "name"} or {"document": {…}}',
            found=f"{len(given)} plans",
        )
    plan = named
    if wanted.document is not None:
        plan = plan_of_document(wanted.document, where="steering.document")
        endpoint.check(plan, where="steering.document")
    elif wanted.plan is not None:
        plan = endpoint.plan(f"{base}:{wanted.plan}")
    return plan if plan is None or wanted.strength is None else plan.with_strength(wanted.strength)


class _Piece(NamedTuple):
    """New text of one choice; `reason` says why it ends there."""

    row: int
    text: str
    token: Token | None = None
    reason: str | None = None


def _pieces(job: _Job, reports: list[SteeringReport]) -> Generator[_Piece, None, None]:
    """To be closed by who does not exhaust it: until then the model is steered."""
    model, asked = job.endpoint.model, job.asked
    texts = [SettledText(model.tokenizer.decode, asked.stop) for _ in range(asked.n)]
    ends, going = stop_tokens(model, job.sampling), set(range(asked.n))
    if isinstance(asked, Completion) and asked.echo:
        yield from (_Piece(row, asked.prompt) for row in range(asked.n))
    steps = stream(
        model,
        job.endpoint.saes,
        job.prompt,
        [job.plan],
        n_samples=asked.n,
        n_top=asked.n_top() or 0,
        seed=asked.seed,
        sampling=job.sampling,
        reports=reports,
    )
    with closing(steps):
        for number, step in enumerate(steps, 1):
            for row, id_, value, top in zip(
                step.rows, step.ids, step.log_probs, step.top, strict=True
            ):
                if row not in going:
                    continue
                text = texts[row]
                if id_ in ends:
                    piece = _Piece(row, text.rest(), None, "stop")
                else:
                    token, new = Token(id_, value, top, len(text)), text.add(id_)
                    is_last = number == job.sampling.n_tokens
                    reason = "stop" if text.is_stopped else "length" if is_last else None
                    piece = _Piece(row, new + (text.rest() if reason else ""), token, reason)
                going -= {row} if piece.reason else set()
                yield piece
            if not going:
                break


async def _answer(
    endpoint: Endpoint, turns: ModelTurns, request: Request, kind: type[Completion | Chat]
) -> Response:
    job = _Job.of(endpoint, parsed(kind, await json_body(request, at_most=_MAX_BODY)))
    reports: list[SteeringReport] = []
    pieces = turns.items(_pieces(job, reports))
    if job.asked.stream:  # what is wrong shows at the first piece, while an error can be the answer
        first = await unless_gone(request, anext(pieces, None))
        return Streamed(_events(job, first, pieces, reports), media_type="text/event-stream")
    written = await unless_gone(request, _all(pieces))
    return JSONResponse(_document(job, written, job.touched(reports)))


async def _all(pieces: AsyncGenerator[_Piece, None]) -> list[_Piece]:
    async with aclosing(pieces):
        return [piece async for piece in pieces]


def _document(job: _Job, pieces: Sequence[_Piece], touched: Mapping[str, Any]) -> dict[str, Any]:
    choices = []
    for row in range(job.asked.n):
        own = [piece for piece in pieces if piece.row == row]
        text, tokens = "".join(piece.text for piece in own), [p.token for p in own if p.token]
        choices.append(job.choice(row, text, own[-1].reason, tokens))
    usage = job.usage(sum(piece.token is not None for piece in pieces))
    return {**job.head(), "choices": choices, "usage": usage, "steering": touched}


async def _events(
    job: _Job,
    piece: _Piece | None,
    pieces: AsyncGenerator[_Piece, None],
    reports: Sequence[SteeringReport],
) -> AsyncGenerator[str, None]:
    head, n_tokens, reasons = job.head(), 0, {}
    async with aclosing(pieces):
        try:
            while piece is not None:
                tokens = [piece.token] if piece.token else []
                choice = job.choice(piece.row, piece.text, None, tokens)
                yield _event({**head, "choices": [choice]})
                n_tokens += len(tokens)
                reasons[piece.row] = piece.reason
                piece = await anext(pieces, None)
            touched = job.touched(reports)
        except UserError as error:
            yield _event(error_document(400, str(error)))
        else:
            for row, reason in sorted(reasons.items()):
                choices = [job.choice(row, "", reason)]
                yield _event({**head, "choices": choices, "steering": touched})
            if job.asked.stream_options.include_usage:
                yield _event({**head, "choices": [], "usage": job.usage(n_tokens)})
    yield "data: [DONE]\n\n"


def _event(document: Mapping[str, Any]) -> str:
    """As ASCII: some readers take U+0085, U+2028 and U+2029 for the end of a line."""
    return f"data: {json.dumps(document)}\n\n"
