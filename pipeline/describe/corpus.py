"""The corpus of an atlas: every row of the store as token, document, position, and what may be
counted.

1. rows come from the store's token table; filters say which are `kept` (BOS, special tokens and
   sinks are not);
2. consecutive rows of one document inside one context form a *run*; no window leaves its run;
3. documents are dealt once into three parts: labels are proposed on the first, the second decides
   which one a feature gets, and on the held-out third it is scored;
4. every row has a digest of the tokens around it, so that repeated text gives one example.

Everything is O(rows), a few bytes each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt8, UInt64

from data.store import RowFilters, TokenTable
from featureflow.errors import UserError
from pipeline.describe.vocabulary import CLASSES, Vocabulary

ATTRIBUTES = ("token", "previous", "next", "position", "source", "topic")
PARTS = ("proposing", "choosing", "held out")
PROPOSING, CHOOSING, HELD_OUT = range(3)
DIGEST_REACH = 8
_ROWS_WITH_PARTS = 20_000
POSITION_EDGES = (
    0,
    1,
    2,
    3,
    4,
    6,
    8,
    12,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    768,
    1024,
    2048,
    4096,
)
_LARGEST_LABELS, _LARGEST_SOURCES = 64, 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """Per row: token, document, position, kept, and which of PARTS its document is of. Per
    document: title, source, label (index or −1), image where they are images."""

    token: Int32[np.ndarray, "row"]
    document: Int32[np.ndarray, "row"]
    position: Int32[np.ndarray, "row"]
    kept: Bool[np.ndarray, "row"]
    part: UInt8[np.ndarray, "row"]
    titles: tuple[str, ...]
    document_source: Int32[np.ndarray, "document"]
    document_label: Int32[np.ndarray, "document"]
    sources: tuple[str, ...]
    labels: tuple[str, ...]
    vocabulary: Vocabulary
    images: tuple[str, ...] = ()

    _attributes: dict[str, Int32[np.ndarray, "row"]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __len__(self) -> int:
        return len(self.token)

    @property
    def n_kept(self) -> int:
        return int(self.kept.sum())

    @property
    def held_out(self) -> Bool[np.ndarray, "row"]:
        """Rows of documents on which labels are scored."""
        return self.part == HELD_OUT

    @cached_property
    def position_edges(self) -> tuple[int, ...]:
        """Lower edges of the position bins, up to the longest context."""
        longest = int(self.position.max(initial=0))
        return tuple(edge for edge in POSITION_EDGES if edge == 0 or edge <= longest)

    @cached_property
    def position_bin(self) -> Int32[np.ndarray, "row"]:
        return (np.searchsorted(self.position_edges, self.position, side="right") - 1).astype(
            np.int32
        )

    @cached_property
    def run_start(self) -> Int64[np.ndarray, "run"]:
        """First row of every run."""
        change = np.ones(len(self), dtype=bool)
        change[1:] = (np.diff(self.document) != 0) | (np.diff(self.position) != 1)
        return np.flatnonzero(change)

    @cached_property
    def run(self) -> Int32[np.ndarray, "row"]:
        """The run of every row."""
        marks = np.zeros(len(self), dtype=np.int32)
        marks[self.run_start[1:]] = 1
        return marks.cumsum(dtype=np.int32)

    def window(self, row: int, reach: int) -> Int64[np.ndarray, "row"]:
        """The rows at most `reach` away in the same run."""
        run = int(self.run[row])
        first = int(self.run_start[run])
        last = int(self.run_start[run + 1]) if run + 1 < len(self.run_start) else len(self)
        return np.arange(max(first, row - reach), min(last, row + reach + 1))

    def neighbour(self, offset: int) -> Int32[np.ndarray, "row"]:
        """The token `offset` rows away in the same run, −1 beyond its ends."""
        out = np.full(len(self), -1, dtype=np.int32)
        here, there = _shifted(len(self), offset)
        same = self.run[here] == self.run[there]
        out[here] = np.where(same, self.token[there], -1)
        return out

    @cached_property
    def digest(self) -> UInt64[np.ndarray, "row"]:
        """A hash of the tokens within 8 rows in the same run: equal text, equal digest. Of rows of
        images the image's."""
        if self.images:
            return mix(self.document.astype(np.uint64))
        total = np.zeros(len(self), dtype=np.uint64)
        with np.errstate(over="ignore"):
            for offset in range(-DIGEST_REACH, DIGEST_REACH + 1):
                token = (self.neighbour(offset) + 1).astype(np.uint64)
                total = mix(total * np.uint64(0x9E3779B97F4A7C15) + token + np.uint64(1))
        return total

    def attribute(self, name: str) -> Int32[np.ndarray, "row"]:
        """One of ATTRIBUTES for every row; −1 where it has none. Kept once made."""
        if name not in self._attributes:
            self._attributes[name] = self._make_attribute(name)
        return self._attributes[name]

    def n_values(self, name: str) -> int:
        """How many values an attribute can take."""
        match name:
            case "position":
                return len(self.position_edges)
            case "source":
                return len(self.sources)
            case "topic":
                return max(1, len(self.labels))
            case _:
                return len(self.vocabulary)

    def totals(self, name: str) -> Int64[np.ndarray, "part value"]:
        """Kept rows with each value of an attribute, in each of PARTS."""
        values, n = self.attribute(name), self.n_values(name)
        usable = self.kept & (values >= 0)
        parts = [
            np.bincount(values[usable & (self.part == part)], minlength=n)
            for part in range(len(PARTS))
        ]
        return np.stack(parts)

    def quoted(self, token: int) -> str:
        """A token in quotes; for part of a character also the character."""
        whole = self.characters.get(token)
        return self.vocabulary.quoted(token) + ("" if whole is None else f" of ‘{whole}’")

    @cached_property
    def characters(self) -> dict[int, str]:
        """For tokens that are only part of a character: the one they are most often part of in this
        text."""
        is_part = self.vocabulary.classes == CLASSES.index("parts of characters")
        found: dict[int, Counter[str]] = {}
        rows = np.flatnonzero(is_part[self.token])
        for row in rows[:: max(1, len(rows) // _ROWS_WITH_PARTS)].tolist():
            if character := self._character_at(row):
                found.setdefault(int(self.token[row]), Counter())[character] += 1
        return {token: counted.most_common(1)[0][0] for token, counted in sorted(found.items())}

    def _character_at(self, row: int) -> str | None:
        """What the shortest stretch of tokens around a row reads that is whole UTF-8, if four
        suffice."""
        for length in (2, 3, 4):
            for start in range(max(0, row - length + 1), min(row, len(self) - length) + 1):
                if self.run[start] == self.run[start + length - 1]:
                    try:
                        tokens = self.token[start : start + length]
                        return (
                            b"".join(self.vocabulary.tokens[t] for t in tokens)
                            .decode("utf-8")
                            .strip()
                            or None
                        )
                    except UnicodeDecodeError:
                        continue
        return None

    def pieces(self, row: int, *, before: int, after: int) -> tuple[str, str, str]:
        """The text before a row's token, of the token, and after it, inside its run; a character
        cut over tokens is read whole, with the token."""
        run = self.window(row, len(self))
        first, last = int(run[0]), int(run[-1]) + 1
        is_part = self.vocabulary.classes == CLASSES.index("parts of characters")
        start, stop = row, row + 1
        while is_part[self.token[row]] and start > first and is_part[self.token[start - 1]]:
            start -= 1
        while is_part[self.token[row]] and stop < last and is_part[self.token[stop]]:
            stop += 1
        low, high = max(first, start - before), min(last, stop + after)
        return self._text(low, start), self._text(start, stop), self._text(stop, high)

    def _text(self, start: int, stop: int) -> str:
        """What the tokens of some rows read that are text."""
        return self.vocabulary.join(
            [t for t in self.token[start:stop].tolist() if t not in self.vocabulary.special]
        )

    def chunks(self, size: int) -> Iterator[tuple[int, int]]:
        """Row ranges of about `size` that end where a document ends, or at least a run, so that no
        window is cut."""
        starts = self.run_start
        document = self.document[starts]
        whole = np.concatenate([starts[1:][np.diff(document) != 0], [len(self)]])
        ends = np.concatenate([starts[1:], [len(self)]])
        start = 0
        while start < len(self):
            stop = _last_between(whole, start, start + size) or _last_between(
                ends, start, start + size
            )
            if stop is None:
                stop = int(ends[np.searchsorted(ends, start, side="right")])
            yield start, stop
            start = stop

    def _make_attribute(self, name: str) -> Int32[np.ndarray, "row"]:
        match name:
            case "token":
                return self.token
            case "previous":
                return self.neighbour(-1)
            case "next":
                return self.neighbour(1)
            case "position":
                return self.position_bin
            case "source":
                return self.document_source[self.document]
            case "topic":
                return self.document_label[self.document]
            case _:
                raise ValueError(f"{name!r} is not one of {', '.join(ATTRIBUTES)}")


def corpus_of(
    table: TokenTable,
    vocabulary: Vocabulary,
    *,
    filters: RowFilters,
    holdout: float,
    choice: float,
    seed: int,
) -> Corpus:
    """The corpus of a store's token table; `holdout` and `choice` are shares of its documents.
    Raises UserError when nothing is left to describe."""
    kept = filters.keeps(table)
    if not len(table) or not kept.any():
        raise UserError(
            "the store has no rows that may be described",
            found=f"{len(table)} rows, {int(kept.sum())} after filters",
            fix="collect more tokens, or switch a filter off (atlas.filters)",
        )
    document = table.document.astype(np.int32)
    n_documents = max(len(table.documents), int(document.max()) + 1)
    rows = [*table.documents]
    source, sources = _index([r.source for r in rows], n_documents, _LARGEST_SOURCES)
    label, labels = _index([r.label for r in rows], n_documents, _LARGEST_LABELS)
    if not sources:  # every document has some source, if only a nameless one
        source, sources = np.zeros(n_documents, dtype=np.int32), ("text",)
    return Corpus(
        token=table.id.astype(np.int32),
        document=document,
        position=table.position.astype(np.int32),
        kept=kept,
        part=_dealt(n_documents, holdout, choice, seed)[document],
        titles=tuple(r.title for r in rows) + ("",) * (n_documents - len(rows)),
        document_source=np.maximum(source, 0),
        document_label=label,
        sources=sources,
        labels=labels,
        vocabulary=vocabulary,
        images=tuple(r.image for r in rows) if any(r.image for r in rows) else (),
    )


def mix(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """The finaliser of splitmix64: a fixed bijection of 64-bit integers whose output looks
    random."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _dealt(
    n_documents: int, holdout: float, choice: float, seed: int
) -> UInt8[np.ndarray, "document"]:
    """A fixed choice by hash; with few documents still at least one in each part if there are
    three, so that a score exists."""
    with np.errstate(over="ignore"):
        priority = mix(
            np.arange(n_documents, dtype=np.uint64) + mix(np.array([seed + 1], dtype=np.uint64))
        )
    n_held = int(
        np.clip(round(holdout * n_documents), min(1, n_documents - 1), max(n_documents - 1, 0))
    )
    n_rest = n_documents - n_held
    n_choosing = int(
        np.clip(round(choice * n_documents), min(1, max(n_rest - 1, 0)), max(n_rest - 1, 0))
    )
    part = np.full(n_documents, PROPOSING, dtype=np.uint8)
    order = np.argsort(priority, kind="stable")
    part[order[:n_held]], part[order[n_held : n_held + n_choosing]] = HELD_OUT, CHOOSING
    return part


def _index(
    values: list[str], n: int, largest: int
) -> tuple[Int32[np.ndarray, "document"], tuple[str, ...]]:
    """Index of every value among the `largest` most frequent non-empty ones; −1 for the rest."""
    names, counts = np.unique(np.array([v for v in values if v], dtype=object), return_counts=True)
    order = np.lexsort((names, -counts))[:largest]
    chosen = tuple(str(names[i]) for i in sorted(order))
    position = {name: i for i, name in enumerate(chosen)}
    index = np.full(n, -1, dtype=np.int32)
    index[: len(values)] = [position.get(v, -1) for v in values]
    return index, chosen


def _shifted(n: int, offset: int) -> tuple[slice, slice]:
    here = slice(max(0, -offset), n - max(0, offset))
    return here, slice(here.start + offset, here.stop + offset)


def _last_between(ends: Int64[np.ndarray, "end"], low: int, high: int) -> int | None:
    index = int(np.searchsorted(ends, high, side="right")) - 1
    return int(ends[index]) if index >= 0 and ends[index] > low else None
