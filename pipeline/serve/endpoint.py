"""A local endpoint that speaks OpenAI's completions and chat protocols, with steering plans.

    GET  /v1/models, /v1/models/{id}    the model, and `<model>:<plan>` for each plan
    POST /v1/completions                {"model": "smollm2-135m:cooking", "prompt": "I think", …}
    POST /v1/chat/completions           the same with messages, through the model's own template

1. A request names a plan in its model, or carries `"steering": {"plan": "cooking", "strength":
   0.4}` or a whole plan document under `"steering": {"document": {…}}`.
2. It is served as it asks or refused by the name of the field. Null is the default. `HARMLESS`
   fields change nothing here and are accepted; `NEUTRAL` ones only with the value that changes
   nothing.
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
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from featureflow.errors import Problem, UserError
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
from pipeline.serve.streamed_text import SettledText
from steering.generation import Sampling, stop_tokens, stream
from steering.hooks import SteeringReport
from steering.plan import Plan
from steering.plan_files import plan_of_document
from steering.sequences import Dictionary, Prompt, SteerableModel, encoded

HARMLESS = (
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "parallel_tool_calls"),
)
NEUTRAL: Mapping[str, Any] = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "best_of": 1,
    "suffix": "",
    "tools": [],
    "tool_choice": "none",
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
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
        return JSONResponse({"object": "list", "data": [*map(_model, endpoint.names())]})

    async def model(request: Request) -> Response:
        endpoint.plan(request.path_params["name"])
        return JSONResponse(_model(request.path_params["name"]))

    async def completion(request: Request) -> Response:
        return await _answer(endpoint, turns, request, _Completion)

    async def chat(request: Request) -> Response:
        return await _answer(endpoint, turns, request, _Chat)

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
        error=lambda status, message: JSONResponse(_error(status, message), status),
    )
    return Server(app, host=host, port=port)


def _bearer(request: Request) -> str:
    return request.headers.get("Authorization", "").removeprefix("Bearer ")


def _error(status: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": status}}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "featureflow"}


class _Strict(BaseModel):
    """Every field as its type says, none unknown; null is the default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_null(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {k: v for k, v in values.items() if v is not None or k == "content"}


def _joined(content: Any) -> Any:
    """The text of a message's content: parts are joined, null is empty."""
    parts = content if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if _is_text(part)]
    if len(texts) != len(parts):
        raise ValueError("a text, or parts of the type text")
    return "".join(texts) if parts else "" if content in (None, []) else content


def _is_text(part: Any) -> bool:
    return (
        isinstance(part, dict)
        and set(part) == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


class _Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined)]


class _Steering(_Strict):
    plan: str | None = None
    document: dict[str, Any] | None = None
    strength: float | None = None


class _StreamOptions(_Strict):
    include_usage: bool = False


class _Asked(_Strict):
    """What both kinds of request may say."""

    model: str | None = None
    max_tokens: Annotated[
        Annotated[int, Ge(1)] | None,
        Field(validation_alias=AliasChoices("max_tokens", "max_completion_tokens")),
    ] = None
    temperature: Annotated[float, Ge(0)] = 1.0
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    top_k: Annotated[int, Ge(1)] | None = None
    n: Annotated[int, Ge(1), Le(16)] = 1
    seed: int = 0
    stop: Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)] = []
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    steering: _Steering | None = None

    @property
    def is_chat(self) -> bool:
        return isinstance(self, _Chat)


class _Completion(_Asked):
    prompt: str = ""
    echo: bool = False
    logprobs: Annotated[int, Ge(0), Le(20)] | None = None

    @model_validator(mode="after")
    def _is_served(self) -> _Completion:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo is not served together with logprobs")
        return self

    def n_top(self) -> int | None:
        return self.logprobs


class _Chat(_Asked):
    messages: Annotated[list[_Message], MinLen(1)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Ge(0), Le(20)] | None = None

    @model_validator(mode="after")
    def _is_served(self) -> _Chat:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def n_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def _parsed(kind: type[_Completion | _Chat], body: Mapping[str, Any]) -> _Completion | _Chat:
    served = {
        name: value
        for name, value in body.items()
        if name not in HARMLESS and not (name in NEUTRAL and _is_same(value, NEUTRAL[name]))
    }
    try:
        return kind.model_validate(served)
    except ValidationError as error:
        problems = tuple(map(_problem, error.errors()))
        raise UserError("this request cannot be served as it asks", problems=problems) from error


def _is_same(value: Any, neutral: Any) -> bool:
    """Equal, where true is not 1 and false is not 0."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _problem(error: Any) -> Problem:
    where = ".".join(map(str, error["loc"]))
    if error["type"] == "extra_forbidden":
        only = json.dumps(NEUTRAL[where]) if where in NEUTRAL else None
        return Problem(what="this endpoint does not serve this field", where=where, expected=only)
    what = error["msg"].removeprefix("Value error, ")
    return Problem(what=what, where=where or None, found=repr(error["input"])[:80])


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A request that is served; `n_top` is None where no log-probabilities are asked for."""

    endpoint: Endpoint
    asked: _Completion | _Chat
    prompt: Prompt
    n_prompt: int
    plan: Plan | None
    sampling: Sampling
    n_top: int | None

    @classmethod
    def of(cls, endpoint: Endpoint, asked: _Completion | _Chat) -> _Job:
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
            n_top=asked.n_top(),
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
        self, row: int, text: str, reason: str | None, tokens: Sequence[_Token] = ()
    ) -> dict[str, Any]:
        written: dict[str, Any] = {"text": text}
        if self.asked.is_chat:
            part = "delta" if self.asked.stream else "message"
            written = {part: {"role": "assistant", "content": text}}
        listed = None
        if self.n_top is not None and tokens:
            write = _chat_log_probs if self.asked.is_chat else _log_probs
            listed = write(self.endpoint.model.tokenizer, tokens, self.n_top)
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


def _prompt(model: SteerableModel, asked: _Completion | _Chat) -> Prompt:
    if isinstance(asked, _Completion):
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


def _plan_of(endpoint: Endpoint, asked: _Asked) -> Plan | None:
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


class _Token(NamedTuple):
    id: int
    log_prob: float
    top: Sequence[tuple[int, float]]
    offset: int


class _Piece(NamedTuple):
    """New text of one choice; `reason` says why it ends there."""

    row: int
    text: str
    token: _Token | None = None
    reason: str | None = None


def _pieces(job: _Job, reports: list[SteeringReport]) -> Generator[_Piece, None, None]:
    """To be closed by who does not exhaust it: until then the model is steered."""
    model, asked = job.endpoint.model, job.asked
    texts = [SettledText(model.tokenizer.decode, asked.stop) for _ in range(asked.n)]
    ends, going = stop_tokens(model, job.sampling), set(range(asked.n))
    if isinstance(asked, _Completion) and asked.echo:
        yield from (_Piece(row, asked.prompt) for row in range(asked.n))
    steps = stream(
        model,
        job.endpoint.saes,
        job.prompt,
        [job.plan],
        n_samples=asked.n,
        n_top=job.n_top or 0,
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
                    token, new = _Token(id_, value, top, len(text)), text.add(id_)
                    is_last = number == job.sampling.n_tokens
                    reason = "stop" if text.is_stopped else "length" if is_last else None
                    piece = _Piece(row, new + (text.rest() if reason else ""), token, reason)
                going -= {row} if piece.reason else set()
                yield piece
            if not going:
                break


async def _answer(
    endpoint: Endpoint, turns: ModelTurns, request: Request, kind: type[_Completion | _Chat]
) -> Response:
    job = _Job.of(endpoint, _parsed(kind, await json_body(request, at_most=_MAX_BODY)))
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
            yield _event(_error(400, str(error)))
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


def _log_probs(tokenizer: Any, tokens: Sequence[_Token], n_top: int) -> dict[str, Any]:
    tops = [{tokenizer.token_text(i): _finite(v) for i, v in token.top} for token in tokens]
    return {
        "tokens": [tokenizer.token_text(token.id) for token in tokens],
        "token_logprobs": [_finite(token.log_prob) for token in tokens],
        "top_logprobs": tops if n_top else None,
        "text_offset": [token.offset for token in tokens],
    }


def _chat_log_probs(tokenizer: Any, tokens: Sequence[_Token], n_top: int) -> dict[str, Any]:
    def entry(id_: int, value: float) -> dict[str, Any]:
        text, bytes_ = tokenizer.token_text(id_), list(tokenizer.token_bytes(id_))
        return {"token": text, "bytes": bytes_, "logprob": _finite(value)}

    listed = [
        {**entry(token.id, token.log_prob), "top_logprobs": [entry(*each) for each in token.top]}
        for token in tokens
    ]
    return {"content": listed}


def _finite(value: float) -> float:
    return max(value, -9999.0)
