"""Documents: what every corpus yields, the seeded shuffle they go through, and cutting long texts
at paragraphs."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

SHUFFLE_CHARACTERS = 64_000_000
_PARAGRAPH_END = re.compile(r"\n\s*\n")
_LINE_END = re.compile(r"\n|(?<=[.!?])\s")


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text, where it comes from, what it is called, and its label (empty when it has none)."""

    text: str
    source: str
    title: str = ""
    label: str = ""


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
    `seed`."""
    generator = random.Random(seed)
    for document in documents:
        if len(document.text) > n_characters:
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
