"""Documents packed into contexts of one length.

1. Documents are taken in the order given (shuffled by `seed` first, if one is given), each text
   once, tokenised and, if asked, cut to `max_document_tokens`, until there are enough tokens.
2. Every context starts with the tokenizer's `bos_id` at position 0; the rest is filled with
   documents one after the other with `bos_id` between them (none where a document begins its
   context anyway).
3. The last contexts are for validation; no document is in both parts: what is left of the document
   that ends the training part is dropped.

Every row knows its document: the BOS and the separator belong to the document that follows them.
Memory: 13 bytes a token of the result and the text of one batch of documents.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64, UInt8, UInt32

from data.text.corpus import CorpusSpec, describe_corpus, iter_documents
from data.text.documents import Document, PassedOver
from data.text.tokenizer import Tokenizer
from data.tokens import FLAG_BOS, FLAG_SPECIAL, DocumentRow, TokenTable
from featureflow.errors import UserError
from featureflow.progress import Progress, silent

_BATCH_CHARACTERS = 400_000


@dataclass(frozen=True, kw_only=True)
class DocumentRecord:
    """One document that has rows. `n_tokens` counts those of its text that were used, `sha256` is
    of its text."""

    source: str
    title: str
    label: str
    sha256: str
    n_tokens: int


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """One entry a row, `n_rows` a multiple of `n_context`; rows from `validation_start` on are for
    validation."""

    n_context: int
    validation_start: int
    id: UInt32[np.ndarray, "row"]
    document: UInt32[np.ndarray, "row"]
    position: UInt32[np.ndarray, "row"]
    flags: UInt8[np.ndarray, "row"]
    documents: tuple[DocumentRecord, ...]

    @property
    def n_rows(self) -> int:
        return len(self.id)

    @property
    def n_contexts(self) -> int:
        return self.n_rows // self.n_context

    def contexts(
        self, start: int = 0, stop: int | None = None
    ) -> Int64[np.ndarray, "context position"]:
        """The ids of contexts `start` to `stop`, ready for a model."""
        return self.id.reshape(-1, self.n_context)[start:stop].astype(np.int64)

    def table(self) -> TokenTable:
        """The same as the token table of an activation store."""
        rows = tuple(
            DocumentRow(source=d.source, title=d.title, label=d.label) for d in self.documents
        )
        return TokenTable(
            id=self.id,
            document=self.document,
            position=self.position,
            flags=self.flags,
            documents=rows,
        )


def pack_corpus(
    spec: CorpusSpec,
    tokenizer: Tokenizer,
    *,
    n_context: int,
    n_tokens: int,
    seed: int,
    validation_fraction: float = 0.0,
    max_document_tokens: int | None = None,
    keep_special: bool = False,
    passed_over: PassedOver | None = None,
    progress: Progress = silent,
) -> PackedTokens:
    """`pack_documents` of a corpus in the order of `seed`; records without text are counted in
    `passed_over`."""
    return pack_documents(
        iter_documents(spec, seed, passed_over),
        tokenizer,
        n_context=n_context,
        n_tokens=n_tokens,
        seed=None,
        validation_fraction=validation_fraction,
        max_document_tokens=max_document_tokens,
        keep_special=keep_special,
        where=describe_corpus(spec),
        progress=progress,
    )


def pack_documents(
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    *,
    n_context: int,
    n_tokens: int,
    seed: int | None,
    validation_fraction: float = 0.0,
    max_document_tokens: int | None = None,
    keep_special: bool = False,
    where: str = "corpus",
    progress: Progress = silent,
) -> PackedTokens:
    """At most `n_tokens` rows, rounded down to whole contexts; fewer when the text runs out.

    `seed` shuffles the documents first, all of them held in memory; None takes them as they come.
    A conversation goes through the tokenizer's chat template. Special tokens written out in other
    texts are plain text unless `keep_special`.
    Raises UserError when there is less than one context of text, or too few documents to set some
    apart."""
    if n_context < 2:
        raise UserError("a context holds at least two tokens", found=f"n_context = {n_context}")
    if seed is not None:
        documents = list(documents)
        random.Random(seed).shuffle(documents)
    wanted = n_tokens // n_context
    encoded = _take_enough(
        _iter_encoded(documents, tokenizer, max_document_tokens, keep_special),
        wanted * (n_context - 1),
        progress,
    )
    n_contexts = min(wanted, sum(map(len, encoded)) // (n_context - 1))
    n_validation = round(validation_fraction * n_contexts)
    if validation_fraction > 0:
        n_validation = max(1, n_validation)
    layout = _Layout(n_context=n_context, bos_id=tokenizer.bos_id)
    layout.fill(encoded, n_contexts - n_validation)
    validation_start = layout.n_rows
    layout.fill(encoded, n_validation)
    _check_enough(
        layout,
        validation_start,
        n_context=n_context,
        n_tokens=n_tokens,
        where=where,
        fraction=validation_fraction,
    )
    return layout.packed(validation_start, tokenizer.special_ids)


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    document: Document
    sha256: str
    ids: UInt32[np.ndarray, "token"]

    def __len__(self) -> int:
        return len(self.ids)


def _iter_encoded(
    documents: Iterable[Document], tokenizer: Tokenizer, max_tokens: int | None, keep_special: bool
) -> Iterator[_Encoded]:
    for batch in _iter_batches(_iter_unique(documents)):
        texts = [document.text for document, _ in batch if not document.messages]
        plain = iter(tokenizer.encode_many(texts, keep_special=keep_special))
        for document, sha256 in batch:
            ids = _chat_ids(document, tokenizer) if document.messages else next(plain)
            if ids:
                yield _Encoded(
                    document=document,
                    sha256=sha256,
                    ids=np.array(ids[:max_tokens], dtype=np.uint32),
                )


def _chat_ids(document: Document, tokenizer: Tokenizer) -> list[int]:
    """Through the template, without the BOS that it may write: packing starts documents itself."""
    ids = tokenizer.chat(document.messages, name="the model of this collection", reply=False)
    return ids[1:] if ids[:1] == [tokenizer.bos_id] else ids


def _iter_unique(documents: Iterable[Document]) -> Iterator[tuple[Document, str]]:
    seen: set[bytes] = set()
    for document in documents:
        try:
            digest = hashlib.sha256((document.text + _beside_text(document)).encode())
        except UnicodeEncodeError as error:
            raise UserError(
                "the text holds half of a surrogate pair",
                where=f"{document.source}: {document.title}",
                found=f"\\u{ord(document.text[error.start]):04x} at character {error.start}",
                fix="correct the text, or replace such characters before it is given",
            ) from error
        if digest.digest() not in seen:
            seen.add(digest.digest())
            yield document, digest.hexdigest()


def _beside_text(document: Document) -> str:
    """What tells two conversations of the same contents apart."""
    roles = "".join(f"\n{each['role']}" for each in document.messages)
    others = [
        {k: v for k, v in m.items() if k not in ("role", "content")} for m in document.messages
    ]
    return roles + (json.dumps(others, sort_keys=True, default=str) if any(others) else "")


def _iter_batches(
    documents: Iterator[tuple[Document, str]],
) -> Iterator[list[tuple[Document, str]]]:
    """Small batches first, so that a small request does not tokenise a lot."""
    batch: list[tuple[Document, str]] = []
    n_characters, limit = 0, _BATCH_CHARACTERS // 16
    for document, sha256 in documents:
        batch.append((document, sha256))
        n_characters += len(document.text)
        if n_characters >= limit:
            yield batch
            batch, n_characters, limit = [], 0, min(2 * limit, _BATCH_CHARACTERS)
    if batch:
        yield batch


def _take_enough(encoded: Iterator[_Encoded], n_wanted: int, progress: Progress) -> list[_Encoded]:
    """Until there are `n_wanted` tokens and some to spare for what the border between the parts
    drops."""
    taken: list[_Encoded] = []
    n_taken, longest = 0, 0
    for each in encoded:
        taken.append(each)
        n_taken += len(each)
        longest = max(longest, len(each))
        progress("tokenise", min(n_taken, n_wanted), n_wanted)
        if n_taken >= n_wanted + longest:
            break
    taken.reverse()  # the layout takes from the end
    return taken


class _Layout:
    """Rows being laid out, context by context."""

    def __init__(self, *, n_context: int, bos_id: int) -> None:
        self._n_context = n_context
        self._bos_id = bos_id
        self._ids: list[np.ndarray] = []
        self._document_of: list[np.ndarray] = []
        self._documents: list[_Encoded] = []
        self._used: list[int] = []
        self.n_rows = 0

    def contents(self) -> str:
        """How many documents there are, and how long the longest is."""
        sizes = [len(encoded) for encoded in self._documents]
        return (
            f"{len(sizes)} documents of {sum(sizes):,} tokens, the longest of "
            f"{max(sizes, default=0):,}"
        )

    def fill(self, waiting: list[_Encoded], n_contexts: int) -> None:
        """Take documents from the end of `waiting` until `n_contexts` are full; an unfinished
        context is taken back when they run out. A document that is cut by the last context loses
        its rest."""
        stop = self.n_rows + n_contexts * self._n_context
        while self.n_rows < stop and waiting:
            self._add(waiting.pop(), stop)
        self._drop_unfinished()

    def _add(self, encoded: _Encoded, stop: int) -> None:
        if self.n_rows % self._n_context != 0:
            self._append(np.array([self._bos_id], dtype=np.uint32), len(self._documents))
        taken = 0
        number = len(self._documents)
        while taken < len(encoded) and self.n_rows < stop:
            if self.n_rows % self._n_context == 0:
                self._append(np.array([self._bos_id], dtype=np.uint32), number)
            room = self._n_context - self.n_rows % self._n_context
            part = encoded.ids[taken : taken + room]
            self._append(part, number)
            taken += len(part)
        self._documents.append(encoded)
        self._used.append(taken)

    def _append(self, ids: np.ndarray, number: int) -> None:
        self._ids.append(ids)
        self._document_of.append(np.full(len(ids), number, dtype=np.uint32))
        self.n_rows += len(ids)

    def _drop_unfinished(self) -> None:
        excess = self.n_rows % self._n_context
        while excess:
            last = self._ids[-1]
            cut = min(excess, len(last))
            self._ids[-1] = last[: len(last) - cut]
            self._document_of[-1] = self._document_of[-1][: len(last) - cut]
            if cut == len(last):
                self._ids.pop()
                self._document_of.pop()
            excess -= cut
            self.n_rows -= cut

    def packed(self, validation_start: int, special_ids: Iterable[int]) -> PackedTokens:
        ids = np.concatenate(self._ids)
        document = np.concatenate(self._document_of)
        position = np.tile(
            np.arange(self._n_context, dtype=np.uint32), self.n_rows // self._n_context
        )
        is_special = np.isin(ids, np.array(sorted({*special_ids, self._bos_id}), dtype=np.uint32))
        flags = np.where(is_special, FLAG_SPECIAL, 0) | np.where(position == 0, FLAG_BOS, 0)
        document, records = self._numbered(ids, document, is_special)
        return PackedTokens(
            n_context=self._n_context,
            validation_start=validation_start,
            id=ids,
            document=document,
            position=position,
            flags=flags.astype(np.uint8),
            documents=records,
        )

    def _numbered(
        self, ids: np.ndarray, document: np.ndarray, is_special: np.ndarray
    ) -> tuple[UInt32[np.ndarray, "row"], tuple[DocumentRecord, ...]]:
        """Documents that kept rows, numbered without gaps."""
        present, renumbered = np.unique(document, return_inverse=True)
        used = np.bincount(renumbered[~is_special], minlength=len(present))
        records = tuple(
            DocumentRecord(
                source=encoded.document.source,
                title=encoded.document.title,
                label=encoded.document.label,
                sha256=encoded.sha256,
                n_tokens=int(used[i]),
            )
            for i, number in enumerate(present)
            for encoded in [self._documents[number]]
        )
        return renumbered.astype(np.uint32), records


def _check_enough(
    layout: _Layout,
    validation_start: int,
    *,
    n_context: int,
    n_tokens: int,
    where: str,
    fraction: float,
) -> None:
    if n_tokens < n_context:
        raise UserError(
            "fewer tokens are asked for than one context holds",
            found=f"{n_tokens}",
            expected=f"at least {n_context}",
        )
    if validation_start == 0:
        raise UserError(
            "there is too little text for one context",
            where=where,
            expected=f"at least {n_context} tokens",
            fix="add text, or choose a shorter n_context",
        )
    if fraction > 0 and layout.n_rows == validation_start:
        raise UserError(
            "no document is left for validation",
            where=where,
            expected=f"documents with at least {n_context} tokens beside those for training; no "
            "document is in both",
            found=layout.contents(),
            fix="add documents, cut long ones (max_document_tokens), or ask for fewer tokens "
            "(n_tokens)",
        )
