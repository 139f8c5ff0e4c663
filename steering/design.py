"""Designed plans: which features to push, and how much of each, for the most effect at a dose.

1. A shift δ of a site is added to every token but the first. `gradient_of` gives, for every site at
   once, the gradient of a number (an objective) with respect to δ: one backward pass a batch.
2. `sketch_of` estimates the output's Fisher matrix F for shifts of all sites together: on neutral
   text a next token is drawn from the model's own prediction at every position, and the gradient of
   its log-probability is one row s of the sketch, E[s s'] = F. Then KL ≈ ½ w'Fw nats a token for a
   small shift w, cross terms of layers included.
3. A direction u has the effect g·u and costs √(u'Fu): `Sketch.cost`. `select` picks directions one
   after another, the one next that gains most effect per √KL beside those chosen, and weights them
   anew each time (non-negative least squares on their Gram matrix).
4. `dense` is the best vector of one site, features or not: (F + λI)⁻¹ g with λ = tr F / d. It is
   supervised by the objective alone, a measure of what features cost.

First order: measured KL at 0.1 nats was 1.0 to 1.5 times the predicted in later layers and up to
3 times in the first third, which is why early layers are left out by default. Strength is
calibrated afterwards with real passes (steering/dose.py). Cost: the sketch one backward pass a
sample, once a run; an objective one backward pass. Sources: natural gradient; GradSAE; Arad et al.
(output scores); orthogonal matching pursuit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from featureflow.errors import UserError
from featureflow.progress import Progress, silent
from featureflow.sites import FeatureId, Site
from steering.plan import Node, Plan
from steering.sequences import Batch, Dictionary, SteerableModel, forward_arguments

Gradient = dict[Site, Float[Tensor, "d_model"]]
Direction = tuple[Site, Float[Tensor, "d_model"]]
Stream = Mapping[Site, Float[Tensor, "batch column d_model"]]
Objective = Callable[[Float[Tensor, "batch column vocab"], Stream, Batch], Float[Tensor, ""]]
SHRINKAGE = 0.05
"""Added to the Gram matrix's diagonal, in shares of it: the sketch is an estimate."""
N_CANDIDATES = 512
_RARE = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class Sketch:
    """Rows s with mean s s' = F, already divided by √n: KL ≈ ½ ‖rows · w‖²."""

    sites: tuple[Site, ...]
    rows: Float[Tensor, "row site d_model"]

    def through(
        self, site: Site, directions: Float[Tensor, "direction d_model"]
    ) -> Float[Tensor, "row direction"]:
        """Rows of a direction at a site: their products are the Gram matrix of costs."""
        return self.rows[:, self.sites.index(site)] @ directions.T

    def kl(self, vectors: Mapping[Site, Float[Tensor, "d_model"]]) -> float:
        """Nats a token that these shifts together should cost."""
        through = [self.through(site, vector[None])[:, 0] for site, vector in vectors.items()]
        return 0.5 * float(torch.stack(through).sum(0).square().sum())

    def cost(
        self, site: Site, directions: Float[Tensor, "direction d_model"]
    ) -> Float[Tensor, "direction"]:
        """√(u'Fu): a push of size t costs ½ (t · cost)² nats."""
        return self.through(site, directions).norm(dim=0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidates:
    """Features that may be pushed: effect a unit of push, and their rows through the sketch."""

    features: tuple[FeatureId, ...]
    effect: Float[np.ndarray, "feature"]
    rows: Float[np.ndarray, "row feature"]

    @property
    def per_root_kl(self) -> Float[np.ndarray, "feature"]:
        """Effect at a cost of 1: what ranks single features."""
        return self.effect / np.linalg.norm(self.rows, axis=0).clip(min=_RARE)


@dataclass(frozen=True, kw_only=True)
class Designed:
    """Features with their pushes, scaled to ½ w'Fw = 1 nat; predicted effect there. Both follow
    √KL."""

    features: tuple[FeatureId, ...]
    pushes: tuple[float, ...]
    effect: float

    def effect_at(self, dose: float) -> float:
        """First order: what a dose of so many nats should give."""
        return self.effect * float(np.sqrt(dose))


def gradient_of(
    model: SteerableModel, batch: Batch, sites: Sequence[Site], objective: Objective
) -> Gradient:
    """The gradient of a number with respect to one shift of each site, the same on every token but
    the first of a row."""
    shifts, logits, stream = _shifted(model, batch, sites)
    value = objective(logits, stream, batch)
    found = torch.autograd.grad(value, list(shifts.values()), allow_unused=True)
    return {
        site: torch.zeros(model.d_model) if g is None else g.sum((0, 1)).detach().cpu()
        for site, g in zip(shifts, found, strict=True)
    }


def sketch_of(
    model: SteerableModel,
    batch: Batch,
    sites: Sequence[Site],
    *,
    n_samples: int = 24,
    seed: int = 0,
    progress: Progress = silent,
) -> Sketch:
    """`n_samples` rows a text."""
    shifts, logits, _ = _shifted(model, batch, sites)
    log_probs = logits.float().log_softmax(-1)
    places = counted(batch)
    probability = log_probs.detach().exp()[places]
    generator = torch.Generator(device=probability.device).manual_seed(seed)
    rows = []
    for done in range(n_samples):
        progress("sketch the output", done, n_samples)
        drawn = torch.multinomial(probability, 1, generator=generator)
        value = log_probs[places].gather(1, drawn).sum()
        found = torch.autograd.grad(value, list(shifts.values()), retain_graph=True)
        rows.append(torch.cat(found, dim=1).detach().cpu())
    n = n_samples * int(places.sum())
    return Sketch(sites=tuple(shifts), rows=torch.cat(rows) / n**0.5)


def words(tokens: Sequence[int], *, temperature: float = 0.8) -> Objective:
    """Expected share of tokens that are of these, when they are drawn at this temperature."""
    chosen = list(tokens)

    def value(logits: Tensor, _: Stream, batch: Batch) -> Tensor:
        probability = (logits[counted(batch)].float() / temperature).softmax(-1)
        return probability[:, chosen].sum(-1).mean()

    return value


def likelihood() -> Objective:
    """Mean log p a token of the texts in the batch."""

    def value(logits: Tensor, _: Stream, batch: Batch) -> Tensor:
        log_probs = logits[:, :-1].float().log_softmax(-1)
        scored = batch.real[:, :-1] & batch.real[:, 1:]
        return log_probs.gather(2, batch.ids[:, 1:, None]).squeeze(2)[scored].mean()

    return value


def margin(site: Site, weight: Float[Tensor, "d_model"]) -> Objective:
    """Mean of h · weight at a site: a linear classifier's margin, or a feature's pre-activation."""

    def value(_: Tensor, stream: Stream, batch: Batch) -> Tensor:
        if site not in stream:
            raise UserError(
                "the classifier's site is none of those that are pushed",
                expected=", ".join(each.short for each in stream),
                found=site.short,
            )
        return (stream[site][counted(batch)].float() @ weight).mean()

    return value


def candidates_of(
    gradient: Gradient,
    sketch: Sketch,
    saes: Mapping[Site, Dictionary],
    *,
    allowed: Callable[[FeatureId], bool] = lambda _: True,
    n: int = N_CANDIDATES,
) -> Candidates:
    """The best features by effect per √KL among those allowed; only those that help. Raises
    UserError where none does."""
    found: list[tuple[float, float, FeatureId]] = []
    for site in sketch.sites:
        if site not in saes:
            continue
        units = _unit_rows(saes[site])
        effect = units @ gradient[site]
        ratio = effect / sketch.cost(site, units).clamp(min=_RARE)
        for latent in ratio.topk(len(ratio)).indices.tolist():
            feature = FeatureId(site, latent)
            if allowed(feature) and effect[latent] > 0:
                found.append((float(ratio[latent]), float(effect[latent]), feature))
    if not found:
        raise UserError(
            "no feature that may be pushed has an effect",
            expected="features of layers whose output is sketched",
            found=", ".join(site.short for site in sketch.sites),
        )
    best = sorted(found, key=lambda each: (-each[0], str(each[2])))[:n]
    features = tuple(feature for _, _, feature in best)
    rows = [sketch.through(f.site, _unit_rows(saes[f.site])[[f.latent]])[:, 0] for f in features]
    return Candidates(
        features=features,
        effect=np.array([effect for _, effect, _ in best]),
        rows=torch.stack(rows, dim=1).double().numpy(),
    )


def select(candidates: Candidates, k: int, *, shrinkage: float = SHRINKAGE) -> Designed:
    """Up to `k` features with non-negative pushes. Fewer where a further one would not help."""
    gram = candidates.rows.T @ candidates.rows
    own = gram.diagonal().clip(min=_RARE)
    gram = gram + np.diag(shrinkage * own)
    chosen: list[int] = []
    pushes = np.zeros(0)
    while len(chosen) < k:
        gain = (candidates.effect - gram[:, chosen] @ pushes) / np.sqrt(own)
        gain[chosen] = -np.inf
        best = int(gain.argmax())
        if gain[best] <= 0:
            break
        chosen.append(best)
        pushes = _non_negative(gram[np.ix_(chosen, chosen)], candidates.effect[chosen])
    kept = [place for place, push in enumerate(pushes) if push > 0]
    pushes, chosen = pushes[kept], [chosen[place] for place in kept]
    rows = candidates.rows[:, chosen] @ pushes
    scale = np.sqrt(2) / max(float(np.linalg.norm(rows)), _RARE)
    return Designed(
        features=tuple(candidates.features[place] for place in chosen),
        pushes=tuple((scale * pushes).tolist()),
        effect=float(scale * pushes @ candidates.effect[chosen]),
    )


def dense(gradient: Gradient, sketch: Sketch, site: Site) -> tuple[Float[Tensor, "d_model"], float]:
    """The best vector of one site, scaled to 1 nat, and its predicted effect there."""
    rows = sketch.rows[:, sketch.sites.index(site)].double()
    fisher = rows.T @ rows
    ridge = fisher.trace() / len(fisher) * torch.eye(len(fisher), dtype=torch.double)
    vector = torch.linalg.solve(fisher + ridge, gradient[site].double())
    vector = vector * (2**0.5 / (rows @ vector).norm().clamp(min=_RARE))
    return vector.float(), float(vector @ gradient[site].double())


def fitted(
    gradient: Gradient,
    sketch: Sketch,
    directions: Sequence[Direction],
    *,
    shrinkage: float = SHRINKAGE,
) -> Float[np.ndarray, "direction"]:
    """The pushes, of either sign, that promise most together at 1 nat."""
    rows = torch.stack([sketch.through(site, u[None])[:, 0] for site, u in directions], dim=1)
    gram = (rows.T @ rows).double().numpy()
    effect = np.array([float(gradient[site] @ u) for site, u in directions])
    pushes = np.linalg.solve(gram + shrinkage * np.diag(gram.diagonal().clip(min=_RARE)), effect)
    return pushes * (2 / max(pushes @ gram @ pushes, _RARE)) ** 0.5


def learned(
    model: SteerableModel,
    batch: Batch,
    directions: Sequence[Direction],
    objective: Objective,
    start: Float[np.ndarray, "direction"],
    *,
    dose: float,
    n_steps: int = 8,
    rate: float = 0.4,
) -> Float[np.ndarray, "direction"]:
    """The pushes learned on with real passes: steps along the objective's gradient without what it
    has of the KL's, then back to the dose. Of those tried near the dose, the ones with most gain
    per √KL."""
    base, stream = _steered_by(model, batch, directions, torch.zeros(len(start)))
    base_value = float(objective(base.detach(), stream, batch))
    log_base = base.detach()[counted(batch)].float().log_softmax(-1)
    pushes = torch.tensor(np.asarray(start), dtype=torch.float32)
    unit = pushes.abs().mean()
    best, found = -np.inf, pushes
    for step in range(n_steps):
        pushes = pushes.detach().requires_grad_()
        logits, stream = _steered_by(model, batch, directions, pushes)
        value = objective(logits, stream, batch)
        steered = logits[counted(batch)].float().log_softmax(-1)
        kl = (steered.exp() * (steered - log_base)).sum(-1).mean()
        nats = max(float(kl.detach()), _RARE)
        (up,) = torch.autograd.grad(value, pushes, retain_graph=True)
        (dear,) = torch.autograd.grad(kl, pushes)
        gain = (float(value.detach()) - base_value) / nats**0.5
        if gain > best and abs(np.log(nats / dose)) < 0.4:
            best, found = gain, pushes.detach() * (dose / nats) ** 0.5
        along = up - (up @ dear) / (dear @ dear).clamp(min=_RARE**2) * dear
        size = rate * (1 - step / n_steps) * unit * len(start) ** 0.5
        pushes = pushes.detach() * (dose / nats) ** 0.5
        pushes = pushes + size * along / along.norm().clamp(min=_RARE)
    return found.double().numpy()


def shifts_of(directions: Sequence[Direction], pushes: Sequence[float] | np.ndarray) -> Gradient:
    """What is added at every site together."""
    found: Gradient = {}
    for (site, u), push in zip(directions, pushes, strict=True):
        found[site] = found.get(site, torch.zeros_like(u)) + float(push) * u
    return found


def as_plan(designed: Designed, norms: Mapping[Site, float], *, dose: float, **rest: Any) -> Plan:
    """The plan that adds the features, at the strength that should give the dose: shares of the
    strength in median norms of the sites."""
    shares = [
        push / norms[feature.site]
        for feature, push in zip(designed.features, designed.pushes, strict=True)
    ]
    nodes = tuple(
        Node(at=str(feature), weight=share / sum(shares), scale=norms[feature.site])
        for feature, share in zip(designed.features, shares, strict=True)
    )
    return Plan(nodes=nodes, strength=sum(shares) * dose**0.5, **rest)


def counted(batch: Batch) -> Bool[Tensor, "batch column"]:
    """The real tokens but the first of each row: those that are pushed, and predict."""
    return batch.real & (batch.positions() > 0)


def _steered_by(
    model: SteerableModel, batch: Batch, directions: Sequence[Direction], pushes: Tensor
) -> tuple[Float[Tensor, "batch column vocab"], Stream]:
    """Logits under pushes that have a gradient."""
    shifts: dict[Site, Tensor] = {}
    for (site, u), push in zip(directions, pushes, strict=True):
        shifts[site] = shifts.get(site, torch.zeros_like(u)) + push * u
    return _with_shifts(model, batch, shifts)


def _shifted(
    model: SteerableModel, batch: Batch, sites: Sequence[Site]
) -> tuple[dict[Site, Tensor], Float[Tensor, "batch column vocab"], dict[Site, Tensor]]:
    """(shifts of 0, one a row and site; logits; the stream at the sites), with a graph between."""
    n, device = len(batch.ids), batch.ids.device
    shifts = {
        site: torch.zeros(n, 1, model.d_model, device=device).requires_grad_()
        for site in sorted(sites)
    }
    return shifts, *_with_shifts(model, batch, shifts)


def _with_shifts(
    model: SteerableModel, batch: Batch, shifts: Mapping[Site, Tensor]
) -> tuple[Float[Tensor, "batch column vocab"], dict[Site, Tensor]]:
    """(logits, the stream at the sites) when shifts are added to every token but the first."""
    places, stream = counted(batch)[..., None], dict[Site, Tensor]()

    def shift(site: Site) -> Callable[[Tensor], Tensor]:
        def edit(h: Tensor) -> Tensor:
            stream[site] = h + (places * shifts[site].to(h.device)).to(h.dtype)
            return stream[site]

        return edit

    arguments = forward_arguments(model, mask=batch.real, positions=batch.positions())
    with torch.enable_grad(), model.edited({site: shift(site) for site in shifts}):
        logits = model.hf(input_ids=batch.ids, use_cache=False, **arguments).logits
    return logits, stream


def _unit_rows(sae: Dictionary) -> Float[Tensor, "latent d_model"]:
    rows = sae.W_dec.detach().float().cpu()
    return rows / rows.norm(dim=-1, keepdim=True).clamp(min=_RARE)


def _non_negative(gram: np.ndarray, effect: np.ndarray) -> np.ndarray:
    """argmin ½ w'Gw − e'w with w ≥ 0."""
    lower = np.linalg.cholesky(gram)
    return scipy.optimize.nnls(lower.T, scipy.linalg.solve_triangular(lower, effect, lower=True))[0]
