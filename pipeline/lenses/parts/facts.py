"""The truth of a world and the latents of a run, side by side on held-out tokens.

1. Held-out contexts; the first token of each is left out. Even contexts choose, odd ones score.
2. A fact is "this variable has this value". It is looked at on the tokens where the variable has a
   value; a variable with a single value (`on`) is looked at everywhere.
3. A predictor is a latent above 0, ¼, ½ or ¾ of its 99th percentile. A fact's best latent is the
   predictor with the best F1; its best set is a union of up to `n_set` of them, grown greedily.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from pydantic import TypeAdapter

from data.model.spec import ModelSpec, OfWorld
from data.worlds import NEVER, Variable, World
from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.run import Run

LEVELS = (0.0, 0.25, 0.5, 0.75)
FEWEST = 8
"""Tokens of each half on which a fact must be true to be looked at."""


def world_of(run: Run) -> World | None:
    """The world that the activations are from, if they are from one."""
    config = run.artifact("collect").config
    spec = TypeAdapter(ModelSpec).validate_python(config["model"]) if "model" in config else None
    return spec.world if isinstance(spec, OfWorld) else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Truth:
    """Held-out contexts of a run and what is true there; rows are tokens without the first ones."""

    world: World
    ids: Int64[np.ndarray, "context position"]
    first_row: int
    variables: Mapping[str, Variable]

    @classmethod
    def of(cls, run: Run, world: World, n_tokens: int) -> Truth:
        """The first held-out contexts. Raises UserError when there are none."""
        n_context = run.store.n_context
        start = run.store.validation_start // n_context
        stop = min(run.store.n_rows // n_context, start + max(2, n_tokens // n_context))
        if stop - start < 2:
            raise UserError(
                "a score needs held-out contexts",
                where=run.store.url,
                found=str(stop - start),
                expected="two or more: collect.validation_fraction above 0",
            )
        ids = run.tokens.id.reshape(-1, n_context)[start:stop].astype(np.int64)
        truth = world.truth(ids, start=start)
        return cls(
            world=world,
            ids=ids,
            first_row=start * n_context,
            variables={variable.name: variable for variable in truth},
        )

    def rows(self, values: np.ndarray) -> np.ndarray:
        """[context position …] without the first tokens, one row a token."""
        return values[:, 1:].reshape(-1, *values.shape[2:])

    def activations(self, run: Run, site: Site) -> Float[np.ndarray, "context position d"]:
        """What the store holds there, the first tokens included."""
        n = self.ids.size
        return run.store.read(site, self.first_row, self.first_row + n).reshape(*self.ids.shape, -1)

    @cached_property
    def scoring(self) -> Bool[np.ndarray, "row"]:
        """The rows of odd contexts."""
        odd = np.arange(len(self.ids)) % 2 == 1
        return self.rows(np.broadcast_to(odd[:, None], self.ids.shape))

    @cached_property
    def facts(self) -> tuple[Fact, ...]:
        """Those that are true often enough in both halves."""
        return tuple(
            fact
            for variable in self.variables.values()
            for fact in self._facts_of(variable)
            if min((fact.true & half).sum() for half in (self.scoring, ~self.scoring)) >= FEWEST
        )

    def _facts_of(self, variable: Variable) -> Iterator[Fact]:
        value = self.rows(variable.value)
        defined = value != NEVER if len(variable.names) > 1 else np.ones_like(value, dtype=bool)
        for number in range(len(variable.names)):
            yield Fact(variable=variable, number=number, true=value == number, defined=defined)

    def permuted(self, seed: int) -> Truth:
        """The same facts on tokens in another order."""
        order = np.random.default_rng(seed).permutation(self.ids.shape[0] * self.ids.shape[1])

        def moved(variable: Variable) -> Variable:
            value = variable.value.ravel()[order].reshape(variable.value.shape)
            return Variable(**{**vars(variable), "value": value})

        variables = {name: moved(variable) for name, variable in self.variables.items()}
        return Truth(world=self.world, ids=self.ids, first_row=self.first_row, variables=variables)


@dataclass(frozen=True, kw_only=True, eq=False)
class Fact:
    """`variable` has the value `number`: where that is true, and where the variable has a value."""

    variable: Variable
    number: int
    true: Bool[np.ndarray, "row"]
    defined: Bool[np.ndarray, "row"]

    @property
    def name(self) -> str:
        value = self.variable.names[self.number]
        return (
            self.variable.name if len(self.variable.names) == 1 else f"{self.variable.name}={value}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Latents:
    """The latents of one site on the rows, and predictors made of them."""

    site: Site
    z: Float[np.ndarray, "row latent"]
    level: Float[np.ndarray, "level latent"]

    @classmethod
    def of(cls, run: Run, truth: Truth, site: Site) -> Latents:
        x = torch.from_numpy(truth.rows(truth.activations(run, site)))
        z = run.saes[site].encode(x).float().cpu().numpy()
        top = np.quantile(z[~truth.scoring], 0.99, axis=0)
        return cls(site=site, z=z, level=np.outer(LEVELS, top))

    @cached_property
    def on(self) -> Bool[np.ndarray, "row predictor"]:
        """Predictor `level · n_latents + latent`."""
        return np.concatenate([self.z > level for level in self.level], axis=1)

    @cached_property
    def _on(self) -> Float[np.ndarray, "row predictor"]:
        return self.on.astype(np.float32)

    @property
    def n_latents(self) -> int:
        return self.z.shape[1]

    @cached_property
    def alive(self) -> Bool[np.ndarray, "latent"]:
        return (self.z > 0).sum(0) >= FEWEST

    def f1(self, fact: Fact, rows: Bool[np.ndarray, "row"]) -> Float[np.ndarray, "predictor"]:
        """Of every predictor on these rows where the variable has a value."""
        rows = rows & fact.defined
        on = self._on[rows]
        hits = fact.true[rows].astype(np.float32) @ on
        return 2 * hits / np.maximum(fact.true[rows].sum() + on.sum(0), 1)

    def latent_of(self, predictor: int) -> int:
        return int(predictor) % self.n_latents

    def best_set(
        self, fact: Fact, rows: Bool[np.ndarray, "row"], f1: Float[np.ndarray, "predictor"], n: int
    ) -> list[int]:
        """Predictors whose union has the best F1, the best one first."""
        rows = rows & fact.defined
        candidates = np.argsort(-f1)[:48]
        on, true = self.on[rows][:, candidates], fact.true[rows]
        chosen, union, best = [int(candidates[0])], on[:, 0], float(f1[candidates[0]])
        for _ in range(n - 1):
            joint = on | union[:, None]
            hits = (joint & true[:, None]).sum(0)
            scores = 2 * hits / np.maximum(true.sum() + joint.sum(0), 1)
            place = int(scores.argmax())
            if scores[place] <= best + 0.005:
                break
            chosen.append(int(candidates[place]))
            union, best = joint[:, place], float(scores[place])
        return chosen


def f1_and_mcc(
    predicted: Bool[np.ndarray, "row"], fact: Fact, rows: Bool[np.ndarray, "row"]
) -> tuple[float, float]:
    """F1, and Matthews' correlation, of one prediction on these rows."""
    rows = rows & fact.defined
    seen, true = predicted[rows], fact.true[rows]
    hits = float((seen & true).sum())
    f1 = 2 * hits / max(float(seen.sum() + true.sum()), 1.0)
    if seen.all() or true.all() or not seen.any() or not true.any():
        return f1, 0.0
    return f1, float(np.corrcoef(seen, true)[0, 1])
