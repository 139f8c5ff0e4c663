"""`superposed`: activations that are sums of known directions, more of them than dimensions, with
planted fates from layer to layer. There is no language model.

1. Features are active by chance: rates fall as a power of the rank; a child is active only with
   its parent; topics make the features of one group more likely on the tokens of a document.
   Strengths are log-normal.
2. Every layer has a unit direction for each feature that it holds. From layer to layer a feature

       stays      keeps its direction                      turns   is rotated by `turn` degrees
       is born    at a later layer, in a new direction     dies    after an earlier layer
       splits     into two features that share its tokens  merges  with another into one direction

3. An activation is the sum of strength × direction, and noise.

The store is filled by the usual writer. The words are the features: the token at a row is the
strongest one there. So that every stage can run, the model of the run is a stand-in that knows
these words and does nothing else; nothing is said of causes here. After SynthSAEBench (arXiv
2602.14687).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

import numpy as np
from annotated_types import Ge, Gt, Le
from jaxtyping import Bool, Float, Int64
from pydantic import model_validator
from typing_extensions import Doc

from data.worlds.base import NEVER, Variable, World

FATES = (*["stays"] * 4, *["turns"] * 3, "born", "dies", "splits", "merges", "merges")
N_TOPICS = 8


class Superposed(World):
    """Sums of known directions, with carries, rotations, splits, merges, births and deaths."""

    kind: Literal["superposed"] = "superposed"
    n_features: Annotated[int, Ge(12), Doc("features of the first layer and those born later")] = 96
    d_model: Annotated[int, Ge(8), Doc("dimensions")] = 64
    n_layers: Annotated[int, Ge(3), Doc("layers")] = 5
    l0: Annotated[float, Gt(0), Doc("features that are active on a token, on average")] = 6.0
    turn: Annotated[float, Ge(0), Le(90), Doc("degrees between layers where a feature turns")] = (
        25.0
    )
    noise: Annotated[float, Ge(0), Doc("standard deviation of the noise in each dimension")] = 0.02
    length: Annotated[int, Ge(2), Doc("tokens of a document, the first one included")] = 32
    seed: Annotated[int, Ge(0), Doc("of directions, rates and activity")] = 0

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if self.l0 > self.n_features / 4:
            raise ValueError(
                f"l0 {self.l0:g} is more than a quarter of n_features {self.n_features}"
            )
        if self.n_features > 4 * self.d_model:
            raise ValueError(
                f"n_features {self.n_features} is more than 4 x d_model = {4 * self.d_model}: no "
                "dictionary could find them"
            )
        return self

    @property
    def n_context(self) -> int:
        return self.length

    @property
    def words(self) -> tuple[str, ...]:
        return tuple(_word(i) for i in range(self.n_features))

    def documents(self, n: int, seed: int) -> Iterator[str]:
        """The words of the strongest features; the activations are drawn with them."""
        ids = self.ids(n)
        for row in ids:
            yield " ".join(self.text_of(row[1:].tolist()))

    def spelling(self, variable: Variable, value: int) -> tuple[str, ...]:
        return tuple(re.findall("[a-z]+", variable.name))

    def shape(self) -> dict[str, Any]:
        """Of the stand-in."""
        sizes = {"n_layers": self.n_layers, "d_model": self.d_model, "n_heads": 1, "d_mlp": 8}
        return sizes | {"n_context": max(64, self.length)}

    def ids(self, n_contexts: int) -> Int64[np.ndarray, "context position"]:
        """The word of the strongest feature of the first layer at every token; 0 at the first."""
        strength, _ = self._activity(n_contexts)
        strength = np.where(_plan(self).born == 0, strength, 0.0)
        ids = strength.argmax(1).reshape(n_contexts, self.length) + 1
        ids[:, 0] = 0
        return ids

    def activations(self, n_contexts: int) -> tuple[Float[np.ndarray, "row d_model"], ...]:
        """One array a layer."""
        strength, half = self._activity(n_contexts)
        rng = np.random.default_rng([self.seed, 3])
        plan = _plan(self)
        layers = []
        for layer in range(self.n_layers):
            total = rng.normal(0.0, self.noise, (len(strength), self.d_model)).astype(np.float32)
            for unit in plan.units:
                if unit.born <= layer <= unit.dies:
                    there = _strength_of(unit, strength, half)
                    on = np.flatnonzero(there)
                    total[on] += there[on, None] * unit.directions[layer]
            layers.append(total)
        return tuple(layers)

    def truth(
        self, ids: Int64[np.ndarray, "context position"], *, start: int = 0
    ) -> tuple[Variable, ...]:
        """One variable for each planted unit: `on` where it is active."""
        strength, half = self._activity(start + len(ids))
        strength, half = (each[start * self.length :] for each in (strength, half))
        found = []
        for unit in _plan(self).units:
            on = _strength_of(unit, strength, half) > 0
            found.append(
                Variable(
                    name=unit.name,
                    value=np.where(on, 0, NEVER).reshape(ids.shape),
                    names=("on",),
                    born=unit.born,
                    dies=None if unit.dies == self.n_layers - 1 else unit.dies,
                    heirs=unit.heirs,
                )
            )
        return tuple(found)

    def directions(self) -> Mapping[str, Mapping[int, Float[np.ndarray, "d_model"]]]:
        """Unit directions by unit and layer."""
        return {unit.name: unit.directions for unit in _plan(self).units}

    def _activity(
        self, n_contexts: int
    ) -> tuple[Float[np.ndarray, "row feature"], Bool[np.ndarray, "row feature"]]:
        """Strengths (0 where not active), and the coin that a split is decided by. Contexts are
        drawn one after the other, so more of them begin with the same ones."""
        plan = _plan(self)
        n, chunks = self.n_features, []
        for context in range(n_contexts):
            rng = np.random.default_rng([self.seed, 2, context])
            rate = plan.rate * np.where(plan.topic == rng.integers(N_TOPICS), 3.0, 0.7)
            on = rng.random((self.length, n)) < rate
            child = plan.parent >= 0
            on[:, child] &= on[:, plan.parent[child]]
            strength = on * np.exp(rng.normal(0.0, 0.35, (self.length, n)))
            chunks.append((strength.astype(np.float32), rng.random((self.length, n)) < 0.5))
        return tuple(np.concatenate(part) for part in zip(*chunks, strict=True))  # type: ignore[return-value]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Unit:
    """A direction with a life: the tokens of `features`, or the half of them that `side` says."""

    name: str
    features: tuple[int, ...]
    born: int
    dies: int
    directions: dict[int, Float[np.ndarray, "d_model"]]
    side: bool | None = None
    heirs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class _Plan:
    units: tuple[_Unit, ...]
    rate: Float[np.ndarray, "feature"]
    topic: Int64[np.ndarray, "feature"]
    parent: Int64[np.ndarray, "feature"]
    born: Int64[np.ndarray, "feature"]


def _word(feature: int) -> str:
    """A name of four letters or more, another for each feature."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    word, rest = "", feature
    while len(word) < 4 or rest:
        rest, syllable = divmod(rest, len(consonants) * len(vowels))
        word += consonants[syllable % len(consonants)] + vowels[syllable // len(consonants)]
    return word


def _strength_of(
    unit: _Unit, strength: Float[np.ndarray, "row feature"], half: Bool[np.ndarray, "row feature"]
) -> Float[np.ndarray, "row"]:
    there = strength[:, list(unit.features)].max(1)
    return there if unit.side is None else there * (half[:, unit.features[0]] == unit.side)


def _plan(world: Superposed) -> _Plan:
    rng = np.random.default_rng([world.seed, 1])
    n, last = world.n_features, world.n_layers - 1
    rate = (1.0 + np.arange(n)) ** -0.5
    parent = np.full(n, -1)
    children = rng.choice(np.arange(n // 2, n), n // 8, replace=False)
    parent[children] = rng.integers(0, n // 8, len(children))
    rate *= world.l0 / rate.sum()
    rate = np.clip(rate, 0.004, 0.25)
    rate[children] = 0.35  # given the parent
    fates = [FATES[i % len(FATES)] for i in rng.permutation(n)]
    units: list[_Unit] = []
    born = np.zeros(n, dtype=np.int64)
    waiting: int | None = None  # of two that will merge, the first
    for i, fate in enumerate(fates):
        change = int(rng.integers(1, last + 1))
        if fate == "born":
            born[i] = change
            units.append(_unit(world, rng, _word(i), (i,), change, last))
        elif fate == "dies":
            units.append(_unit(world, rng, _word(i), (i,), 0, change - 1))
        elif fate == "splits":
            heirs = (f"{_word(i)}:1", f"{_word(i)}:2")
            whole = _unit(world, rng, _word(i), (i,), 0, change - 1, heirs=heirs)
            units.append(whole)
            for name, side in zip(heirs, (True, False), strict=True):
                towards = _turned(rng, whole.directions[change - 1], 40.0)
                units.append(
                    _unit(world, rng, name, (i,), change, last, towards=towards, side=side)
                )
        elif fate == "merges" and waiting is None:
            waiting = i
        elif fate == "merges" and waiting is not None:
            name = f"{_word(waiting)}+{_word(i)}"
            pair = [
                _unit(world, rng, _word(j), (j,), 0, change - 1, heirs=(name,))
                for j in (waiting, i)
            ]
            middle = np.sum([each.directions[change - 1] for each in pair], axis=0)
            towards = middle / np.linalg.norm(middle)
            merged = _unit(world, rng, name, (waiting, i), change, last, towards=towards)
            units += [*pair, merged]
            waiting = None
        else:
            units.append(_unit(world, rng, _word(i), (i,), 0, last, turn=fate == "turns"))
    if waiting is not None:
        units.append(_unit(world, rng, _word(waiting), (waiting,), 0, last))
    topic = rng.integers(0, N_TOPICS, n)
    return _Plan(units=tuple(units), rate=rate, topic=topic, parent=parent, born=born)


def _unit(
    world: Superposed,
    rng: np.random.Generator,
    name: str,
    features: tuple[int, ...],
    born: int,
    dies: int,
    *,
    towards: Float[np.ndarray, "d_model"] | None = None,
    turn: bool = False,
    side: bool | None = None,
    heirs: tuple[str, ...] = (),
) -> _Unit:
    direction = rng.normal(size=world.d_model) if towards is None else towards
    direction = direction / np.linalg.norm(direction)
    directions = {}
    for layer in range(born, dies + 1):
        if turn and layer > born:
            direction = _turned(rng, direction, world.turn)
        directions[layer] = direction.astype(np.float32)
    return _Unit(
        name=name,
        features=features,
        born=born,
        dies=dies,
        directions=directions,
        side=side,
        heirs=heirs,
    )


def _turned(
    rng: np.random.Generator, direction: Float[np.ndarray, "d"], degrees: float
) -> Float[np.ndarray, "d"]:
    """At this angle to `direction`, otherwise at random."""
    other = rng.normal(size=len(direction))
    other -= (other @ direction) * direction
    other /= np.linalg.norm(other)
    angle = np.deg2rad(degrees)
    return np.cos(angle) * direction + np.sin(angle) * other
