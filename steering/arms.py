"""Arms: ways of steering with one feature and its flow, each a plan.

| arm                | what it isolates |
|--------------------|------------------|
| `unsteered`        | nothing; every sample of another arm is paired with one of these |
| `single`           | the seed feature's direction at its own layer |
| `single_budget`    | the same with the flow's whole coefficient: is it only the size? |
| `copied`           | the seed's direction at every layer of the flow: is it their number? |
| `flow`             | each layer's own matched feature, shares by the schedule |
| `flow_closed_loop` | each layer brought up to a floor: adds only what upstream did not supply |
| `random_flow`      | another feature's flow over the same layers: the random control |
| `random_direction` | a random vector at the seed's layer |
| `difference`       | difference of means of texts with and without a concept, at some layers |

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
from steering.edits import Add, Edit, Floor
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

    @classmethod
    def of_one(cls, seed: FeatureId) -> Flow:
        """The feature alone, at its own layer."""
        return cls(seed=seed, steps=((seed, 1.0),))

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(feature.site for feature, _ in self.steps)


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Units: the median norm of each site's activations, and a typical strong activation of each
    feature."""

    norms: Mapping[Site, float]
    activations: Mapping[FeatureId, float]


def along_flow(
    flow: Flow,
    scales: Scales,
    *,
    edit: Edit = Add(),
    schedule: Schedule = Constant(),
    strength: float | None = None,
    name: str = "flow",
) -> Plan:
    """Edit every step's own feature, the strength shared by the schedule. An edit that adds is in
    median norms of the site, another one in typical strong activations of the feature. Without
    `strength`: one near those that small doses take, so that calibration needs few evaluations."""
    units = {
        feature: scales.norms[feature.site] if edit.adds_up else scales.activations[feature]
        for feature, _ in flow.steps
    }
    return Plan.from_chain(
        flow.steps,
        edit=edit,
        scales=units,
        schedule=schedule,
        seed=flow.seed,
        strength=_first_guess(edit) if strength is None else strength,
        name=name,
    )


def single(flow: Flow, scales: Scales, *, strength: float | None = None) -> Plan:
    """Add at the seed's layer; strength 1 is the median norm there."""
    return along_flow(Flow.of_one(flow.seed), scales, strength=strength, name="single")


def copied(flow: Flow, scales: Scales, *, strength: float | None = None) -> Plan:
    """Add the seed's direction at every site of the flow, equal shares."""
    nodes = tuple(
        Node(
            at=str(flow.seed) if site == flow.seed.site else site.short,
            direction_of=None if site == flow.seed.site else str(flow.seed),
            weight=1 / len(flow.steps),
            scale=scales.norms[site],
        )
        for site in flow.sites
    )
    return Plan(nodes=nodes, strength=_guessed(strength), name="copied")


def along_vectors(
    vectors: Mapping[Site, Float[Tensor, "d_model"]],
    scales: Scales,
    *,
    strength: float | None = None,
    name: str = "difference",
) -> Plan:
    """Add one vector a site (scaled to unit length), equal shares of the strength."""
    if not vectors:
        raise UserError("no vectors to steer with", expected="one vector a site")
    nodes = tuple(
        Node(
            at=site.short,
            vector=f"{name}_{site.short}",
            weight=1 / len(vectors),
            scale=scales.norms[site],
        )
        for site in vectors
    )
    unit = {
        f"{name}_{site.short}": vector / vector.norm().clamp(min=1e-12)
        for site, vector in vectors.items()
    }
    return Plan(nodes=nodes, vectors=unit, strength=_guessed(strength), name=name)


def random_direction(flow: Flow, scales: Scales, *, d_model: int, seed: int) -> Plan:
    """Add one random unit vector at the seed's layer."""
    vector = torch.randn(d_model, generator=torch.Generator().manual_seed(seed))
    return along_vectors({flow.seed.site: vector}, scales, name="random_direction")


def with_whole_budget(flow: Flow, scales: Scales, flow_plan: Plan) -> Plan:
    """The single-layer plan with the flow's whole coefficient, whatever dose that is."""
    total = sum(node.weight for node in flow_plan.nodes) * flow_plan.strength
    return single(flow, scales, strength=total)


def plans_of(
    arms: Sequence[str],
    flow: Flow,
    control: Flow,
    scales: Scales,
    *,
    d_model: int,
    seed: int,
    schedule: Schedule,
) -> dict[str, Plan]:
    """The plan of each arm whose dose is calibrated (`single_budget` follows from the calibrated
    flow). `control` is the flow of the arm `random_flow`."""
    makers = {
        "single": lambda: single(flow, scales),
        "copied": lambda: copied(flow, scales),
        "flow": lambda: along_flow(flow, scales, schedule=schedule),
        "flow_closed_loop": lambda: along_flow(flow, scales, edit=Floor()),
        "random_flow": lambda: along_flow(control, scales, schedule=schedule),
        "random_direction": lambda: random_direction(flow, scales, d_model=d_model, seed=seed),
    }
    unknown = [arm for arm in arms if arm not in ARMS]
    if unknown:
        raise UserError("no such arm", expected=", ".join(ARMS), found=", ".join(unknown))
    return {arm: replace(makers[arm](), name=arm) for arm in arms if arm in makers}


def _first_guess(edit: Edit) -> float:
    return 0.15 if edit.adds_up else 0.4 if isinstance(edit, Floor) else 1.0


def _guessed(strength: float | None) -> float:
    return _first_guess(Add()) if strength is None else strength
