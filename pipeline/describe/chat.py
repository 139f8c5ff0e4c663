"""One question to a language model at an address that speaks OpenAI's chat protocol, one answer.

1. Send the question at temperature 0, with the key if there is one. Only to that address: a
   redirection is refused, as it would take question and key to a place that nobody named.
2. The answer is the text of the first choice; null is the empty text. Whatever else comes is an
   error that names the address: no server, an HTTP error (with what the server said), no JSON.
3. `after_reasoning` is what an answer says after a model's reasoning. Nothing is read from before
   it, nor from an answer that ends within it.

Cost: one request a question.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

import httpx

from featureflow.errors import UserError

_LONGEST, _MOST_ANSWERED = 2000, 1 << 24
_TAGS = r"(?:think|thinking|reason|reasoning|thought)"
_REASONING_ENDS = re.compile(rf"</{_TAGS}>|\[/THINK\]", re.IGNORECASE)
_REASONING_BEGINS = re.compile(rf"<{_TAGS}>|\[THINK\]", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ChatModel:
    """`url` ends before `/chat/completions`, mostly in `/v1`. `key` empty: none is sent."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout_s: float = 60.0

    def ask(self, question: str, *, max_tokens: int) -> str:
        """The answer as it came. Raises UserError when the address does not answer as expected."""
        if not self.url.startswith(("http://", "https://")):
            raise UserError(
                "not an http address", where=self.url, expected="http://127.0.0.1:8000/v1"
            )
        try:
            status, text = self._posted(question, max_tokens)
            if status != 200:
                raise UserError(
                    "the language model refuses",
                    where=self.url,
                    found=f"{status}: {text[:_LONGEST].decode(errors='replace')}",
                )
            content = json.loads(text)["choices"][0]["message"]["content"]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            raise UserError(
                "the language model did not answer",
                where=self.url,
                found=f"{type(error).__name__}: {error}",
            ) from error
        if not isinstance(content, str | None):
            raise UserError(
                "the language model answered without text",
                where=self.url,
                found=repr(content)[:_LONGEST],
            )
        return content or ""

    def _posted(self, question: str, max_tokens: int) -> tuple[int, bytes]:
        """Status and the beginning of the answer."""
        body = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": max_tokens,
            "messages": [{"role": "user", "content": question}],
        }
        answer = httpx.stream(
            "POST",
            self.url.rstrip("/") + "/chat/completions",
            json=body,
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=self.timeout_s,
            follow_redirects=False,
        )
        text = bytearray()
        with answer as parts:
            for part in parts.iter_bytes():
                text += part
                if len(text) > _MOST_ANSWERED:
                    break
        return parts.status_code, bytes(text)


def after_reasoning(answer: str) -> str:
    """What an answer says after its reasoning; nothing while it still reasons."""
    said = _REASONING_ENDS.split(answer)[-1]
    return "" if _REASONING_BEGINS.search(said) else said.strip()
