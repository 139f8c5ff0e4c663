"""Plans: what steering will do, as data. Nothing here runs a model.

A plan has nodes, one edit, one scope and a strength. A node is

- a feature: `at = "L12/402"`;
- a feature's direction used at another site: `at = "L15"`, `direction_of = "L12/402"` (Add,
  ProjectOut, Rotate only);
- a vector of the plan: `at = "L15"`, `vector = "cooking"`, with the tensor in `plan.vectors`.

Its strength is `plan.strength × weight`, in units of `scale` (see `steering.edits`).
`Plan.from_chain` lays a plan along the flow of a feature; `at_layer` and `up_to_layer` are the
paper's single-layer and cumulative modes. `digests` name what the plan was made from (`dictionary
L12`, `graph`), `dose` is the KL in nats that its strength was calibrated to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from featureflow.errors import Problem, UserError
from featureflow.settings import Settings
from featureflow.sites import FeatureId, Site, parse_feature, parse_site
from steering.edits import Add, Edit
from steering.schedules import Budget, Constant, Schedule, weights
from steering.scopes import Everywhere, Scope


class Node(Settings):
    """One place that a plan edits. `scale` is in units of activation; mean ablation and projection
    read `mean`."""

    at: str
    weight: float = 1.0
    scale: float = 1.0
    mean: float = 0.0
    cosine: float | None = None
    direction_of: str | None = None
    vector: str | None = None

    @property
    def site(self) -> Site:
        return parse_feature(self.at).site if "/" in self.at else parse_site(self.at)

    @property
    def feature(self) -> FeatureId | None:
        """The feature whose decoder row is used, at its own site or elsewhere; None for a
        vector."""
        if "/" in self.at:
            return parse_feature(self.at)
        return None if self.direction_of is None else parse_feature(self.direction_of)

    @property
    def is_feature(self) -> bool:
        return "/" in self.at


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """A steering plan. `skip_first` tokens of every sequence are never touched (the first is an
    attention sink)."""

    nodes: tuple[Node, ...]
    edit: Edit = field(default_factory=Add)
    scope: Scope = field(default_factory=Everywhere)
    strength: float = 1.0
    skip_first: int = 1
    dose: float | None = None
    name: str = ""
    note: str = ""
    model: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if problems := tuple(_problems_of(self)):
            raise UserError("this is not a steering plan", problems=problems)

    @classmethod
    def from_chain(
        cls,
        steps: Sequence[tuple[FeatureId, float]],
        *,
        edit: Edit,
        scales: Mapping[FeatureId, float],
        schedule: Schedule = Constant(),
        budget: Budget | None = None,
        seed: FeatureId | None = None,
        minimum_cosine: float | None = None,
        means: Mapping[FeatureId, float] | None = None,
        **rest: Any,
    ) -> Plan:
        """A plan along a flow. `steps` are (feature, cosine of its link from the step before), in
        order of depth.

        `minimum_cosine` cuts the flow where a link is weaker, keeping the part that holds the seed
        (the paper: 0.5). The budget is `sum` for edits that add up and `peak` for edits that set
        levels.
        """
        if not steps:
            raise UserError("a flow without steps gives no plan", expected="at least one feature")
        features = [feature for feature, _ in steps]
        if seed is not None and seed not in features:
            raise UserError(
                "the seed is not on the flow",
                expected=", ".join(map(str, features)),
                found=str(seed),
            )
        middle = features.index(seed) if seed is not None else len(steps) // 2
        kept = range(*_span_around(middle, [c for _, c in steps], minimum_cosine))
        share = weights(
            schedule,
            layers=[features[k].site.layer for k in kept],
            cosines=[steps[k][1] for k in kept],
            seed=middle - kept.start,
            budget=budget or ("sum" if edit.adds_up else "peak"),
        )
        nodes = tuple(
            Node(
                at=str(features[k]),
                weight=weight,
                scale=scales[features[k]],
                mean=(means or {}).get(features[k], 0.0),
                cosine=None if k == 0 else steps[k][1],
            )
            for k, weight in zip(kept, share, strict=True)
        )
        return cls(nodes=nodes, edit=edit, **rest)

    def with_strength(self, strength: float, *, dose: float | None = None) -> Plan:
        return replace(self, strength=strength, dose=dose)

    def at_layer(self, layer: int) -> Plan:
        """The paper's single-layer mode: only the nodes of one layer, each with the weight it
        had."""
        return self._only(
            tuple(node for node in self.nodes if node.site.layer == layer), f"layer {layer}"
        )

    def up_to_layer(self, layer: int) -> Plan:
        """The paper's cumulative mode: the nodes of layers 0 … `layer`."""
        return self._only(
            tuple(node for node in self.nodes if node.site.layer <= layer), f"layers up to {layer}"
        )

    def by_site(self) -> dict[Site, list[Node]]:
        """The nodes in the order in which the model meets their sites' layers."""
        found: dict[Site, list[Node]] = {}
        for node in sorted(self.nodes, key=lambda node: node.site.layer):
            found.setdefault(node.site, []).append(node)
        return found

    def _only(self, nodes: tuple[Node, ...], what: str) -> Plan:
        if not nodes:
            layers = sorted({node.site.layer for node in self.nodes})
            raise UserError(
                f"the plan has no node at {what}", expected=f"one of the layers {layers}"
            )
        return replace(self, nodes=nodes)


def _span_around(seed: int, cosines: Sequence[float], minimum: float | None) -> tuple[int, int]:
    """The longest run of steps around the seed without a link below `minimum`; (first, one past the
    last)."""
    first, stop = seed, seed + 1
    while first > 0 and (minimum is None or cosines[first] >= minimum):
        first -= 1
    while stop < len(cosines) and (minimum is None or cosines[stop] >= minimum):
        stop += 1
    return first, stop


def _problems_of(plan: Plan) -> Iterator[Problem]:
    if not plan.nodes:
        yield Problem(what="no nodes", where="nodes")
    if not math.isfinite(plan.strength):
        yield Problem(what="not a finite number", where="strength", found=str(plan.strength))
    if plan.skip_first < 0:
        yield Problem(what="negative", where="skip_first", found=str(plan.skip_first))
    for place, node in enumerate(plan.nodes):
        yield from _problems_of_node(f"nodes[{place}] {node.at}", node, plan)
    yield from _conflicts(plan)


def _problems_of_node(where: str, node: Node, plan: Plan) -> Iterator[Problem]:
    try:
        site, _ = node.site, node.feature
    except UserError as error:
        yield Problem(what=error.what, where=where)
        return
    for name in ("weight", "scale", "mean"):
        if not math.isfinite(getattr(node, name)):
            yield Problem(
                what="not a finite number", where=f"{where}.{name}", found=str(getattr(node, name))
            )
    if node.scale <= 0:
        yield Problem(what="the scale must be positive", where=where, found=str(node.scale))
    sources = [node.is_feature, node.direction_of is not None, node.vector is not None]
    if sum(sources) != 1:
        yield Problem(
            what="a node has one direction",
            where=where,
            expected=f"{site.short}/<latent>, direction_of or vector",
        )
    elif plan.edit.reads_activation and not node.is_feature:
        yield Problem(
            what=f"{plan.edit.kind} changes a feature, this node is a bare direction",
            where=where,
            expected="an edit of directions, such as add",
        )
    if node.vector is not None and node.vector not in plan.vectors:
        yield Problem(
            what="no such vector in the plan",
            where=where,
            expected=node.vector,
            found=str(sorted(plan.vectors)),
        )


def _conflicts(plan: Plan) -> Iterator[Problem]:
    """Two nodes with the same direction at one site have no single meaning, nor have two rotations
    there."""
    seen: set[tuple[str, ...]] = set()
    sites: set[str] = set()
    for node in plan.nodes:
        site = node.at.split("/")[0]
        key = (node.at, node.direction_of or "", node.vector or "")
        if key in seen:
            yield Problem(what="two nodes edit the same direction at one site", where=node.at)
        if not plan.edit.is_sum and site in sites:
            yield Problem(
                what=f"two edits {plan.edit.kind} at one site depend on their order",
                where=site,
                expected="one node a site",
            )
        seen.add(key)
        sites.add(site)


def is_linear(plan: Plan) -> bool:
    """Whether the edit adds the same vector everywhere, whatever the activation: what a control
    vector can hold."""
    return isinstance(plan.edit, Add) and not plan.edit.keep_norm
