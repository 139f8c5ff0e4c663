"""Dose: how strongly a plan changes the model, in nats of KL on neutral text, and the strength that
gives a wanted dose.

1. `NeutralText.prepare` runs the unsteered model once over neutral text and keeps its
   log-probabilities.
2. `measure` runs the steered model over the same tokens: mean over tokens of KL(p_steered ‖
   p_unsteered), its 95th percentile, the share of unchanged first choices and the change of
   cross-entropy.
3. `calibrate` solves measure(strength) = dose by regula falsi on log KL against log strength, kept
   off the ends of the bracket; for small pushes KL grows with the square of the strength, so it
   starts with slope 2. All targets of one plan share their evaluations. A dose that no strength
   reaches is reported, not raised: the closest point is returned with `reached=False`.

A raw strength means nothing across features (the best one varies a hundredfold); doses are
comparable. Cost: one forward pass over the neutral text an evaluation, from the first edited block
on; 2–4 evaluations a target. Source: steering-lite's iso-KL calibration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from featureflow.errors import UserError
from featureflow.sites import Site, parse_feature
from steering.hooks import SteeringReport, applied
from steering.plan import Plan
from steering.scopes import WhereActive
from steering.sequences import (
    Batch,
    Dictionary,
    SteerableModel,
    block_outputs,
    device_of,
    encoded,
    forward,
    padded,
    resumed,
)

_LEAST_KL = 1e-7


@dataclass(frozen=True, kw_only=True, eq=False)
class NeutralText:
    """Neutral text and what the unsteered model thinks of it. Scored: every real token but the
    first of each row. `blocks` are the outputs of its blocks: a steered pass starts at the first
    edited one."""

    batch: Batch
    log_probs: Float[Tensor, "token vocab"]
    next_ids: Int[Tensor, "token"]
    blocks: Sequence[Any] = ()

    @classmethod
    def prepare(
        cls, model: SteerableModel, texts: Sequence[str], *, n_tokens: int = 64
    ) -> NeutralText:
        """The first `n_tokens` tokens of each text. Memory: 4 bytes × tokens × vocabulary."""
        if not texts:
            raise UserError("a dose needs neutral text", expected="at least one text")
        batch = padded([encoded(model, text)[:n_tokens] for text in texts], device=device_of(model))
        with block_outputs(model) as blocks:
            log_probs = scored(forward(model, batch), batch).float().log_softmax(-1)
        following = batch.ids.roll(-1, dims=1)
        return cls(
            batch=batch, log_probs=log_probs, next_ids=scored(following, batch), blocks=blocks
        )

    @property
    def n_tokens(self) -> int:
        return self.log_probs.shape[0]


@dataclass(frozen=True, kw_only=True)
class Dose:
    """A measured dose. `kl` and `kl_p95` in nats a token; `delta_ce` is the rise of cross-entropy
    on that text."""

    strength: float
    kl: float
    kl_p95: float
    same_choice: float
    delta_ce: float
    report: SteeringReport


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """The strength found for a wanted dose. When none gives it, `reached` is False and `measured`
    the closest."""

    target: float
    measured: Dose
    reached: bool
    n_evaluations: int

    @property
    def strength(self) -> float:
        return self.measured.strength


def measure(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    plan: Plan,
    neutral: NeutralText,
    *,
    monitor: bool = True,
) -> Dose:
    """The dose of the plan as it stands. Without `monitor` the report has no activations where the
    edit reads none."""
    with applied(model, saes, plan, monitor=monitor) as run:
        steered = _steered(model, plan, neutral)
    kl = torch.linalg.vecdot(steered.exp(), steered - neutral.log_probs).double().clamp(min=0)
    rows = torch.arange(neutral.n_tokens, device=kl.device)
    has_next = neutral.next_ids >= 0
    rise = (
        neutral.log_probs[rows, neutral.next_ids.clamp(min=0)]
        - steered[rows, neutral.next_ids.clamp(min=0)]
    )
    return Dose(
        strength=plan.strength,
        kl=float(kl.mean()),
        kl_p95=float(kl.quantile(0.95)),
        same_choice=float((steered.argmax(-1) == neutral.log_probs.argmax(-1)).double().mean()),
        delta_ce=float(rise[has_next].double().mean()) if has_next.any() else 0.0,
        report=run.report(),
    )


def steered_log_probs(
    model: SteerableModel, saes: Mapping[Site, Dictionary], plan: Plan, neutral: NeutralText
) -> Float[Tensor, "token vocab"]:
    """What `neutral.log_probs` become under the plan."""
    with applied(model, saes, plan):
        return _steered(model, plan, neutral)


def _steered(
    model: SteerableModel, plan: Plan, neutral: NeutralText
) -> Float[Tensor, "token vocab"]:
    with resumed(model, neutral.blocks, _first_edited(plan)):
        return scored(forward(model, neutral.batch), neutral.batch).float().log_softmax(-1)


def _first_edited(plan: Plan) -> int:
    """The first block that must be computed: everything before it is as in the unsteered model. A
    condition's feature must be read too."""
    sites = [node.site for node in plan.nodes]
    if isinstance(plan.scope, WhereActive) and plan.scope.feature is not None:
        sites.append(parse_feature(plan.scope.feature).site)
    return min(site.layer for site in sites)


def persistence(steered: SteeringReport, unsteered: SteeringReport) -> float | None:
    """Does the push survive? Mean over the nodes after the first of (activation as it arrives,
    steered) / (the same, unsteered): 1 is a push that is gone at the next node. None where
    activations are not known or never present."""
    pairs = zip(steered.nodes[1:], unsteered.nodes[1:], strict=True)
    ratios = [
        s.mean_before / u.mean_before
        for s, u in pairs
        if u.mean_before and s.mean_before is not None
    ]
    return sum(ratios) / len(ratios) if ratios else None


def calibrate(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    plan: Plan,
    neutral: NeutralText,
    doses: Sequence[float],
    *,
    tolerance: float = 0.05,
    max_evaluations: int = 8,
    max_strength: float = 1e4,
    monitor: bool = True,
) -> list[Calibrated]:
    """The strength for each dose, to a relative error. The plan's own strength is the first guess
    and gives the sign: a plan that pushes away from a feature still does."""
    if any(dose <= 0 or not math.isfinite(dose) for dose in doses):
        raise UserError("a dose is a positive number of nats", found=str(list(doses)))
    measured: dict[float, Dose] = {}

    sign = math.copysign(1.0, plan.strength)

    def at(strength: float) -> float:
        if strength not in measured:
            measured[strength] = measure(
                model, saes, plan.with_strength(sign * strength), neutral, monitor=monitor
            )
        return measured[strength].kl

    guess = abs(plan.strength) or 1.0
    found = []
    for dose in doses:
        before = len(measured)
        strength, reached = solve_for_dose(
            at,
            dose,
            guess=guess,
            known={s: m.kl for s, m in measured.items()},
            tolerance=tolerance,
            max_evaluations=max_evaluations,
            max_strength=max_strength,
        )
        found.append(
            Calibrated(
                target=dose,
                measured=measured[strength],
                reached=reached,
                n_evaluations=len(measured) - before,
            )
        )
        guess = strength
    return found


def solve_for_dose(
    kl_at: Callable[[float], float],
    dose: float,
    *,
    guess: float,
    known: Mapping[float, float],
    tolerance: float,
    max_evaluations: int,
    max_strength: float,
) -> tuple[float, bool]:
    """A strength with KL within `tolerance` of `dose`, and whether it was reached."""
    points = dict(known)
    strength = _next_strength(points, dose, guess)
    for _ in range(max_evaluations):
        points[strength] = max(kl_at(strength), _LEAST_KL)
        if _is_close(points[strength], dose, tolerance):
            return strength, True
        proposal = _next_strength(points, dose, guess)
        if not 0 < proposal <= max_strength or _is_saturated(points, dose):
            break
        strength = proposal
    best = min(points, key=lambda s: abs(math.log(max(points[s], _LEAST_KL) / dose)))
    return best, _is_close(points[best], dose, tolerance)


def _next_strength(points: Mapping[float, float], dose: float, guess: float) -> float:
    if not points:
        return guess
    below = max((s for s, kl in points.items() if kl <= dose), default=None)
    above = min(
        (s for s, kl in points.items() if kl > dose and (below is None or s > below)), default=None
    )
    if below is not None and above is not None:
        return _between(below, points[below], above, points[above], dose)
    edge = below if below is not None else min(points)
    factor = math.sqrt(dose / max(points[edge], _LEAST_KL))
    return edge * min(max(factor, 1 / 8), 8) * (1.02 if factor > 1 else 0.98)


def _between(low: float, kl_low: float, high: float, kl_high: float, dose: float) -> float:
    """Interpolated in log-log, kept off the ends of the bracket so that it shrinks from both
    sides."""
    fall, rise = math.log(max(kl_low, _LEAST_KL)), math.log(kl_high)
    share = (math.log(dose) - fall) / max(rise - fall, 1e-12)
    share = min(max(share, 0.05), 0.95)
    return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))


def _is_close(kl: float, dose: float, tolerance: float) -> bool:
    return kl > 0 and abs(math.log(kl / dose)) <= tolerance


def _is_saturated(points: Mapping[float, float], dose: float) -> bool:
    """Two rising strengths, a factor of two apart or more, that moved KL by less than 2 % and stay
    below the dose."""
    ordered = sorted(points)
    if len(ordered) < 3 or points[ordered[-1]] >= dose:
        return False
    last, before = ordered[-1], ordered[-2]
    return last >= 2 * before and points[last] < 1.02 * points[before]


def scored(values: Tensor, batch: Batch) -> Tensor:
    """The values at real tokens, without the first of each row; the last column has no next token
    (-1 for ids)."""
    if values.dtype == torch.long:
        values = values.clone()
        values[:, -1] = -1
    return values[batch.real & (batch.positions() > 0)]
