"""The vocabulary as the atlas needs it: bytes of every token, texts to show, and two groupings of
tokens.

1. a token is its bytes; text is made by joining bytes first and reading UTF-8 afterwards, so no `Ġ`
   and no half characters;
2. `families` groups tokens that differ in case, leading space or an English ending (" Run",
   "running" → run);
3. `classes` puts each token into one class of characters (number, capitalised word, opening
   bracket, …).

Both groupings are partitions, so a rule over them is scored from the same counts as a rule over
tokens.
"""

from __future__ import annotations

import unicodedata
from codecs import getincrementaldecoder
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Int32

CLASSES = (
    "special tokens",
    "line breaks",
    "spaces",
    "digits",
    "ends of sentences",
    "commas and colons",
    "opening brackets and quotes",
    "closing brackets and quotes",
    "dashes and slashes",
    "other symbols",
    "words in capitals",
    "capitalised words",
    "lower-case words",
    "pieces inside words",
    "letters of other scripts",
    "parts of characters",
)
_OPENING, _CLOSING = set("([{<«“‘„"), set(")]}>»”’")
_ENDINGS = ("'s", "ings", "ing", "edly", "ed", "ies", "es", "ly", "s")


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """Bytes of every token; `special` ids are never part of text."""

    tokens: Sequence[bytes]
    special: frozenset[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def text(self, token: int) -> str:
        """The token alone, for lists; bytes of an incomplete character as \\xNN."""
        return self.tokens[token].decode("utf-8", errors="backslashreplace")

    def quoted(self, token: int) -> str:
        """The token in quotes with line breaks made visible, cut when it is very long."""
        return self.quote(self.text(token))

    @staticmethod
    def quote(text: str) -> str:
        """Text in quotes with line breaks and unusual spaces made visible, cut when it is very
        long."""
        shown = text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")
        if not shown.isascii():
            shown = "".join(
                c if c == " " or not c.isspace() else f"⟨U+{ord(c):04X}⟩" for c in shown
            )
        return f"‘{shown if len(shown) <= 32 else shown[:31] + '…'}’"

    def join(self, tokens: Sequence[int]) -> str:
        """The text of a run of tokens: bytes first, then UTF-8."""
        return b"".join(self.tokens[int(t)] for t in tokens).decode("utf-8", errors="replace")

    def whole(self, tokens: Sequence[int]) -> list[tuple[str, int]]:
        """The text in pieces of whole characters, each with how many tokens it is of; bytes that
        never become a character are U+FFFD."""
        decoder, pieces, n = getincrementaldecoder("utf-8")(errors="replace"), [], 0
        text = ""
        for place, token in enumerate(tokens, 1):
            text += decoder.decode(self.tokens[int(token)], final=place == len(tokens))
            n += 1
            if not decoder.getstate()[0]:
                pieces.append((text, n))
                text, n = "", 0
        return pieces

    @cached_property
    def classes(self) -> Int32[np.ndarray, "token"]:
        """Index into CLASSES of every token."""
        return np.array([self._class_of(t) for t in range(len(self))], dtype=np.int32)

    @cached_property
    def families(self) -> tuple[Int32[np.ndarray, "token"], list[str]]:
        """The family of every token, and a name for each: its first token in full, since stems are
        no words."""
        number: dict[str, int] = {}
        names: list[str] = []
        index = np.zeros(len(self), dtype=np.int32)
        for token in range(len(self)):
            text = self.text(token)
            index[token] = number.setdefault(_family(text), len(names))
            if index[token] == len(names):
                names.append(text.strip().casefold() or text)
        return index, names

    def save(self, path: Path) -> None:
        """As one .npz of plain arrays, groupings included, so that every process need not make them
        again."""
        index, names = self.families
        arrays: dict[str, np.ndarray] = {
            **_packed_texts("token", self.tokens),
            **_packed_texts("family", [name.encode() for name in names]),
            "special": np.array(sorted(self.special)),
            "classes": self.classes,
            "families": index,
        }
        np.savez(path, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        with np.load(path, allow_pickle=False) as arrays:
            made = cls(
                tokens=_unpacked_texts("token", arrays),
                special=frozenset(int(t) for t in arrays["special"]),
            )
            made.__dict__["classes"] = arrays["classes"]
            made.__dict__["families"] = (
                arrays["families"],
                [t.decode() for t in _unpacked_texts("family", arrays)],
            )
        return made

    def _class_of(self, token: int) -> int:
        if token in self.special:
            return 0
        try:
            text = self.tokens[token].decode("utf-8")
        except UnicodeDecodeError:
            return CLASSES.index("parts of characters")
        return CLASSES.index(_class_of_text(text))


def _packed_texts(name: str, texts: Sequence[bytes]) -> dict[str, np.ndarray]:
    offset = np.cumsum([0, *(len(t) for t in texts)])
    return {
        f"{name}_offset": offset,
        f"{name}_bytes": np.frombuffer(b"".join(texts), dtype=np.uint8),
    }


def _unpacked_texts(name: str, arrays: Mapping[str, np.ndarray]) -> list[bytes]:
    offset, blob = arrays[f"{name}_offset"].tolist(), arrays[f"{name}_bytes"].tobytes()
    return [blob[a:b] for a, b in pairwise(offset)]


def _class_of_text(text: str) -> str:
    body = text.strip()
    if not body:
        return "line breaks" if "\n" in text else "spaces"
    return next((name for name, holds in _TESTS if holds(body)), None) or _class_of_word(text, body)


_TESTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    (
        "digits",
        lambda body: all(c.isdigit() or c in ".," for c in body) and any(c.isdigit() for c in body),
    ),
    ("ends of sentences", lambda body: all(c in ".!?…" for c in body)),
    ("commas and colons", lambda body: all(c in ",;:" for c in body)),
    ("opening brackets and quotes", lambda body: all(c in _OPENING for c in body)),
    ("closing brackets and quotes", lambda body: all(c in _CLOSING for c in body)),
    ("dashes and slashes", lambda body: all(c in "-–—/\\_" for c in body)),
    ("other symbols", lambda body: not any(c.isalnum() for c in body)),
)


def _class_of_word(text: str, body: str) -> str:
    letters = [c for c in body if c.isalpha()]
    if letters and not any(unicodedata.name(c, "").startswith("LATIN") for c in letters):
        return "letters of other scripts"
    if len(letters) > 1 and all(c.isupper() for c in letters):
        return "words in capitals"
    if body[0].isupper():
        return "capitalised words"
    return "lower-case words" if text[0].isspace() else "pieces inside words"


def _family(text: str) -> str:
    stem = text.strip().casefold()
    if not stem.isalpha() and not stem.endswith("'s"):
        return stem or text
    for ending in _ENDINGS:
        if stem.endswith(ending) and len(stem) - len(ending) >= 4:
            return stem[: -len(ending)]
    return stem
