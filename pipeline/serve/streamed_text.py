"""Tokens into text as it may be sent: a token comes in, the text that is settled by it goes out.

1. All tokens so far are decoded together; a token alone may be a part of a character.
2. Held back is what may still change: replacement characters at the end (a tokenizer that falls
   back to bytes shows one for each byte of a character that is not whole), and the beginning of a
   stop string.
3. At a stop string the text ends before it. At the end of generation `rest` gives what was held
   back.

Cost: one decoding of all tokens a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_NOT_WHOLE = "\ufffd"


class SettledText:
    """The text of one answer."""

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._text = ""
        self._n_sent = 0
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that is certain from now on."""
        self._ids.append(token)
        text = self._decode(self._ids)
        cut = min((place for stop in self._stops if (place := text.find(stop)) >= 0), default=None)
        self.is_stopped = cut is not None
        self._text = text if cut is None else text[:cut]
        return self._up_to(len(self._text) if self.is_stopped else self._n_settled())

    def __len__(self) -> int:
        return len(self._text)

    def rest(self) -> str:
        """What was held back, for want of further tokens."""
        return self._up_to(len(self._text))

    def _up_to(self, end: int) -> str:
        piece = self._text[self._n_sent : end]
        self._n_sent = max(self._n_sent, end)
        return piece

    def _n_settled(self) -> int:
        text = self._text.rstrip(_NOT_WHOLE)
        begun = max(
            (n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
            default=0,
        )
        return len(text) - begun
