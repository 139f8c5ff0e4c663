"""The tokens of a store: which token a row is, of which document, where in its context, and what is
special about it.

`RowFilters` says which rows are worth training on. A row with flags = 0 is an ordinary one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt
from jaxtyping import UInt8, UInt32
from typing_extensions import Doc

from featureflow.errors import UserError
from featureflow.settings import Settings

FLAG_BOS = 1
FLAG_SPECIAL = 2
FLAG_SINK = 4
FLAG_PADDING = 8
FLAG_NON_FINITE = 16
MOST_IMAGE_CHARACTERS = 16_384
_INLINE_IMAGE = re.compile(
    rf"(?=.{{1,{MOST_IMAGE_CHARACTERS}}}\Z)data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/]+=*"
)


@dataclass(frozen=True, kw_only=True)
class DocumentRow:
    """One document of the corpus: where it comes from, what it is called, its label (empty when it
    has none). What UTF-8 cannot hold (halves of surrogate pairs, bytes of odd file names) becomes a
    question mark. A document that is an image has a small `image` as inline data."""

    source: str = ""
    title: str = ""
    label: str = ""
    image: str = ""

    def __post_init__(self) -> None:
        if self.image and not _INLINE_IMAGE.fullmatch(self.image):
            raise UserError(
                "not a small picture as inline data",
                where=f"image of {self.title or 'a document'}",
                expected=f"data:image/png;base64,…, at most {MOST_IMAGE_CHARACTERS:,} characters",
                found=f"{self.image[:40]}… ({len(self.image):,} characters)",
            )
        for name in ("source", "title", "label"):
            text = getattr(self, name).encode("utf-8", "replace").decode()
            object.__setattr__(self, name, text)


@dataclass(frozen=True, kw_only=True)
class TokenTable:
    """One entry a row. `document` indexes `documents`; `position` counts from 0 in the context."""

    id: UInt32[np.ndarray, "row"]
    document: UInt32[np.ndarray, "row"]
    position: UInt32[np.ndarray, "row"]
    flags: UInt8[np.ndarray, "row"]
    documents: Sequence[DocumentRow] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        lengths = {
            name: len(getattr(self, name)) for name in ("id", "document", "position", "flags")
        }
        if len(set(lengths.values())) != 1:
            raise UserError("the columns of the token table differ in length", found=str(lengths))

    def __len__(self) -> int:
        return len(self.id)

    def part(self, start: int, stop: int) -> TokenTable:
        """The rows from `start` to `stop`, with the same documents."""
        rows = slice(start, stop)
        return TokenTable(
            id=self.id[rows],
            document=self.document[rows],
            position=self.position[rows],
            flags=self.flags[rows],
            documents=self.documents,
        )


class RowFilters(Settings):
    """Which rows to leave out. The defaults leave what the statistics of the store are over."""

    drop_bos: Annotated[
        bool, Doc("leave out the first token of every context, whose norm is far from all others")
    ] = True
    drop_special: Annotated[
        bool, Doc("leave out special tokens, such as the separator of documents")
    ] = True
    drop_sinks: Annotated[
        bool, Doc("leave out tokens whose norm is far above the median (massive activations)")
    ] = True
    min_position: Annotated[
        int, Ge(0), Doc("first position of a context that is used, in tokens")
    ] = 0
    max_position: Annotated[
        int | None, Doc("last position of a context that is used, in tokens; none for all")
    ] = None
    max_norm_ratio: Annotated[
        float | None,
        Gt(0),
        Doc(
            "leave out rows whose norm exceeds this many medians at any site read; none for no "
            "limit"
        ),
    ] = None

    @property
    def flags(self) -> int:
        """The flags that exclude a row. Padding and non-finite rows are never used."""
        chosen = [
            (self.drop_bos, FLAG_BOS),
            (self.drop_special, FLAG_SPECIAL),
            (self.drop_sinks, FLAG_SINK),
        ]
        return FLAG_PADDING | FLAG_NON_FINITE | sum(flag for wanted, flag in chosen if wanted)

    def keeps(self, tokens: TokenTable) -> np.ndarray:
        """A boolean a row: whether flags and position allow it (norms are not looked at here)."""
        kept = (tokens.flags & np.uint8(self.flags)) == 0
        if self.min_position:
            kept &= tokens.position >= self.min_position
        if self.max_position is not None:
            kept &= tokens.position <= self.max_position
        return kept
