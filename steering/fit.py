"""Whether plans fit a model and its dictionaries, checked before anything runs; every misfit is
reported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from featureflow.errors import Problem
from featureflow.sites import FeatureId, Site, parse_feature
from steering.edits import reads_activation
from steering.plan import Node, Plan
from steering.protocols import Dictionary, SteerableModel
from steering.scopes import WhereActive


@dataclass(frozen=True, kw_only=True, eq=False)
class RowPlan:
    """A plan for some rows of the batch; `rows` None means all."""

    plan: Plan
    rows: tuple[int, ...] | None = None


def misfits(
    model: SteerableModel, saes: Mapping[Site, Dictionary], row_plans: Sequence[RowPlan]
) -> Iterator[Problem]:
    sites = set(model.sites())
    for row_plan in row_plans:
        plan = row_plan.plan
        if plan.model and plan.model != model.fingerprint:
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
                    reads_activation(row_plan.plan.edit)
                    and reads_activation(other.plan.edit)
                    and _share_rows(row_plan, other)
                ):
                    yield Problem(
                        what="two plans set the same feature for the same rows", where=node.at
                    )
            seen.setdefault(node.at, []).append(row_plan)


def _share_rows(one: RowPlan, other: RowPlan) -> bool:
    return one.rows is None or other.rows is None or bool(set(one.rows) & set(other.rows))
