"""What the endpoint understands and answers: OpenAI's completions and chat, with a steering plan.

A request names a plan in its model (`<model>:<plan>`), or carries `"steering": {"plan": "cooking",
"strength": 0.4}` or a whole plan document under `"steering": {"document": {…}}`. `logprobs`,
`seed`, `temperature`, `top_p`, `stop` and `stream` are honoured. The answer says how many tokens
steering touched; a plan that touched none is an error (in a stream, its last event), never silently
plain text.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.serve.streamed_text import SettledText
from steering.generation import Sampling, Step, stop_tokens, stream
from steering.plan import Plan
from steering.plan_files import plan_of_document
from steering.protocols import Dictionary, SteerableModel
from steering.tally import SteeringReport

IDLE = "the plan touched no token: this text would be unsteered"


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
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError("a sampling parameter is no number", found=str(error)) from error
    return Request(
        prompt=_prompt_of(body, is_chat),
        plan=_plan_of(endpoint, body, name),
        sampling=sampling,
        seed=seed,
        stops=_stops_of(body),
        wants_logprobs=bool(body.get("logprobs")),
        wants_stream=bool(body.get("stream")),
        is_chat=is_chat,
        model_name=name,
    )


def _stops_of(body: Mapping[str, Any]) -> tuple[str, ...]:
    stops = body.get("stop") or ()
    stops = (stops,) if isinstance(stops, str) else stops
    if not isinstance(stops, (list, tuple)) or not all(isinstance(stop, str) for stop in stops):
        raise UserError("a string or a list of strings", where="stop", found=str(stops)[:80])
    return tuple(stops)


def _prompt_of(body: Mapping[str, Any], is_chat: bool) -> str:
    if not is_chat:
        prompt = body.get("prompt", "")
        if not isinstance(prompt, str):
            raise UserError(
                "one prompt a request, as a string", where="prompt", found=type(prompt).__name__
            )
        return prompt
    messages = body.get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and "content" in m for m in messages
    ):
        raise UserError("a chat needs messages with role and content", where="messages")
    return "\n".join(f"{m.get('role', 'user')}: {m['content']}" for m in messages) + "\nassistant:"


def _plan_of(endpoint: Endpoint, body: Mapping[str, Any], name: str) -> Plan | None:
    wanted = body.get("steering")
    if wanted is None:
        _, _, plan_name = name.partition(":")
        return _named(endpoint, plan_name) if plan_name else None
    if not isinstance(wanted, dict) or not {"plan", "document"} & set(wanted):
        raise UserError(
            "steering needs a plan's name or a document",
            where="steering",
            expected='{"plan": "name"}',
        )
    plan = (
        plan_of_document(wanted["document"], where="steering.document")
        if "document" in wanted
        else _named(endpoint, str(wanted["plan"]))
    )
    return plan.with_strength(_strength_of(wanted)) if "strength" in wanted else plan


def _strength_of(wanted: Mapping[str, Any]) -> float:
    try:
        return float(wanted["strength"])
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(
            "a strength is a number", where="steering.strength", found=str(error)
        ) from error


def _named(endpoint: Endpoint, name: str) -> Plan:
    if name not in endpoint.plans:
        raise UserError(
            f"there is no plan {name!r}",
            expected=", ".join(sorted(endpoint.plans)) or "none is loaded",
        )
    return endpoint.plans[name]


def answer(endpoint: Endpoint, request: Request) -> dict[str, Any]:
    reports: list[SteeringReport] = []
    pieces = list(pieces_of(endpoint, request, reports))
    touched = touched_by(request, reports)
    if is_idle(request, touched):
        raise UserError(IDLE, expected="a plan whose scope matches")
    text = "".join(piece for piece, _, _ in pieces)
    choice = choice_of(request, text, reason_of(request, len(pieces)), pieces)
    return {
        **head_of(request),
        "choices": [choice],
        "usage": {"completion_tokens": len(pieces)},
        "steering": touched,
    }


def touched_by(request: Request, reports: Sequence[SteeringReport]) -> dict[str, Any]:
    """How many (token, node) pairs steering changed."""
    name = "" if request.plan is None else request.plan.name
    return {"plan": name, "tokens": sum(report.n_touched() for report in reports)}


def is_idle(request: Request, touched: Mapping[str, Any]) -> bool:
    """A plan with a strength that changed nothing: its text would pass for steered."""
    return touched["tokens"] == 0 and request.plan is not None and request.plan.strength != 0


def reason_of(request: Request, n_pieces: int) -> str:
    return "stop" if n_pieces < request.sampling.n_tokens else "length"


def error_document(status: HTTPStatus, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": status.value}}


def pieces_of(
    endpoint: Endpoint, request: Request, reports: list[SteeringReport]
) -> Generator[tuple[str, int, float], None, None]:
    """(new text, token, log-probability), until a stop. Each token comes when the next is known,
    since the last one brings what was held back of the text. To be closed by who does not exhaust
    it: until then the model is steered."""
    text = SettledText(endpoint.model.tokenizer.decode, request.stops)
    waiting: tuple[str, int, float] | None = None
    with closing(_steps(endpoint, request, reports)) as steps:
        for step in steps:
            if waiting is not None:
                yield waiting
            waiting = (text.add(step.ids[0]), step.ids[0], step.log_probs[0])
            if text.is_stopped:
                break
    if waiting is not None:
        yield (waiting[0] + text.rest(), *waiting[1:])


def _steps(
    endpoint: Endpoint, request: Request, reports: list[SteeringReport]
) -> Generator[Step, None, None]:
    """The steps, without the one that ends the text."""
    ends = stop_tokens(endpoint.model, request.sampling)
    steps = stream(
        endpoint.model,
        endpoint.saes,
        request.prompt,
        [request.plan],
        seed=request.seed,
        sampling=request.sampling,
        reports=reports,
    )
    with closing(steps):
        for step in steps:
            if step.ids[0] not in ends:
                yield step


def head_of(request: Request, suffix: str = "") -> dict[str, Any]:
    kind = "chat.completion" if request.is_chat else "text_completion"
    return {
        "id": f"cmpl-{uuid.uuid4().hex[:16]}",
        "object": f"{kind}.{suffix}" if suffix and request.is_chat else kind,
        "created": int(time.time()),
        "model": request.model_name,
    }


def choice_of(
    request: Request,
    text: str,
    reason: str | None,
    pieces: Sequence[tuple[str, int, float]] = (),
    *,
    delta: bool = False,
) -> dict[str, Any]:
    """`pieces` (text, token, log-probability) are told where the request asks for them."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason}
    if request.is_chat:
        choice["delta" if delta else "message"] = {"role": "assistant", "content": text}
    else:
        choice["text"] = text
    if request.wants_logprobs and pieces:
        choice["logprobs"] = (
            {"content": [{"token": piece, "logprob": value} for piece, _, value in pieces]}
            if request.is_chat
            else {
                "tokens": [piece for piece, _, _ in pieces],
                "token_logprobs": [value for _, _, value in pieces],
            }
        )
    return choice
