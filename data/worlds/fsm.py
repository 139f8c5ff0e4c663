"""`fsm`: a walk over states, each with a few successors, written in two words a state.

The language of Codebook Features (arXiv 2310.17230): 100 states with 10 successors each, drawn
once; a text is a random walk. No word names a state: it is spelt by two digits, or, with
`surface = "random"`, by two of 26 letters that say nothing by themselves. The model must join two
words to know the state, and know the state to go on.

True at the second word of a state: `state`, and `before`, the state before it. True at the first
word of the next one: `current`, the state that is being left (it can be read there after the first
block, as the words before it are). `word` is true everywhere. The successor set of a state is the
state itself by another name.

Cost: 0.16 M weights; training them takes about six minutes of one core (`featureflow world train`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from annotated_types import Ge
from jaxtyping import Int64
from pydantic import model_validator
from typing_extensions import Doc

from data.worlds.base import NEVER, Variable, World

_LETTERS = (
    *("alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india"),
    *("juliett", "kilo", "lima", "mike", "november", "oscar", "papa", "quebec", "romeo"),
    *("sierra", "tango", "uniform", "victor", "whiskey", "xray", "yankee", "zulu"),
)
_DIGITS = (*("nulla", "mono", "duo", "tria", "tetra"), *("penta", "hexa", "hepta", "octa", "nona"))
"""0 to 9, in words that labels can hold."""


class Fsm(World):
    """A random walk over states that no single word names."""

    kind: Literal["fsm"] = "fsm"
    n_states: Annotated[int, Ge(4), Doc("states; at most 100 in digits")] = 100
    n_successors: Annotated[int, Ge(2), Doc("states that may follow a state")] = 10
    surface: Annotated[
        Literal["digits", "random"],
        Doc("two digits, or two letters drawn for each state that say nothing by themselves"),
    ] = "digits"
    n_steps: Annotated[int, Ge(4), Doc("states of a text")] = 24
    seed: Annotated[int, Ge(0), Doc("of the successors")] = 0

    TRAINED: ClassVar[bool] = True
    STEERED: ClassVar[tuple[str, ...]] = ("state",)

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.n_successors >= self.n_states:
            raise ValueError(
                f"n_successors {self.n_successors} is not below n_states {self.n_states}: any "
                "state could follow any other"
            )
        most = len(self.words) ** 2
        if self.n_states > most:
            raise ValueError(
                f"n_states {self.n_states} cannot be spelt by two {self.surface} words: at most "
                f"{most}"
            )
        return self

    @property
    def n_context(self) -> int:
        return 2 * self.n_steps + 1

    @property
    def words(self) -> tuple[str, ...]:
        return _DIGITS if self.surface == "digits" else _LETTERS

    def documents(self, n: int, seed: int) -> Iterator[str]:
        spelling, successors = _tables(self)
        rng = np.random.default_rng([seed, 1])
        for _ in range(n):
            state = int(rng.integers(self.n_states))
            path = [state]
            for pick in rng.integers(self.n_successors, size=self.n_steps - 1):
                state = int(successors[state, pick])
                path.append(state)
            yield " ".join(self.words[word] for word in spelling[path].ravel())

    def truth(
        self, ids: Int64[np.ndarray, "context position"], *, start: int = 0
    ) -> tuple[Variable, ...]:
        word = ids - 1
        word = np.where((word >= 0) & (word < len(self.words)), word, NEVER)
        state = np.full_like(ids, NEVER)
        n_pairs = (ids.shape[1] - 1) // 2
        first, second = word[:, 1 : 2 * n_pairs : 2], word[:, 2 : 2 * n_pairs + 1 : 2]
        state[:, 2 : 2 * n_pairs + 1 : 2] = np.where(
            (first >= 0) & (second >= 0), _state_of(self)[first, second], NEVER
        )
        before, current = np.full_like(state, NEVER), np.full_like(state, NEVER)
        before[:, 4::2] = state[:, 2:-2:2][:, : before[:, 4::2].shape[1]]
        current[:, 3::2] = state[:, 2:-1:2][:, : current[:, 3::2].shape[1]]
        names = tuple(
            "-".join(self.words[word] for word in spelling) for spelling in _tables(self)[0]
        )
        return (
            Variable(name="word", value=word, names=self.words, born=0),
            Variable(name="state", value=state, names=names, born=0, parents=("word",)),
            Variable(name="current", value=current, names=names, born=0, parents=("state", "word")),
            Variable(name="before", value=before, names=names, born=0, parents=("state", "word")),
        )

    def continuations(
        self, variable: str, value: int, ids: Int64[np.ndarray, "position"]
    ) -> tuple[tuple[str, ...], ...]:
        if variable != "state":
            return ()
        spelling, successors = _tables(self)
        return tuple(
            tuple(self.words[word] for word in spelling[state]) for state in successors[value]
        )

    def spelling(self, variable: Variable, value: int) -> tuple[str, ...]:
        return tuple(variable.names[value].split("-"))

    def shape(self) -> dict[str, Any]:
        n_context = max(64, self.n_context)
        return {"n_layers": 3, "d_model": 64, "n_heads": 4, "d_mlp": 256, "n_context": n_context}


@lru_cache(maxsize=8)
def _tables(
    world: Fsm,
) -> tuple[Int64[np.ndarray, "state 2"], Int64[np.ndarray, "state successor"]]:
    """The two words of every state, and its successors."""
    rng = np.random.default_rng([world.seed, 0])
    n, n_words = world.n_states, len(world.words)
    pairs = np.arange(n) if world.surface == "digits" else rng.permutation(n_words**2)[:n]
    spelling = np.stack([pairs // n_words, pairs % n_words], axis=1)
    successors = np.stack([rng.choice(n, world.n_successors, replace=False) for _ in range(n)])
    return spelling, successors


@lru_cache(maxsize=8)
def _state_of(world: Fsm) -> Int64[np.ndarray, "first second"]:
    """The state that two words spell; NEVER for none."""
    table = np.full((len(world.words), len(world.words)), NEVER)
    for state, (first, second) in enumerate(_tables(world)[0]):
        table[first, second] = state
    return table
