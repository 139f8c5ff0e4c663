"""Worlds: small languages in which the truth about every token is known.

A world is a frozen model of a few sizes and a seed. From these alone it gives

    words                the vocabulary; a token is a word, word i has the id i + 1 (0 starts a
    context)
    documents(n, seed)   texts, each as long as a context without its first token
    truth(ids)           what is true at every token: variables with their values, the layer at
    which
                         each can first be known and the last at which it is there
    continuations(…)     what may follow a value of a variable
    shape()              the sizes of its model, a GPT-2 whose weights are written by hand or
    trained
                         (data/worlds/weights.py)

Everything is computed from the ids, so a stored token is enough to ask what is true there. Layers
are those of `resid_post`: a variable with `born = 0` can be read after the first block.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64

from featureflow.errors import UserError
from featureflow.settings import Settings

NEVER = -1
"""The value of a variable at a token where it has none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Variable:
    """One thing that is true of tokens. `value` is a number below `len(names)`, or NEVER.

    `born` and `dies` are the first and last layer that hold it (`dies` None: to the end). `parents`
    are the variables that it is computed from, at the same token or an earlier one. `heirs` are
    variables that take it over under another name (a split, a merge)."""

    name: str
    value: Int64[np.ndarray, "context position"]
    names: tuple[str, ...]
    born: int
    dies: int | None = None
    parents: tuple[str, ...] = ()
    heirs: tuple[str, ...] = field(default=())

    def known_at(self, layer: int) -> bool:
        return self.born <= layer and (self.dies is None or layer <= self.dies)


class World(Settings, ABC):
    """See the module's text. `VERSION` is raised when a generator changes what it gives."""

    VERSION: ClassVar[int] = 1
    TRAINED: ClassVar[bool] = False
    """Whether the weights come from training; else they are written by hand."""
    STEERED: ClassVar[tuple[str, ...]] = ()
    """Variables whose value decides what may follow."""

    kind: str

    @property
    @abstractmethod
    def n_context(self) -> int:
        """Tokens of a context, the first one included."""

    @property
    @abstractmethod
    def words(self) -> tuple[str, ...]:
        """The vocabulary without the token that starts a context."""

    @abstractmethod
    def documents(self, n: int, seed: int) -> Iterator[str]:
        """`n` texts of `n_context - 1` words each."""

    @abstractmethod
    def truth(
        self, ids: Int64[np.ndarray, "context position"], *, start: int = 0
    ) -> tuple[Variable, ...]:
        """What is true at every token of these contexts; `start` is the number of the first one in
        the store."""

    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """The sizes of the model."""

    def continuations(
        self, variable: str, value: int, ids: Int64[np.ndarray, "position"]
    ) -> tuple[tuple[str, ...], ...]:
        """Every way to go on, in words, where `variable` has `value` at the last of `ids`."""
        return ()

    def spelling(self, variable: Variable, value: int) -> tuple[str, ...]:
        """The words that a label must hold to name this value."""
        return (variable.names[value],)

    @property
    def identity(self) -> str:
        """A digest of what the world gives: its settings and the version of its generator."""
        text = json.dumps([self.VERSION, self.model_dump(mode="json")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def text_of(self, ids: Sequence[int]) -> list[str]:
        """The words of ids; the start of a context and the unknown word are empty."""
        words = self.words
        return [words[i - 1] if 0 < i <= len(words) else "" for i in ids]


def check_names(wanted: Sequence[str], truth: Sequence[Variable]) -> None:
    """Raises UserError for names that the world has no variable of."""
    known = [variable.name for variable in truth]
    if unknown := [name for name in wanted if name not in known]:
        raise UserError(
            "the world has no such variable", found=", ".join(unknown), expected=", ".join(known)
        )
