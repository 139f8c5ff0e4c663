"""Documents: what every corpus yields, how a record becomes one, the seeded shuffle they go
through, and cutting long texts at paragraphs."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

SHUFFLE_CHARACTERS = 64_000_000
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_LINE_END = re.compile(r"\n|(?<=[.!?])\s")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, where it comes from, what it is called, and its label (empty when it has none). A
    conversation has `messages` (role, content and what else they hold) for the model's chat
    template; its text is their contents."""

    text: str
    source: str
    title: str = ""
    label: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Which field of a JSON line or row is what; empty for none."""

    text: str
    title: str
    label: str


def document_of(
    record: Mapping[str, Any], fields: Fields, *, source: str, number: int
) -> Document | None:
    """The document of a record; None where its text is null. Raises ValueError that says what is
    there instead of text or a conversation."""
    value = record.get(fields.text)
    if value is None:
        return None
    messages = () if isinstance(value, str) else _messages_of(value)
    text = value if isinstance(value, str) else "\n\n".join(each["content"] for each in messages)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"half of a surrogate pair, {code} at character {error.start}") from error
    title = _name_of(record.get(fields.title), fields.title)
    return Document(
        text=text,
        source=source,
        title=title or f"{source}, {number}",
        label=_name_of(record.get(fields.label), fields.label),
        messages=messages,
    )


def _messages_of(value: Any) -> tuple[Mapping[str, Any], ...]:
    """Parts of text are joined, null is empty; what a message holds besides, as calls of tools,
    goes to the template too."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{type(value).__name__}, not a string")
    messages = []
    for each in value:
        if not (isinstance(each, Mapping) and isinstance(each.get("role"), str)):
            raise ValueError("a list that is no conversation (messages of role and content)")
        others = {name: other for name, other in each.items() if other is not None}
        messages.append({**others, "content": _content_of(each.get("content"))})
    if not messages:
        raise ValueError("an empty list")
    return tuple(messages)


def _content_of(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts: list[str] = []
    for part in content if isinstance(content, (list, tuple)) else [content]:
        text = part.get("text") if isinstance(part, Mapping) else None
        if not isinstance(text, str) or part.get("type", "text") != "text":
            raise ValueError("a message whose content is neither text nor parts of text")
        texts.append(text)
    return "".join(texts)


def _name_of(value: Any, field: str) -> str:
    """A title or label; half of a surrogate pair becomes a visible question mark."""
    if value is None or value != value:  # NaN is how some tables write nothing
        return ""
    if isinstance(value, (list, tuple, Mapping)):
        raise ValueError(f"a {type(value).__name__} in the field {field!r}")
    return str(value).encode("utf-8", "replace").decode()


class PassedOver(Counter[str]):
    """How many records of each source had no text."""

    def notes(self) -> list[str]:
        return [
            f"{n:,} records of {source} without text (null) were passed over"
            for source, n in self.items()
        ]


def iter_shuffled(
    documents: Iterable[Document], seed: int, *, n_characters: int = SHUFFLE_CHARACTERS
) -> Iterator[Document]:
    """The same documents in an order drawn from `seed`.

    Up to `n_characters` are held; one at random is given out for each that comes in. A corpus that
    fits is shuffled uniformly, a larger one within a window of that size.
    """
    generator = random.Random(seed)
    held: list[Document] = []
    n_held = 0
    for document in documents:
        held.append(document)
        n_held += len(document.text)
        while n_held > n_characters and len(held) > 1:
            chosen = _take(held, generator)
            n_held -= len(chosen.text)
            yield chosen
    while held:
        yield _take(held, generator)


def _take(held: list[Document], generator: random.Random) -> Document:
    index = generator.randrange(len(held))
    held[index], held[-1] = held[-1], held[index]
    return held.pop()


def iter_passages(
    documents: Iterable[Document], n_characters: int, seed: int
) -> Iterator[Document]:
    """Of every document longer than `n_characters` one part of at most that length, drawn from
    `seed`; conversations stay whole."""
    generator = random.Random(seed)
    for document in documents:
        if len(document.text) > n_characters and not document.messages:
            document = replace(
                document, text=generator.choice(list(iter_parts(document.text, n_characters)))
            )
        yield document


def iter_parts(text: str, n_characters: int) -> Iterator[str]:
    """`text` cut into parts of at most `n_characters`, at the last paragraph end that fits, else at
    a line or sentence end, else anywhere. The parts joined are the text."""
    start = 0
    while len(text) - start > n_characters:
        stop = _last_end(text, start, start + n_characters)
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]


def _last_end(text: str, start: int, limit: int) -> int:
    earliest = start + (limit - start) // 2  # no slivers
    for pattern in (_PARAGRAPH_END, _LINE_END):
        ends = [match.end() for match in pattern.finditer(text, earliest, limit)]
        if ends:
            return ends[-1]
    return limit
