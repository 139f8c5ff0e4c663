"""Putting plans onto a model: hooks for as long as a `with` block lasts, and an account of what
they did.

    with applied(model, saes, plan) as run:
        model.hf(input_ids=ids)
    run.report()

1. Whether the plans fit the model and the dictionaries is checked first; every misfit is reported.
2. Each plan's nodes are gathered by site: decoder rows, strengths, encoder columns to read.
3. At a site the hook reads the incoming vector, asks every plan for its change (all from the same
   vector, so plans at one site commute), adds the changes and leaves every untouched token as it
   was, to the bit.
4. `rows` gives a plan only some rows of the batch, so that one batch can hold many plans, strengths
   and an unsteered sample.
5. The report counts tokens seen and touched and the realised size of the change. Sums stay on the
   model's device and are read once, at the end. Nothing touched is a warning; hooks that never ran
   are an error.

Cost: per site one product with the plan's decoder rows and, for edits of features, the selected
encoder columns (TopK: as many others as decide, sae/selected.py) where a token is in scope.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data.model.fingerprint import same_weights
from featureflow.errors import Problem, UserError
from featureflow.sites import FeatureId, Site, parse_feature
from steering.edits import NodeValues
from steering.plan import Node, Plan
from steering.scopes import WhereActive, WindowTracker, scope_mask
from steering.sequences import Dictionary, SteerableModel


class NothingTouched(UserWarning):
    """A plan with a strength other than 0 ran and changed no token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RowPlan:
    """A plan for some rows of the batch; `rows` None means all."""

    plan: Plan
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class NodeReport:
    """What happened at one node of one plan. `mean_before` is the feature's mean activation as it
    arrived, over the tokens in scope; `relative_size` is mean ‖change‖/‖h‖ at the node's site over
    the tokens touched."""

    plan: int
    at: str
    n_seen: int
    n_touched: int
    mean_before: float | None
    mean_after: float | None
    relative_size: float


@dataclass(frozen=True, kw_only=True)
class SteeringReport:
    nodes: tuple[NodeReport, ...]
    n_passes: int

    def n_touched(self, plan: int = 0) -> int:
        """How many (token, node) pairs of a plan were changed."""
        return sum(node.n_touched for node in self.nodes if node.plan == plan)


class SteeringRun:
    """The handle inside the `with` block."""

    def __init__(self, parts: Sequence[_Part], tracker: WindowTracker) -> None:
        self._parts = parts
        self._tracker = tracker

    def expect_prompt(self, n_columns: int | None) -> None:
        """When sequences are run again from the start without a cache, say how many columns are
        prompt."""
        self._tracker.expect_prompt(n_columns)

    def report(self) -> SteeringReport:
        nodes = tuple(report for part in self._parts for report in part.reports())
        return SteeringReport(nodes=nodes, n_passes=self._tracker.n_passes)


@contextmanager
def applied(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    plans: Plan | RowPlan | Sequence[Plan | RowPlan],
    *,
    monitor: bool = False,
) -> Iterator[SteeringRun]:
    """Steer `model` inside the block. Hooks are removed however it ends.

    `monitor` also reads the activations of features whose edit does not need them, for
    `mean_before`. Raises UserError with every misfit between plans, model and dictionaries.
    """
    row_plans = _row_plans(plans)
    if problems := tuple(misfits(model, saes, row_plans)):
        raise UserError("the plan does not fit the model", problems=problems)
    tracker = WindowTracker()
    parts = [
        _Part(site, nodes, number, row_plan, saes, tracker, model, monitor)
        for number, row_plan in enumerate(row_plans)
        for site, nodes in row_plan.plan.by_site().items()
    ]
    run = SteeringRun(parts, tracker)
    edits = _edits_by_site(parts, _conditions(row_plans, saes, tracker))
    with tracker.watching(model.hf.base_model), model.edited(edits):
        yield run
    _warn_if_nothing_happened(run, row_plans)


@dataclass(eq=False)
class _Condition:
    """A feature that gates a plan at later sites: its activity in the present pass."""

    feature: FeatureId
    sae: Dictionary
    tracker: WindowTracker
    activation: Tensor | None = None

    def __call__(self, h: Tensor) -> None:
        flat = h.reshape(-1, h.shape[-1]).float()
        self.activation = self.sae.encode_selected(flat, [self.feature.latent]).view(h.shape[:-1])


class _Part:
    """The nodes of one plan at one site."""

    def __init__(
        self,
        site: Site,
        nodes: Sequence[Node],
        number: int,
        row_plan: RowPlan,
        saes: Mapping[Site, Dictionary],
        tracker: WindowTracker,
        model: SteerableModel,
        monitor: bool,
    ) -> None:
        plan = row_plan.plan
        device = next(model.hf.parameters()).device
        self.site, self.nodes, self.number, self.plan, self.tracker = (
            site,
            nodes,
            number,
            plan,
            tracker,
        )
        self.rows = (
            None
            if row_plan.rows is None
            else torch.tensor(row_plan.rows, dtype=torch.long, device=device)
        )
        self.directions = (
            torch.stack([direction_of_node(node, plan, saes) for node in nodes]).float().to(device)
        )
        self.values = NodeValues(
            strength=torch.tensor([plan.strength * node.weight for node in nodes], device=device),
            scale=torch.tensor([node.scale for node in nodes], device=device),
            mean=torch.tensor([node.mean for node in nodes], device=device),
        )
        own_condition = isinstance(plan.scope, WhereActive) and plan.scope.feature is None
        self.reads = (
            plan.edit.reads_activation
            or own_condition
            or (monitor and all(node.is_feature for node in nodes))
        )
        self.sae = saes.get(site)
        self.latents = [parse_feature(node.at).latent for node in nodes] if self.reads else []
        self.condition: _Condition | None = None
        self.tally = _Tally.zeros(len(nodes), device)

    def change(self, h: Float[Tensor, "batch position d_model"]) -> tuple[Tensor, Tensor]:
        """(change, which tokens it touches) of the plan's rows."""
        return self._change_of_rows(h if self.rows is None else h[self.rows])

    def _change_of_rows(self, h: Tensor) -> tuple[Tensor, Tensor]:
        flat = h.reshape(-1, h.shape[-1]).float()
        in_scope = self._in_scope(h)
        a = self._activations(flat, in_scope)
        mask = self._mask(in_scope, a)
        c, delta = self.plan.edit.change(flat, a, self.directions, self.values, mask)
        touched = (c != 0).any(dim=-1)
        self.tally.add(flat, delta, touched, mask, c, a, adds=self.plan.edit.is_sum)
        return delta.view(h.shape), touched.view(h.shape[:-1])

    def _activations(self, flat: Float[Tensor, "token d_model"], in_scope: Tensor) -> Tensor | None:
        """Of every token; nothing is encoded where none is in scope, as when a plan for the prompt
        meets a new token. On a GPU to ask would cost more than to encode. Always all tokens or
        none: a product over some of them may round otherwise, and then holding a feature at its
        present value would change it."""
        if not self.reads or self.sae is None:
            return None
        if flat.is_cuda or in_scope.any():
            return self.sae.encode_selected(flat, self.latents)
        return flat.new_zeros(len(flat), len(self.latents))

    def _in_scope(self, h: Tensor) -> Bool[Tensor, "token"]:
        window = self.tracker.window
        mask = scope_mask(self.plan.scope, window) & (window.position >= self.plan.skip_first)
        if self.condition is not None and self.condition.activation is not None:
            mask = mask & (self.condition.activation > self.plan.scope.above)  # type: ignore[union-attr]  # WhereActive
        return (mask if self.rows is None else mask[self.rows]).reshape(-1)

    def _mask(
        self, in_scope: Bool[Tensor, "token"], a: Tensor | None
    ) -> Bool[Tensor, "token node"]:
        if isinstance(self.plan.scope, WhereActive) and self.condition is None and a is not None:
            return in_scope[:, None] & (a > self.plan.scope.above)
        return in_scope[:, None].expand(-1, len(self.nodes))

    def reports(self) -> Iterator[NodeReport]:
        yield from self.tally.reports(self.number, [node.at for node in self.nodes])


def _edits_by_site(
    parts: Sequence[_Part], conditions: Sequence[_Condition]
) -> dict[Site, Callable[[Tensor], Tensor]]:
    by_site: dict[Site, list[_Part]] = {}
    for part in parts:
        by_site.setdefault(part.site, []).append(part)
        scope = part.plan.scope
        if isinstance(scope, WhereActive) and scope.feature is not None:
            part.condition = next(c for c in conditions if str(c.feature) == scope.feature)
    sites = {*by_site, *(condition.feature.site for condition in conditions)}
    return {
        site: _site_edit(by_site.get(site, []), [c for c in conditions if c.feature.site == site])
        for site in sites
    }


def _site_edit(
    parts: Sequence[_Part], conditions: Sequence[_Condition]
) -> Callable[[Tensor], Tensor]:
    @torch.no_grad()
    def edit(h: Float[Tensor, "batch position d_model"]) -> Float[Tensor, "batch position d_model"]:
        for condition in conditions:
            condition(h)
        if not parts:
            return h
        if len(parts) == 1 and parts[0].rows is None:
            total, touched = parts[0].change(h)
            return torch.where(touched[..., None], (h.float() + total).to(h.dtype), h)
        total = torch.zeros(h.shape, device=h.device)
        touched = torch.zeros(h.shape[:-1], dtype=torch.bool, device=h.device)
        for part in parts:
            delta, some = part.change(h)
            if part.rows is None:
                total, touched = total + delta, touched | some
            else:
                total.index_add_(0, part.rows, delta)
                touched[part.rows] |= some
        return torch.where(touched[..., None], (h.float() + total).to(h.dtype), h)

    return edit


def misfits(
    model: SteerableModel, saes: Mapping[Site, Dictionary], row_plans: Sequence[RowPlan]
) -> Iterator[Problem]:
    sites = set(model.sites())
    for row_plan in row_plans:
        plan = row_plan.plan
        if plan.model and not same_weights(plan.model, model.fingerprint):
            yield Problem(
                what="the plan was made for another model",
                expected=plan.model,
                found=model.fingerprint,
            )
        for node in plan.nodes:
            yield from _misfits_of_node(node, plan, sites, saes, model.d_model)
        if isinstance(plan.scope, WhereActive) and plan.scope.feature is not None:
            yield from _misfits_of_condition(parse_feature(plan.scope.feature), plan, saes)
    yield from _overlaps(row_plans)


def _misfits_of_node(
    node: Node, plan: Plan, sites: set[Site], saes: Mapping[Site, Dictionary], d_model: int
) -> Iterator[Problem]:
    if node.site not in sites:
        yield Problem(what="the model has no such site", where=node.at)
    if node.vector is not None:
        if plan.vectors[node.vector].shape != (d_model,):
            found = str(list(plan.vectors[node.vector].shape))
            yield Problem(
                what="the vector has another width",
                where=f"{node.at} {node.vector}",
                expected=f"[{d_model}]",
                found=found,
            )
        return
    feature = node.feature
    sae = saes.get(feature.site) if feature is not None else None
    if feature is None or sae is None:
        yield Problem(
            what="there is no dictionary for it",
            where=node.at,
            found=", ".join(s.short for s in sorted(saes)),
        )
    elif not feature.latent < sae.W_dec.shape[0]:
        yield Problem(
            what="the dictionary has no such latent",
            where=str(feature),
            expected=f"below {sae.W_dec.shape[0]}",
        )
    elif sae.W_dec.shape[1] != d_model:
        yield Problem(
            what="the dictionary has another width",
            where=str(feature),
            expected=str(d_model),
            found=str(sae.W_dec.shape[1]),
        )


def _misfits_of_condition(
    feature: FeatureId, plan: Plan, saes: Mapping[Site, Dictionary]
) -> Iterator[Problem]:
    if feature.site not in saes:
        yield Problem(what="there is no dictionary for the scope's feature", where=str(feature))
    if any(node.site < feature.site for node in plan.nodes):
        yield Problem(
            what="the scope's feature lies after an edited site",
            where=str(feature),
            expected="a feature at the first edited site or before",
        )


def _overlaps(row_plans: Sequence[RowPlan]) -> Iterator[Problem]:
    """Two plans that set the same feature for the same row contradict each other."""
    seen: dict[str, list[RowPlan]] = {}
    for row_plan in row_plans:
        for node in row_plan.plan.nodes:
            for other in seen.get(node.at, []):
                if (
                    row_plan.plan.edit.reads_activation
                    and other.plan.edit.reads_activation
                    and _share_rows(row_plan, other)
                ):
                    yield Problem(
                        what="two plans set the same feature for the same rows", where=node.at
                    )
            seen.setdefault(node.at, []).append(row_plan)


def _share_rows(one: RowPlan, other: RowPlan) -> bool:
    return one.rows is None or other.rows is None or bool(set(one.rows) & set(other.rows))


@dataclass(eq=False)
class _Tally:
    """Sums over the tokens of a site's part; read once, at the end."""

    seen: Tensor
    touched: Tensor
    before: Tensor
    after: Tensor
    size: Tensor
    n_sized: Tensor
    knows_activation: bool = False
    n_calls: int = 0

    @classmethod
    def zeros(cls, n_nodes: int, device: torch.device) -> _Tally:
        def zero(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        return cls(
            seen=zero(n_nodes),
            touched=zero(n_nodes),
            before=zero(n_nodes),
            after=zero(n_nodes),
            size=zero(),
            n_sized=zero(),
        )

    def add(
        self,
        h: Tensor,
        delta: Tensor,
        touched: Tensor,
        mask: Tensor,
        c: Tensor,
        a: Tensor | None,
        *,
        adds: bool,
    ) -> None:
        self.n_calls += 1
        self.seen += mask.sum(0)
        self.touched += (c != 0).sum(0)
        if a is not None:
            self.knows_activation = True
            self.before += torch.where(mask, a, 0).sum(0)
            self.after += torch.where(mask, a + c if adds else a, 0).sum(0)
        ratio = delta.norm(dim=-1) / h.norm(dim=-1).clamp(min=1e-12)
        self.size += torch.where(touched, ratio, 0).sum()
        self.n_sized += touched.sum()

    def reports(self, plan: int, names: Sequence[str]) -> Iterator[NodeReport]:
        size = float(self.size / self.n_sized.clamp(min=1))
        for k, name in enumerate(names):
            n_seen = int(self.seen[k])
            known = self.knows_activation and n_seen > 0
            yield NodeReport(
                plan=plan,
                at=name,
                n_seen=n_seen,
                n_touched=int(self.touched[k]),
                mean_before=float(self.before[k]) / n_seen if known else None,
                mean_after=float(self.after[k]) / n_seen if known else None,
                relative_size=size,
            )


def direction_of_node(node: Node, plan: Plan, saes: Mapping[Site, Dictionary]) -> Tensor:
    if node.vector is not None:
        return plan.vectors[node.vector]
    feature = node.feature
    if feature is None:
        raise UserError("a node without direction", where=node.at)
    return saes[feature.site].W_dec[feature.latent]


def _row_plans(plans: Any) -> list[RowPlan]:
    listed = [plans] if isinstance(plans, (Plan, RowPlan)) else list(plans)
    return [plan if isinstance(plan, RowPlan) else RowPlan(plan=plan) for plan in listed]


def _conditions(
    row_plans: Sequence[RowPlan], saes: Mapping[Site, Dictionary], tracker: WindowTracker
) -> list[_Condition]:
    named = {
        p.plan.scope.feature
        for p in row_plans
        if isinstance(p.plan.scope, WhereActive) and p.plan.scope.feature
    }
    features = [parse_feature(name) for name in sorted(named)]
    return [
        _Condition(feature=feature, sae=saes[feature.site], tracker=tracker) for feature in features
    ]


def _warn_if_nothing_happened(run: SteeringRun, row_plans: Sequence[RowPlan]) -> None:
    report = run.report()
    if report.n_passes == 0:
        return
    if all(node.n_seen == 0 for node in report.nodes) and all(
        part.tally.n_calls == 0 for part in run._parts
    ):
        raise UserError(
            "the model ran, but no edited site did",
            expected="the model that was given to `applied`",
        )
    for number, row_plan in enumerate(row_plans):
        if row_plan.plan.strength != 0 and report.n_touched(number) == 0:
            name = row_plan.plan.name or f"plan {number}"
            warnings.warn(
                f"{name} touched no token: its scope matched none, or its feature was never active",
                NothingTouched,
                stacklevel=4,
            )
