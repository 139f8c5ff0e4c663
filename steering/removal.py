"""Removal of a feature, and what is left of it for readers that are not of its flow.

1. Arms: the whole flow ablated from the feature to its end, every n-th member of it, the feature's
   own layer alone, its own layer over-subtracted (r below 0), its direction projected out of every
   layer, a random feature's flow; flow and projection also only where the feature is active.
2. The text is run once as it is. A token counts as `active` when the feature is active on it,
   `before` when it was not yet in its context, `later` when it was before; `other` are contexts
   without the feature.
3. Every arm runs over the same tokens. Readers look at vectors as they arrive at their site, before
   an edit there. What is left = (reading of the edited − of silent tokens) / (reading as it was −
   of silent tokens), mean over active tokens. `seen` is the share of active tokens on which the
   reading exceeds 95 % of the silent ones.
4. Side effects: KL from the model as it is, by kind of token, and the rise of the next token's
   loss.
5. The arm without the model hands the edited stream to the reader as if every block passed an edit
   on unchanged. The difference of the two arms is what the model does.

Cost: one forward pass from the feature's layer on an arm. Source: Feature Flow §5.2;
over-subtraction is its r < 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site, parse_feature
from steering.arms import Flow
from steering.dose import NeutralText, scored, steered_log_probs
from steering.edits import Ablate, ProjectOut, Rescale
from steering.features import auroc
from steering.plan import Node, Plan
from steering.scopes import WhereActive
from steering.sequences import Dictionary, SteerableModel, arriving

OVER_SUBTRACTED = (-1.0, -3.0)
WHERE = ("active", "before", "later", "other")
SEEN_QUANTILE = 0.95


@dataclass(frozen=True, kw_only=True, eq=False)
class Reader:
    """Something that says how much of a feature there is in a vector at a site."""

    name: str
    site: Site
    read: Callable[[Float[Tensor, "token d_model"]], Float[Tensor, "token"]]


@dataclass(frozen=True, kw_only=True)
class Left:
    """What one reader finds under one arm: mean readings over active tokens, of silent tokens in
    `silent`; how well it tells active from silent tokens, and how many active ones it sees."""

    arm: str
    reader: str
    site: Site
    n: int
    as_it_was: float
    edited: float
    silent: float
    auroc: float
    seen_before: float
    seen: float

    @property
    def left(self) -> float:
        """NaN for a reader that sees no difference."""
        signal = self.as_it_was - self.silent
        return (self.edited - self.silent) / signal if signal else float("nan")


@dataclass(frozen=True, kw_only=True)
class SideEffect:
    """KL and rise of the loss, nats a token, over the tokens of one kind."""

    arm: str
    where: str
    n: int
    kl: float
    rise: float


def along_whole_flow(flow: Flow, *, every: int = 1) -> Plan:
    """Ablate every step of the flow, or every n-th from its first."""
    if every < 1:
        raise UserError("every n-th step of a flow", expected="1 or more", found=str(every))
    nodes = tuple(Node(at=str(feature)) for feature, _ in flow.steps[::every])
    name = f"{flow.seed} removed" + (f", every {every}" if every > 1 else "")
    return Plan(nodes=nodes, edit=Ablate(), name=name)


def removal_arms(flow: Flow, control: Flow, means: Mapping[Site, float]) -> dict[str, Plan]:
    """The plan of every arm. `means`: of every site from the feature's on, the mean of h · u, with
    u the feature's direction."""
    own = (Node(at=str(flow.seed)),)
    whole = along_whole_flow(flow)
    projected = tuple(
        Node(
            at=str(flow.seed) if site == flow.seed.site else site.short,
            direction_of=None if site == flow.seed.site else str(flow.seed),
            mean=mean,
        )
        for site, mean in means.items()
    )
    return {
        "flow": whole,
        "flow where active": replace(whole, scope=WhereActive(feature=str(flow.seed))),
        "every third": along_whole_flow(flow, every=3),
        "single": Plan(nodes=own, edit=Ablate()),
        **{
            f"over-subtracted, r {r:g}": Plan(nodes=own, edit=Rescale(), strength=1 - r)
            for r in OVER_SUBTRACTED
        },
        "projected": Plan(nodes=projected, edit=ProjectOut()),
        "projected where active": Plan(
            nodes=projected, edit=ProjectOut(), scope=WhereActive(feature=str(flow.seed))
        ),
        "random flow": along_whole_flow(control),
    }


def measure_removal(
    model: SteerableModel,
    saes: Mapping[Site, Dictionary],
    plans: Mapping[str, Plan],
    feature: FeatureId,
    contexts: Sequence[Sequence[int]],
    readers: Sequence[Reader],
    *,
    words: Sequence[int] = (),
) -> tuple[list[Left], list[SideEffect]]:
    """What is left and what else changes, over contexts of token ids. `words`: token ids whose
    probability to come next is read too. Raises UserError where the feature is never active or
    always."""
    edited = {node.site for plan in plans.values() for node in plan.nodes}
    sites = sorted({feature.site, *edited, *(reader.site for reader in readers)})
    with arriving(model, sites) as seen:
        text = NeutralText.prepare(
            model, [tuple(row) for row in contexts], n_tokens=max(map(len, contexts))
        )
        clean = {site: scored(h, text.batch).float() for site, h in seen.items()}
    where = _kinds_of_token(saes[feature.site], feature, clean[feature.site], text)
    before = _readings(clean, text.log_probs, readers, words)
    left: list[Left] = []
    effects: list[SideEffect] = []
    for arm, plan in plans.items():
        with arriving(model, {reader.site for reader in readers}) as seen:
            log_probs = steered_log_probs(model, saes, plan, text)
            here = {site: scored(h, text.batch).float() for site, h in seen.items()}
        left += _left(arm, readers, before, _readings(here, log_probs, readers, words), where)
        effects += _effects(arm, text, log_probs, where)
        if isinstance(plan.edit, Ablate) and plan.scope.kind == "everywhere":
            passed_on = unchanged_by_blocks(saes, plan, clean)
            values = _readings(passed_on, None, readers, ())
            left += _left(f"{arm}, without the model", readers, before, values, where)
    return left, effects


def unchanged_by_blocks(
    saes: Mapping[Site, Dictionary], plan: Plan, clean: Mapping[Site, Float[Tensor, "token d"]]
) -> dict[Site, Float[Tensor, "token d"]]:
    """What would arrive at each site if every block passed an ablation on as it is."""
    arrived, change = {}, torch.zeros(())
    nodes = plan.by_site()
    for site in sorted(clean):
        here = clean[site] + change
        arrived[site] = here
        for node in nodes.get(site, []):
            latent = parse_feature(node.at).latent
            a = saes[site].encode_selected(here, [latent])
            share = min(plan.strength * node.weight, 1.0)
            change = change - share * a * saes[site].W_dec[latent]
    return arrived


def _kinds_of_token(
    sae: Dictionary, feature: FeatureId, h: Float[Tensor, "token d_model"], text: NeutralText
) -> dict[str, Bool[Tensor, "token"]]:
    """Which tokens are active, before, later or other; and which are silent."""
    active = sae.encode_selected(h, [feature.latent])[:, 0] > 0
    if not active.any() or active.all():
        what = "never" if not active.any() else "on every token"
        raise UserError(f"{feature} is {what} active on this text", expected="some active tokens")
    grid = torch.zeros(text.batch.ids.shape, dtype=torch.bool, device=h.device)
    grid[scored_places(text)] = active
    ever = (grid.cumsum(1) > 0)[scored_places(text)]
    present = grid.any(1, keepdim=True).expand_as(grid)[scored_places(text)]
    return {
        "active": active,
        "before": present & ~ever,
        "later": ever & ~active,
        "other": ~present,
        "silent": ~active,
    }


def scored_places(text: NeutralText) -> Bool[Tensor, "batch column"]:
    """The real tokens but the first of each row."""
    return text.batch.real & (text.batch.positions() > 0)


def _readings(
    arrived: Mapping[Site, Tensor],
    log_probs: Tensor | None,
    readers: Sequence[Reader],
    words: Sequence[int],
) -> dict[str, Float[np.ndarray, "token"]]:
    found = {reader.name: reader.read(arrived[reader.site]).cpu().numpy() for reader in readers}
    if log_probs is not None and len(words):
        found["words"] = log_probs[:, list(words)].exp().sum(-1).cpu().numpy()
    return found


def _left(
    arm: str,
    readers: Sequence[Reader],
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
    where: Mapping[str, Tensor],
) -> Iterator[Left]:
    sites = {reader.name: reader.site for reader in readers}
    last = max(sites.values())
    active, silent = where["active"].cpu().numpy(), where["silent"].cpu().numpy()
    for name, values in after.items():
        was = before[name]
        threshold = np.quantile(was[silent], SEEN_QUANTILE)
        yield Left(
            arm=arm,
            reader=name,
            site=sites.get(name, last),
            n=int(active.sum()),
            as_it_was=float(was[active].mean()),
            edited=float(values[active].mean()),
            silent=float(was[silent].mean()),
            auroc=float(auroc(was[:, None], active)[0]),
            seen_before=float((was[active] > threshold).mean()),
            seen=float((values[active] > threshold).mean()),
        )


def _effects(
    arm: str, text: NeutralText, log_probs: Tensor, where: Mapping[str, Tensor]
) -> Iterator[SideEffect]:
    kl = torch.linalg.vecdot(log_probs.exp(), log_probs - text.log_probs).double().clamp(min=0)
    following = text.next_ids.clamp(min=0)[:, None]
    rise = (text.log_probs - log_probs).gather(1, following)[:, 0].double()
    for name in WHERE:
        here, known = where[name], where[name] & (text.next_ids >= 0)
        if here.any():
            yield SideEffect(
                arm=arm,
                where=name,
                n=int(here.sum()),
                kl=float(kl[here].mean()),
                rise=float(rise[known].mean()) if known.any() else 0.0,
            )


def as_record(found: Any) -> dict[str, Any]:
    """A row of a table."""
    record = dict(vars(found))
    if isinstance(found, Left):
        record |= {"site": found.site.short, "left": found.left}
    return record
