"""OpenAI's completions and chat protocols: what a request may say, and how its answer is written.

1. `HARMLESS` fields change nothing here and are accepted; `NEUTRAL` ones only with the value that
   changes nothing. Null is the default.
2. Every other field is served as it asks or refused by its name, all problems at once.
3. `log_probs` writes tokens with their log-probabilities, which the two kinds do each in its form.

Source: the API reference of OpenAI; tests use its own client.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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

from featureflow.errors import Problem, UserError

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


class Asked(_Strict):
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
        return isinstance(self, Chat)


class Completion(Asked):
    """A request for the text that follows a prompt."""

    prompt: str = ""
    echo: bool = False
    logprobs: Annotated[int, Ge(0), Le(20)] | None = None

    @model_validator(mode="after")
    def _is_served(self) -> Completion:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo is not served together with logprobs")
        return self

    def n_top(self) -> int | None:
        return self.logprobs


class Chat(Asked):
    """A request for the next message."""

    messages: Annotated[list[_Message], MinLen(1)]
    logprobs: bool = False
    top_logprobs: Annotated[int, Ge(0), Le(20)] | None = None

    @model_validator(mode="after")
    def _is_served(self) -> Chat:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def n_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


def parsed(kind: type[Completion | Chat], body: Mapping[str, Any]) -> Completion | Chat:
    """What a body asks for. Raises UserError with every field that is not served so."""
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


class Token(NamedTuple):
    """One written token; `offset` counts characters of the answer."""

    id: int
    log_prob: float
    top: Sequence[tuple[int, float]]
    offset: int


def log_probs(
    asked: Completion | Chat, tokenizer: Any, tokens: Sequence[Token]
) -> dict[str, Any] | None:
    """The `logprobs` of a choice; None where none are asked for."""
    n_top = asked.n_top()
    if n_top is None or not tokens:
        return None
    if asked.is_chat:
        return {"content": [_listed(tokenizer, token) for token in tokens]}
    tops = [{tokenizer.token_text(i): _finite(v) for i, v in token.top} for token in tokens]
    return {
        "tokens": [tokenizer.token_text(token.id) for token in tokens],
        "token_logprobs": [_finite(token.log_prob) for token in tokens],
        "top_logprobs": tops if n_top else None,
        "text_offset": [token.offset for token in tokens],
    }


def _listed(tokenizer: Any, token: Token) -> dict[str, Any]:
    def entry(id_: int, value: float) -> dict[str, Any]:
        text, bytes_ = tokenizer.token_text(id_), list(tokenizer.token_bytes(id_))
        return {"token": text, "bytes": bytes_, "logprob": _finite(value)}

    top = [entry(*each) for each in token.top]
    return {**entry(token.id, token.log_prob), "top_logprobs": top}


def _finite(value: float) -> float:
    return max(value, -9999.0)


def error_document(status: int, message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "code": status}}


def model_document(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "featureflow"}
