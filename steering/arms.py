"""Arms: the ways of steering that are compared, each a plan for one feature and its flow.

| arm                | what it isolates
|
|--------------------|--------------------------------------------------------------------------------------|
| `unsteered`        | nothing; the twin that every other arm is paired with
|
| `single`           | the seed feature's direction at its own layer
|
| `single_budget`    | the same with the flow's whole coefficient: is it only the size of the push?
|
| `copied`           | the seed's direction at every layer of the flow: is it only the number of
layers?    |
| `flow`             | each layer's own matched feature, shares by the schedule
|
| `flow_closed_loop` | each layer brought up to a floor: adds only what upstream did not supply
|
| `random_flow`      | another feature's flow over the same layers: the placebo
|
| `random_direction` | a random vector at the seed's layer
|
| `difference`       | difference of means of texts with and without the concept, at one layer or
several   |

`flow` helps only if it beats the best of `single`, `single_budget` and `copied` at equal dose.
Doses are calibrated outside; `single_budget` takes the flow's coefficient instead of a dose, so its
own dose is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site
from steering.edits import Add, Cap, Edit, Floor
from steering.plan import Node, Plan
from steering.schedules import Constant, Schedule

ARMS = (
    "single",
    "single_budget",
    "copied",
    "flow",
    "flow_closed_loop",
    "random_flow",
    "random_direction",
)


@dataclass(frozen=True, kw_only=True)
class Flow:
    """A feature and the steps of its flow, (feature, cosine of the link from the step before), in
    order of depth."""

    seed: FeatureId
    steps: tuple[tuple[FeatureId, float], ...]

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(feature.site for feature, _ in self.steps)


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Units: the median norm of each site's activations, and a typical strong activation of each
    feature."""

    norms: Mapping[Site, float]
    activations: Mapping[FeatureId, float]


def single(flow: Flow, scales: Scales, *, strength: float = 0.5) -> Plan:
    """Add at the seed's layer; strength 1 is the median norm there."""
    node = Node(at=str(flow.seed), scale=scales.norms[flow.seed.site])
    return Plan(nodes=(node,), edit=Add(), strength=strength, name="single")


def copied(flow: Flow, scales: Scales, *, strength: float = 0.5) -> Plan:
    """Add the seed's direction at every site of the flow, equal shares."""
    share = 1 / len(flow.steps)
    nodes = tuple(
        Node(at=str(flow.seed), weight=share, scale=scales.norms[site])
        if site == flow.seed.site
        else Node(
            at=site.short, direction_of=str(flow.seed), weight=share, scale=scales.norms[site]
        )
        for site in flow.sites
    )
    return Plan(nodes=nodes, edit=Add(), strength=strength, name="copied")


def flow_additive(
    flow: Flow, scales: Scales, *, schedule: Schedule = Constant(), strength: float = 0.5
) -> Plan:
    """Add every step's own direction, the strength shared by the schedule."""
    norms = {feature: scales.norms[feature.site] for feature, _ in flow.steps}
    return Plan.from_chain(
        flow.steps,
        edit=Add(),
        scales=norms,
        schedule=schedule,
        seed=flow.seed,
        strength=strength,
        name="flow",
    )


def flow_levels(
    flow: Flow,
    scales: Scales,
    *,
    edit: Edit | None = None,
    schedule: Schedule = Constant(),
    strength: float = 1.0,
) -> Plan:
    """Closed loop: bring every step's feature to a floor (or a cap), in units of its typical strong
    activation."""
    return Plan.from_chain(
        flow.steps,
        edit=edit or Floor(),
        scales=scales.activations,
        schedule=schedule,
        seed=flow.seed,
        strength=strength,
        name="flow_suppression" if isinstance(edit, Cap) else "flow_closed_loop",
    )


def random_direction(
    flow: Flow, scales: Scales, *, d_model: int, seed: int, strength: float = 0.5
) -> Plan:
    """Add one random unit vector at the seed's layer."""
    vector = torch.randn(d_model, generator=torch.Generator().manual_seed(seed))
    site = flow.seed.site
    node = Node(at=site.short, vector="random", scale=scales.norms[site])
    return Plan(
        nodes=(node,),
        vectors={"random": vector / vector.norm()},
        strength=strength,
        name="random_direction",
    )


def difference(
    vectors: Mapping[Site, Float[Tensor, "d_model"]],
    scales: Scales,
    *,
    strength: float = 0.5,
    name: str = "difference",
) -> Plan:
    """Add difference-of-means vectors (scaled to unit length), equal shares of the strength."""
    if not vectors:
        raise UserError("no vectors to steer with", expected="one vector a site")
    share = 1 / len(vectors)
    nodes = tuple(
        Node(
            at=site.short, vector=f"difference_{site.short}", weight=share, scale=scales.norms[site]
        )
        for site in vectors
    )
    unit = {
        f"difference_{site.short}": vector / vector.norm().clamp(min=1e-12)
        for site, vector in vectors.items()
    }
    return Plan(nodes=nodes, vectors=unit, strength=strength, name=name)


def with_whole_budget(flow: Flow, scales: Scales, flow_plan: Plan) -> Plan:
    """The single-layer plan with the flow's whole coefficient, whatever dose that is."""
    total = sum(node.weight for node in flow_plan.nodes) * flow_plan.strength
    return single(flow, scales, strength=total)


def first_guess(plan: Plan) -> float:
    """A strength near those that small doses take, so that calibration needs few evaluations."""
    return (
        0.15
        if isinstance(plan.edit, Add)
        else 0.4
        if isinstance(plan.edit, Floor)
        else plan.strength
    )


def plans_of(
    arms: Sequence[str],
    flow: Flow,
    placebo: Flow,
    scales: Scales,
    *,
    d_model: int,
    seed: int,
    schedule: Schedule,
) -> dict[str, Plan]:
    """The plan of each arm whose dose is calibrated (`single_budget` follows from the calibrated
    flow)."""
    makers = {
        "single": lambda: single(flow, scales),
        "copied": lambda: copied(flow, scales),
        "flow": lambda: flow_additive(flow, scales, schedule=schedule),
        "flow_closed_loop": lambda: flow_levels(flow, scales),
        "random_flow": lambda: _renamed(
            flow_additive(placebo, scales, schedule=schedule), "random_flow"
        ),
        "random_direction": lambda: random_direction(flow, scales, d_model=d_model, seed=seed),
    }
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise UserError("no such arm", expected=", ".join(ARMS), found=", ".join(unknown))
    made = {arm: makers[arm]() for arm in arms if arm in makers}
    return {arm: plan.with_strength(first_guess(plan)) for arm, plan in made.items()}


def _renamed(plan: Plan, name: str) -> Plan:
    return replace(plan, name=name)
