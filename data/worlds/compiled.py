"""`compiled`: a transformer whose weights are written by hand, so every variable is a direction
that appears at a known layer.

The text is letters, dots and brackets. Each variable is one-hot in directions of its own; all of
them are orthonormal and orthogonal to (1, …, 1), so the norms (their epsilon is huge) hand the
stream on as it is.

    block  attention                                MLP
    0      `previous`: the token before             –
           mean of +1 for ( and −1 for )
    1      `induction`: what followed the last      `depth` of brackets from the mean and the
    position;
           token like this one                      `first` = (token + previous) mod 4, for letters
    2      –                                        –
    3      –                                        erases `previous`, and in its directions writes
                                                    `second` = (first + depth) mod 4
    4      `moved`: `second` of the token before    erases `first`
    5      –                                        –

The next token is `induction` where there is one, else any letter; `)` is never said at depth 0, `(`
never at the greatest depth. Cost: 2.6 M weights, written in a second
(data/worlds/compiling.py). The idea of compiled transformers is Tracr's (arXiv 2301.05062).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Int64
from typing_extensions import Doc

from data.worlds.base import NEVER, Variable, World

LETTERS = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen")
"""The letters of this language; words of three letters, so that labels can be read."""
OPEN, CLOSE, DOT = "(", ")", "."
N_SUMS, HEAD, N_HEADS = 4, 48, 5
EPSILON = 1e6
"""Of the norms: so large that a norm is a division by 1000, which its gain undoes."""


class Compiled(World):
    """Copy, induction, counting brackets, a lookup in two steps, a variable that is overwritten and
    one that is moved."""

    kind: Literal["compiled"] = "compiled"
    length: Annotated[int, Ge(8), Le(HEAD), Doc("tokens of a context, the first one included")] = 32
    max_depth: Annotated[int, Ge(1), Le(6), Doc("greatest depth of brackets")] = 4
    seed: Annotated[int, Ge(0), Doc("of the directions")] = 0

    STEERED: ClassVar[tuple[str, ...]] = ("induction",)

    @property
    def n_context(self) -> int:
        return self.length

    @property
    def words(self) -> tuple[str, ...]:
        return (DOT, *LETTERS, OPEN, CLOSE)

    def documents(self, n: int, seed: int) -> Iterator[str]:
        rng = np.random.default_rng([seed, 1])
        for _ in range(n):
            yield " ".join(self._document(rng))

    def _document(self, rng: np.random.Generator) -> list[str]:
        """Half of the time what followed the last token like this one, else something new."""
        written: list[str] = []
        depth = 0
        for _ in range(self.length - 1):
            word = _induced(written) if rng.random() < 0.5 else ""
            if (
                not word
                or (word == OPEN and depth == self.max_depth)
                or (word == CLOSE and not depth)
            ):
                kinds = [*LETTERS, DOT]
                weights = [2.0] * len(LETTERS) + [1.0]
                if depth < self.max_depth:
                    kinds, weights = [*kinds, OPEN], [*weights, 4.0]
                if depth > 0:
                    kinds, weights = [*kinds, CLOSE], [*weights, 3.0]
                word = str(rng.choice(kinds, p=np.array(weights) / sum(weights)))
            depth += (word == OPEN) - (word == CLOSE)
            written.append(word)
        return written

    def truth(
        self, ids: Int64[np.ndarray, "context position"], *, start: int = 0
    ) -> tuple[Variable, ...]:
        token = ids - 1
        known = (token >= 0) & (token < len(self.words))
        token = np.where(known, token, NEVER)
        previous = _moved_on(token)
        step = (token == self.words.index(OPEN)).astype(int) - (token == self.words.index(CLOSE))
        depth = np.clip(step.cumsum(1), 0, self.max_depth)
        depth[:, 0] = NEVER
        letter, before = _letter(token), _letter(previous)
        first = np.where((letter >= 0) & (before >= 0), (letter + before) % N_SUMS, NEVER)
        second = np.where(first >= 0, (first + depth) % N_SUMS, NEVER)
        position = np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy()
        sums = tuple(str(i) for i in range(N_SUMS))
        return (
            Variable(name="token", value=token, names=self.words, born=0),
            Variable(
                name="position",
                value=position,
                names=tuple(str(i) for i in range(ids.shape[1])),
                born=0,
            ),
            Variable(name="previous", value=previous, names=self.words, born=0, dies=2),
            Variable(
                name="depth",
                value=depth,
                names=tuple(str(i) for i in range(self.max_depth + 1)),
                born=1,
                parents=("position",),
            ),
            Variable(
                name="induction",
                value=_followers(token),
                names=self.words,
                born=1,
                parents=("token", "previous", "position"),
            ),
            Variable(
                name="first", value=first, names=sums, born=1, dies=3, parents=("token", "previous")
            ),
            Variable(name="second", value=second, names=sums, born=3, parents=("first", "depth")),
            Variable(
                name="moved",
                value=_moved_on(second),
                names=sums,
                born=4,
                parents=("second", "position"),
            ),
        )

    def continuations(
        self, variable: str, value: int, ids: Int64[np.ndarray, "position"]
    ) -> tuple[tuple[str, ...], ...]:
        """What followed before; nothing where the depth forbids that bracket."""
        if variable != "induction":
            return ()
        opening, closing = self.words.index(OPEN), self.words.index(CLOSE)
        depth = int((ids == opening + 1).sum() - (ids == closing + 1).sum())
        forbidden = {closing} if depth == 0 else {opening} if depth == self.max_depth else set()
        return () if value in forbidden else ((self.words[value],),)

    def shape(self) -> dict[str, Any]:
        return {
            "n_layers": 6,
            "d_model": HEAD * N_HEADS,
            "n_heads": N_HEADS,
            "d_mlp": self.length * (self.max_depth + 3) + 128,
            "n_context": self.length,
            "activation_function": "relu",
            "layer_norm_epsilon": EPSILON,
        }


def _induced(written: Sequence[str]) -> str:
    """What followed the last earlier token like the last one; empty where there is none."""
    for i in range(len(written) - 2, -1, -1):
        if written[i] == written[-1]:
            return written[i + 1]
    return ""


def _moved_on(
    value: Int64[np.ndarray, "context position"],
) -> Int64[np.ndarray, "context position"]:
    """Every value at the token after its own."""
    moved = np.full_like(value, NEVER)
    moved[:, 1:] = value[:, :-1]
    return moved


def _letter(token: Int64[np.ndarray, "*place"]) -> Int64[np.ndarray, "*place"]:
    """Which letter a token is; negative for other tokens."""
    return np.where((token >= 1) & (token <= len(LETTERS)), token - 1, NEVER)


def _followers(
    token: Int64[np.ndarray, "context position"],
) -> Int64[np.ndarray, "context position"]:
    found = np.full_like(token, NEVER)
    for place in range(1, token.shape[1]):
        for before in range(1, place):
            same = (token[:, before] == token[:, place]) & (token[:, place] >= 0)
            found[same, place] = token[same, before + 1]
    return found
