"""Features removed along their flows, read by readers that are fitted or trained apart from the
flows.

1. `Held`: the held-out contexts, and where in them each feature is active.
2. Readers of a feature, at sites some layers on and at the last one, from training rows without
   edits: a linear probe for "the feature is active here" (ridge, the linear discriminant), the
   difference of means, the latent of the same SAE that goes with it best and is not of its flow,
   the best latent of a second seed's SAE where there is one. Beside them the flow's own member.
3. Each feature is removed by every arm on contexts where it is active and on contexts where it is
   not (steering/removal.py).

Cost: training rows are read once a site; then one forward pass a feature and arm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import UserError
from featureflow.sites import FeatureId, Site, parse_feature
from pipeline.flow.causal import Contexts
from pipeline.flow.validation import held_out_contexts
from pipeline.lenses.base import kept
from pipeline.run import Run
from pipeline.training.reading import read_rows
from sae import Sae
from steering.arms import Flow
from steering.plan import Plan
from steering.removal import Reader, along_whole_flow, as_record, measure_removal, removal_arms

LEAST_AUROC = 0.75
RIDGE = 1e-3
"""Of the mean variance a dimension."""


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much is looked at, of each feature."""

    n_rows: int = 16384
    n_positions: int = 128
    n_with: int = 4
    n_without: int = 2
    seed: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Held:
    """The held-out contexts of a run, the first `n_positions` tokens of each."""

    run: Run
    n_positions: int = 1 << 30

    @cached_property
    def contexts(self) -> Contexts:
        return held_out_contexts(self.run.model, self.run.store, n_contexts=1 << 30)

    def activity(
        self, site: Site, latents: Sequence[int]
    ) -> Float[np.ndarray, "context position feature"]:
        """The activations of latents of one site; 0 where a token may not be used."""
        store, (n, length) = self.run.store, self.contexts.ids.shape
        first = -(-store.validation_start // length) * length
        x = torch.from_numpy(np.ascontiguousarray(store.read(site, first, first + n * length)))
        codes = self.run.saes[site].encode_selected(x.float(), list(latents))
        found = np.where(
            self.contexts.usable[..., None], codes.view(n, length, -1).cpu().numpy(), 0.0
        )
        return found[:, : self.n_positions]

    def with_both_kinds(self, features: Sequence[FeatureId]) -> list[FeatureId]:
        """Those of one site that are active in some held-out context and silent in some."""
        if not features:
            return []
        found = self.activity(features[0].site, [feature.latent for feature in features])
        share = (found[:, 1:] > 0).any(1).mean(0)
        return [each for each, s in zip(features, share, strict=True) if 0 < s < 1]


def flow_of(run: Run, feature: FeatureId) -> Flow:
    """From the feature to the end of its flow."""
    return run.steering.flow(feature, n_before=0, n_after=run.model.n_layers)


def reading_sites(run: Run, feature: FeatureId, ahead: int) -> dict[str, Site]:
    """ "+8" and "end": the residual site so many layers on, and the last one."""
    sites = list(run.steering.saes)
    later = [site for site in sites if site.layer == feature.site.layer + ahead]
    return {f"+{ahead}": site for site in later} | {"end": sites[-1]}


def trials(
    run: Run,
    features: Sequence[FeatureId],
    *,
    ahead: int,
    amount: Amount,
    seconds: Mapping[Site, Sae] = {},
    plans: Mapping[str, Plan] | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(what is left, side effects): a row a feature, arm and reader, or kind of token. `plans`
    instead of the arms of steering/removal.py. Raises UserError."""
    held = Held(run=run, n_positions=amount.n_positions)
    steering = run.steering
    readers = _readers(run, features, ahead, amount, seconds)
    means = {site: torch.from_numpy(run.store.statistics(site).mean) for site in steering.saes}
    words = {
        feature: profile.top_tokens
        for feature, profile in steering.profiles(features, amount.n_rows).items()
    }
    left: list[dict[str, Any]] = []
    effects: list[dict[str, Any]] = []
    for feature in run.each("remove features", features):
        one = partial(
            _removed,
            held,
            feature,
            readers[feature],
            words[feature],
            amount,
            plans or _arms(run, flow_of(run, feature), means, amount.seed),
        )
        found = kept(f"removed-{feature.site.short}-{feature.latent}", one)
        left += found[0]
        effects += found[1]
    return pd.DataFrame(left), pd.DataFrame(effects)


def _removed(
    held: Held,
    feature: FeatureId,
    readers: Sequence[Reader],
    words: Sequence[int],
    amount: Amount,
    plans: Mapping[str, Plan],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of one feature."""
    run = held.run
    contexts = _contexts(held, feature, amount)
    found = measure_removal(
        run.steering.model, run.steering.saes, plans, feature, contexts, readers, words=words
    )
    about = {"feature": str(feature), "flow": len(flow_of(run, feature).steps)}
    left, effects = ([about | as_record(row) for row in rows] for rows in found)
    return left, effects


def removal_lines(run: Run, plan: Plan, feature: str, *, ahead: int = 8) -> list[str]:
    """What a plan leaves of a feature, and what else it changes, beside the feature's own layer
    alone; for the command line. Raises UserError."""
    seed = parse_feature(feature)
    alone = along_whole_flow(Flow.of_one(seed))
    plans = {"removed": plan, "its layer alone": alone}
    left, effects = trials(run, [seed], ahead=ahead, amount=Amount(), plans=plans)
    lines = []
    for reader, rows in left.groupby("reader", sort=False):
        by_arm, weak = rows.set_index("arm")["left"], rows["auroc"].iloc[0] < LEAST_AUROC
        told = "  ".join(f"{arm} {by_arm[arm]:5.2f}" for arm in plans)
        lines.append(f"left, {reader:<26} {told}" + ("  (does not read it well)" if weak else ""))
    for where, rows in effects.groupby("where", sort=False):
        by_arm = rows.set_index("arm")["kl"]
        told = "  ".join(f"{arm} {by_arm[arm]:.4f}" for arm in plans)
        lines.append(f"KL, {where:<28} {told}")
    return lines


def _arms(run: Run, flow: Flow, means: Mapping[Site, Tensor], seed: int) -> dict[str, Plan]:
    """All arms; the random flow is over the same sites."""
    excluded = [step for step, _ in flow.steps]
    control = run.steering.random_flow(flow, seed=seed, excluded=excluded)
    return removal_arms(flow, control, _means(run, flow.seed, means))


def _contexts(held: Held, feature: FeatureId, amount: Amount) -> list[list[int]]:
    """Contexts in which the feature is active, and some in which it is not."""
    active = (held.activity(feature.site, [feature.latent])[:, 1:, 0] > 0).any(1)
    if not active.any():
        raise UserError(
            f"{feature} is never active on the held-out text", expected="a feature that is alive"
        )
    generator = np.random.default_rng([amount.seed, feature.site.layer, feature.latent])
    parts = [(np.flatnonzero(active), amount.n_with), (np.flatnonzero(~active), amount.n_without)]
    drawn = [generator.permutation(places)[:n] for places, n in parts]
    ids = held.contexts.ids[:, : held.n_positions]
    return [ids[place].tolist() for place in np.concatenate(drawn)]


def _means(run: Run, feature: FeatureId, rows: Mapping[Site, Tensor]) -> dict[Site, float]:
    """The mean of h · u at every residual site from the feature's own on."""
    u = run.saes[feature.site].W_dec[feature.latent]
    return {site: float(row @ u / u.norm()) for site, row in rows.items() if site >= feature.site}


def _readers(
    run: Run, features: Sequence[FeatureId], ahead: int, amount: Amount, seconds: Mapping[Site, Sae]
) -> dict[FeatureId, list[Reader]]:
    """Every reader of every feature; a site's training rows are read once."""
    rows = run.store.kept_rows("train")[: amount.n_rows]
    activity = _activity(run, features, rows)
    wanted: dict[Site, list[tuple[str, FeatureId]]] = {}
    for feature in features:
        for label, site in reading_sites(run, feature, ahead).items():
            wanted.setdefault(site, []).append((label, feature))
    found: dict[FeatureId, list[Reader]] = {feature: [] for feature in features}
    for site, asked in run.each("fit readers", sorted(wanted.items())):
        x = read_rows(run.store, site, rows)
        a = torch.stack([activity[feature] for _, feature in asked], dim=1)
        readings = [*_linear_readers(x, a), *_latent_readers(run, site, asked, x, a, seconds)]
        for kind, place, read in readings:
            label, feature = asked[place]
            found[feature].append(Reader(name=f"{kind} {label}", site=site, read=read))
    return found


def _activity(
    run: Run, features: Sequence[FeatureId], rows: np.ndarray
) -> dict[FeatureId, Float[Tensor, "row"]]:
    by_site: dict[Site, list[int]] = {}
    for feature in features:
        by_site.setdefault(feature.site, []).append(feature.latent)
    found: dict[FeatureId, Tensor] = {}
    for site, latents in by_site.items():
        a = run.saes[site].encode_selected(read_rows(run.store, site, rows), latents)
        found |= {FeatureId(site, latent): a[:, k] for k, latent in enumerate(latents)}
    return found


_Named = Iterator[tuple[str, int, Callable[[Tensor], Tensor]]]


def _linear_readers(x: Float[Tensor, "row d_model"], a: Float[Tensor, "row feature"]) -> _Named:
    mean = x.mean(0)
    centred, active = x - mean, (a > 0).float()
    with_activity = centred.T @ (active - active.mean(0)) / len(x)
    covariance = centred.T @ centred / len(x)
    ridge = RIDGE * covariance.trace() / len(covariance) * torch.eye(len(covariance))
    probes = torch.linalg.solve(covariance + ridge, with_activity)
    for kind, directions in (("probe", probes), ("difference of means", with_activity)):
        for place in range(a.shape[1]):
            yield kind, place, partial(_along, directions[:, place], mean)


def _latent_readers(
    run: Run,
    site: Site,
    asked: Sequence[tuple[str, FeatureId]],
    x: Float[Tensor, "row d_model"],
    a: Float[Tensor, "row feature"],
    seconds: Mapping[Site, Sae],
) -> _Named:
    own = run.saes[site]
    members = [_member(run, feature, site) for _, feature in asked]
    for kind, sae in (("own latent", own), ("second seed", seconds.get(site))):
        if sae is None:
            continue
        agreement = _correlation(sae.encode(x), a)
        for place, member in enumerate(members):
            if sae is own and member is not None:
                agreement[member, place] = -1.0
            yield kind, place, partial(_latent, sae, int(agreement[:, place].argmax()))
    for place, member in enumerate(members):
        if member is not None:
            yield "flow's member", place, partial(_latent, own, member)


def _member(run: Run, feature: FeatureId, site: Site) -> int | None:
    steps = (step for step, _ in flow_of(run, feature).steps)
    return next((step.latent for step in steps if step.site == site), None)


def _correlation(
    z: Float[Tensor, "row latent"], a: Float[Tensor, "row feature"]
) -> Float[Tensor, "latent feature"]:
    z, a = z - z.mean(0), a - a.mean(0)
    return z.T @ a / (z.norm(dim=0)[:, None] * a.norm(dim=0)).clamp(min=1e-9)


def _along(direction: Tensor, mean: Tensor, h: Float[Tensor, "token d_model"]) -> Tensor:
    return (h - mean) @ direction


def _latent(sae: Sae, latent: int, h: Float[Tensor, "token d_model"]) -> Tensor:
    return sae.encode_selected(h, [latent])[:, 0]
