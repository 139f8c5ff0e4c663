"""One question to a language model at an address that speaks OpenAI's chat protocol, one answer.

1. Send the question at temperature 0, with the key if there is one. Only to that address: a
   redirection is refused, as it would take question and key to a place that nobody named.
2. The answer is the text of the first choice. Whatever else comes is an error that names the
   address: no server, an HTTP error (with what the server said), no JSON, an answer without text.

Cost: one request a question. Standard library only.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from featureflow.errors import UserError

_LONGEST = 2000
_MOST_ANSWERED = 1 << 24


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
            request = self._request(question, max_tokens)
            with _OPENER.open(request, timeout=self.timeout_s) as answer:
                content = json.loads(answer.read(_MOST_ANSWERED))["choices"][0]["message"][
                    "content"
                ]
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(_LONGEST).decode(errors="replace")
            raise UserError(
                "the language model refuses", where=self.url, found=f"{error.code}: {said}"
            ) from error
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            raise UserError(
                "the language model did not answer", where=self.url, found=_told(error)
            ) from error
        if not isinstance(content, str):
            raise UserError(
                "the language model answered without text",
                where=self.url,
                found=repr(content)[:_LONGEST],
            )
        return content

    def _request(self, question: str, max_tokens: int) -> urllib.request.Request:
        body = {
            "model": self.model,
            "temperature": 0,
            "max_tokens": max_tokens,
            "messages": [{"role": "user", "content": question}],
        }
        bearer = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return urllib.request.Request(
            self.url.rstrip("/") + "/chat/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **bearer},
        )


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """No request: the redirection becomes an HTTPError."""


_OPENER = urllib.request.build_opener(_NoRedirection)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
