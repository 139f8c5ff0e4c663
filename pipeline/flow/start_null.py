"""What inertia alone leaves between dictionaries of one start: a dictionary that left the same
start for other data.

Two dictionaries trained from a common start may look alike because neither moved far. To know how
alike, for a pair:

1. Take the activations that the younger of the two was trained on, and turn them by a random
   rotation inside their own eigenbasis: mean and spectrum stay, no feature does.
2. Train from the younger one's start, for its number of steps, at its rate, on those.
3. The best cosines between the result's living latents and the older dictionary are the null of the
   pair.

One such null stands for all same-start pairs of its relation. A prototype on SmolLM2-135M (a shared
start, 400 steps) found a median of 0.41 and a 99th percentile of 0.62, where rotated decoders give
0.21 and 0.29: without this null, standing still would count as flow. Cost: one more training of one
site for each null.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import TypeAdapter
from torch import Tensor

from featureflow.errors import UserError
from featureflow.progress import Progress, silent
from featureflow.sites import Site, parse_site
from pipeline.flow.directions import directions_of
from pipeline.flow.match import best_cosines
from pipeline.flow.null import NullSample, Spectrum, rotated_within
from pipeline.flow.pairing import Pair, Relation, pair_sites, start_relation
from pipeline.flow.sources import facts_of
from sae import Sae
from sae.architectures import AnyArchitecture, Architecture
from sae.batches import InMemoryBatches
from sae.normalisation import Normalisation, unfold
from sae.schedule import Schedule
from sae.step import Precision
from sae.trainer import Trainer, random_start, train

_ROTATED_TOGETHER = 16


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a dictionary was trained, as its metadata says it."""

    architecture: Architecture
    schedule: Schedule
    batch_size: int
    seed: int
    parent: Site | None
    precision: Precision = "float32"

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> Recipe | None:
        """None where the metadata does not tell (a dictionary trained elsewhere)."""
        try:
            start = metadata["initialisation"]
            return cls(
                architecture=TypeAdapter(AnyArchitecture).validate_python(metadata["architecture"]),
                schedule=_schedule(metadata),
                batch_size=int(metadata["batch_size"]),
                seed=int(start["seed"]),
                parent=None if start["parent"] is None else parse_site(start["parent"]),
                precision=metadata.get("precision", "float32"),
            )
        except (KeyError, TypeError, ValueError, AttributeError, UserError):
            return None


def _schedule(metadata: Mapping[str, Any]) -> Schedule:
    """The one it was trained by. Older dictionaries name rate and steps only; the rest was what is
    written here."""
    if "schedule" in metadata:
        kinds = {field.name: int if field.type == "int" else float for field in fields(Schedule)}
        values: dict[str, Any] = {
            name: kinds[name](value) for name, value in metadata["schedule"].items()
        }
        return Schedule(**values)
    steps, batch_size = int(metadata["steps"]), int(metadata["batch_size"])
    return Schedule(
        steps=steps,
        learning_rate=float(metadata["learning_rate"]),
        warmup_steps=min(50, steps // 2),
        beta1=0.9,
        beta2=0.999,
        dead_after=max(30, steps // 50) * batch_size,
    )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A null to be trained: retrain `moved` from `start` (None: its random start), compare with
    `fixed`."""

    pair: Pair
    moved: Site
    fixed: Site
    start: Site | None
    recipe: Recipe


def plan_nulls(dictionaries: Mapping[Site, Sae], n_per_relation: int) -> list[Plan]:
    """Which same-start pairs get a null of their own: `n_per_relation`, spread over the depth."""
    plans: dict[Relation, list[Plan]] = {}
    facts = facts_of(dictionaries)
    for pair in pair_sites(dictionaries).pairs:
        plan = _plan_of(pair, facts)
        if plan is not None:
            plans.setdefault(pair.relation, []).append(plan)
    return [
        found[int((place + 0.5) * len(found) / n)]
        for found in plans.values()
        for n in [min(n_per_relation, len(found))]
        for place in range(n)
    ]


def pooled(samples: list[tuple[Relation, NullSample]]) -> dict[Relation, NullSample]:
    """One null a relation, of all samples drawn for it."""
    found: dict[Relation, list[NullSample]] = {}
    for relation, sample in samples:
        found.setdefault(relation, []).append(sample)
    return {
        relation: NullSample(
            name=" and ".join(sample.name for sample in group),
            best_cosine=np.concatenate([sample.best_cosine for sample in group]),
            of_start=True,
        )
        for relation, group in found.items()
    }


def start_sample(
    plan: Plan,
    dictionaries: Mapping[Site, Sae],
    rows: Float[Tensor, "row d_model"],
    normalisations: Mapping[Site, Normalisation],
    *,
    seed: int,
    device: str = "cpu",
    progress: Progress = silent,
) -> NullSample:
    """Train the null of a plan on `rows`, activations at `plan.moved` (raw), and draw its best
    cosines."""
    fixed = directions_of(dictionaries[plan.fixed].W_dec, name=plan.fixed.short, device=device)
    weights = _start(plan, dictionaries, normalisations, rows.shape[1])
    generator = torch.Generator().manual_seed(seed)
    turned = rotated_activations(normalisations[plan.moved].apply(rows), generator)
    decoder, alive = _trained(
        plan.recipe, weights, turned.to(device), progress, f"null {plan.pair}"
    )
    found = directions_of(decoder, name=plan.moved.short, device=device)
    best = best_cosines(found.unit[found.usable & alive.to(found.usable.device)], fixed)
    name = f"same start ({plan.moved.short} on rotated activations)"
    return NullSample(name=name, best_cosine=best.cpu().numpy(), of_start=True)


def rotated_activations(
    rows: Float[Tensor, "row d_model"], generator: torch.Generator
) -> Float[Tensor, "row d_model"]:
    """All rows under one random rotation that keeps their spectrum."""
    moment = (rows.T @ rows / max(len(rows), 1)).cpu().numpy()
    basis = torch.from_numpy(np.linalg.eigh(moment)[1]).to(rows).flip(1)
    spectrum = Spectrum(mean=torch.zeros(rows.shape[1]).to(rows), basis=basis)
    return rotated_within(rows, spectrum, _ROTATED_TOGETHER, generator)


def _plan_of(pair: Pair, facts: Mapping[Site, Mapping[str, Any]]) -> Plan | None:
    if start_relation(facts[pair.source], facts[pair.target]) != "same_start":
        return None
    source, target = Recipe.of(facts[pair.source]), Recipe.of(facts[pair.target])
    if target is not None and target.parent in (pair.source, None):
        return Plan(
            pair=pair, moved=pair.target, fixed=pair.source, start=target.parent, recipe=target
        )
    if source is not None and source.parent in (pair.target, None):
        return Plan(
            pair=pair, moved=pair.source, fixed=pair.target, start=source.parent, recipe=source
        )
    return None


def _start(
    plan: Plan,
    dictionaries: Mapping[Site, Sae],
    normalisations: Mapping[Site, Normalisation],
    width: int,
) -> dict[str, Tensor]:
    if plan.start is not None:
        return unfold(dictionaries[plan.start], normalisations[plan.start])
    n_latents = dictionaries[plan.moved].n_latents
    return plan.recipe.architecture.prepared(random_start(n_latents, width, seed=plan.recipe.seed))


def _trained(
    recipe: Recipe,
    weights: dict[str, Tensor],
    rows: Float[Tensor, "row d_model"],
    progress: Progress,
    label: str,
) -> tuple[Float[Tensor, "latent d_model"], Tensor]:
    """Decoder rows after training, and which latents were active lately."""
    batch_size = min(recipe.batch_size, len(rows))
    trainer = Trainer(
        architecture=recipe.architecture,
        schedule=recipe.schedule,
        weights={name: weight.to(rows.device) for name, weight in weights.items()},
        source=Normalisation(mean=torch.zeros(rows.shape[1]).to(rows), scale=1.0),
        precision=recipe.precision,
    )
    batches = InMemoryBatches(rows, batch_size=batch_size, seed=recipe.seed)
    train(trainer, batches, each_step=lambda step: progress(label, step, recipe.schedule.steps))
    return trainer.weights["W_dec"], trainer.silent_for < trainer.schedule.dead_after
