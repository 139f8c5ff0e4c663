"""Schedules: how a plan's strength is shared among the layers of a flow.

A schedule gives one weight a node; the strength of a node is the plan's strength × its weight.
Weights are brought to one budget afterwards, so that schedules can be compared: `sum` (they add up
to 1: the pushes together are the strength), `peak` (the largest is 1: for levels such as a floor or
a cap, which do not add up) or `none` (the paper's raw formulas).

| schedule      | weight of a node at layer l                                                   |
|---------------|-------------------------------------------------------------------------------|
| Constant      | 1                                                                             |
| Linear        | from 1 at the first layer to `end` at the last (the paper: end = 1/s)         |
| Exponential   | exp(rate · l) (the paper: rate = −0.05)                                       |
| CosineProduct | the product of the link cosines between the node and the seed                 |
| Gaussian      | exp(−(l − centre)² / (2 width²)); the centre is the seed's layer unless given |

Sources: Feature Flow, section 5.3 and appendix B; a Gaussian depth schedule: arXiv 2512.07667.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal, assert_never

from typing_extensions import Doc

from featureflow.errors import UserError
from featureflow.settings import ByKind, Settings, kinds_of

Budget = Literal["sum", "peak", "none"]


class Constant(Settings):
    kind: Literal["constant"] = "constant"


class Linear(Settings):
    """Falls or rises in a straight line along the flow."""

    end: Annotated[float, Doc("weight at the last layer; the first has 1")] = 0.0
    kind: Literal["linear"] = "linear"


class Exponential(Settings):
    """The paper's: exponential in the number of the layer."""

    rate: Annotated[float, Doc("of growth a layer; negative falls")] = -0.05
    kind: Literal["exponential"] = "exponential"


class CosineProduct(Settings):
    kind: Literal["cosine_product"] = "cosine_product"


class Gaussian(Settings):
    """A bump over depth."""

    width: Annotated[float, Doc("standard deviation, in layers")] = 3.0
    centre: Annotated[float | None, Doc("layer of the peak; none: the seed's")] = None
    kind: Literal["gaussian"] = "gaussian"


Schedule = Annotated[Constant | Linear | Exponential | CosineProduct | Gaussian, ByKind()]


def schedule_named(kind: str) -> Schedule:
    """The schedule of that kind, with its defaults. Raises UserError for an unknown one."""
    known = kinds_of(Schedule)
    if kind not in known:
        raise UserError(f"there is no schedule {kind!r}", expected=", ".join(known))
    return known[kind]()  # type: ignore[return-value]  # a member of the union


def weights(
    schedule: Schedule,
    *,
    layers: Sequence[int],
    cosines: Sequence[float],
    seed: int,
    budget: Budget = "sum",
) -> list[float]:
    """One weight a node. `cosines[k]` is the link from node k − 1 to node k; `seed` is an index."""
    if not layers:
        raise UserError("a schedule needs at least one node", expected="the layers of a flow")
    return normalised(_raw(schedule, layers, cosines, seed), budget)


def normalised(raw: Sequence[float], budget: Budget) -> list[float]:
    """Weights brought to one budget."""
    if budget == "none":
        return list(raw)
    total = sum(raw) if budget == "sum" else max(raw)
    if not math.isfinite(total) or total <= 0:
        raise UserError(
            "these weights have no budget",
            expected=f"a positive {budget}",
            found=str([round(w, 4) for w in raw]),
        )
    return [weight / total for weight in raw]


def _raw(
    schedule: Schedule, layers: Sequence[int], cosines: Sequence[float], seed: int
) -> list[float]:
    first, last = min(layers), max(layers)
    match schedule:
        case Constant():
            return [1.0] * len(layers)
        case Linear(end=end):
            span = max(last - first, 1)
            return [1.0 + (end - 1.0) * (layer - first) / span for layer in layers]
        case Exponential(rate=rate):
            return [math.exp(rate * layer) for layer in layers]
        case CosineProduct():
            return [_product_to_seed(cosines, node, seed) for node in range(len(layers))]
        case Gaussian(width=width, centre=centre):
            middle = layers[seed] if centre is None else centre
            return [math.exp(-((layer - middle) ** 2) / (2 * width**2)) for layer in layers]
        case _:
            assert_never(schedule)


def _product_to_seed(cosines: Sequence[float], node: int, seed: int) -> float:
    links = cosines[node + 1 : seed + 1] if node < seed else cosines[seed + 1 : node + 1]
    return math.prod(max(cosine, 0.0) for cosine in links)
