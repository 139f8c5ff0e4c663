"""Dictionaries really trained from a common start: features born at a layer must still come out as
newborn.

Two layers of planted activations: 60 directions are carried, 20 die, 26 are born (and lie in the
MLP's output; with fewer than about 20 the judge of partners keeps nothing at 5 %). The null that
knows nothing of starts takes what inertia leaves for flow; the null trained from the same start
does not.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from featureflow.sites import Site
from pipeline.flow.link import link_dictionaries
from pipeline.flow.options import LinkOptions, Rotation
from pipeline.flow.start_null import Recipe, plan_nulls, pooled, rotated_activations, start_sample
from sae.architectures import TopK
from sae.batches import Batch, InMemoryBatches
from sae.normalisation import normalisation_of_rows, unfold
from sae.schedule import schedule_of
from sae.trainer import Trainer, random_start, train

BEFORE, AFTER, MLP = Site(0, "resid_post"), Site(1, "resid_post"), Site(1, "mlp_out")
D, N_CARRIED, N_DIED, N_BORN, N_LATENTS, K, N_TRAIN = 48, 60, 20, 26, 112, 3, 12_000
RATE = 3e-3


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Activations at the three sites, and the directions in them."""

    rows: dict
    carried: torch.Tensor
    born: torch.Tensor

    def normalisations(self) -> dict:
        return {site: normalisation_of_rows(rows[:N_TRAIN]) for site, rows in self.rows.items()}

    def held_out(self, site):
        return self.rows[site][N_TRAIN:].split(1000)


@pytest.fixture(scope="module")
def world() -> World:
    generator = torch.Generator().manual_seed(0)

    def directions(n):
        return torch.nn.functional.normalize(torch.randn(n, D, generator=generator), dim=1)

    def latents(n):
        on = torch.rand(N_TRAIN + 4000, n, generator=generator) < K / (N_CARRIED + N_DIED)
        return on * (0.5 + torch.rand(on.shape, generator=generator))

    def noise(scale):
        return scale * torch.randn(N_TRAIN + 4000, D, generator=generator)

    carried, died, born = directions(N_CARRIED), directions(N_DIED), directions(N_BORN)
    kept, module = latents(N_CARRIED), latents(N_BORN) @ born
    rows = {
        BEFORE: kept @ carried + latents(N_DIED) @ died + noise(0.05),
        MLP: module + noise(0.02),
        AFTER: kept @ carried + module + noise(0.05),
    }
    return World(rows=rows, carried=carried, born=born)


def fit(world, site, weights, *, steps, kind, parent=None, group="one start", seed=5):
    schedule = schedule_of(steps=steps, learning_rate=RATE, batch_size=256)
    trainer = Trainer(
        architecture=TopK(k=K),
        schedule=schedule,
        weights=weights,
        source=world.normalisations()[site],
    )
    train(trainer, InMemoryBatches(world.rows[site][:N_TRAIN], batch_size=256, seed=seed))
    metadata = {
        "site": site.name,
        "architecture": TopK(k=K).model_dump(),
        "initialisation": {
            "kind": kind,
            "group": group,
            "parent": parent and parent.short,
            "seed": seed,
        },
        "schedule": dataclasses.asdict(schedule),
        "batch_size": 256,
    }
    return trainer.finish(Batch(x=world.rows[site][N_TRAIN:]), metadata)


def train_all(world, start, *, steps, next_steps):
    before = fit(world, BEFORE, random_start(N_LATENTS, D, seed=5), steps=steps, kind=start)
    if start == "shared":
        after = fit(world, AFTER, random_start(N_LATENTS, D, seed=5), steps=steps, kind="shared")
    else:
        weights = unfold(before, world.normalisations()[BEFORE])
        after = fit(world, AFTER, weights, steps=next_steps, kind="chain", parent=BEFORE)
    module = fit(
        world,
        MLP,
        random_start(32, D, seed=9),
        steps=200,
        kind="independent",
        group="another",
        seed=9,
    )
    return {BEFORE: before, AFTER: after, MLP: module}


@pytest.fixture(scope="module", params=["shared", "chain"])
def trained(world, request):
    return train_all(world, request.param, steps=400, next_steps=200)


def nulls_of(world, dictionaries):
    plans = plan_nulls(dictionaries, 1)
    assert [plan.pair.relation for plan in plans] == ["residual"], (
        "the MLP's dictionary has a start of its own"
    )
    rows = world.rows[plans[0].moved][:N_TRAIN]
    return pooled(
        [("residual", start_sample(plans[0], dictionaries, rows, world.normalisations(), seed=3))]
    )


def slots(dictionaries, directions) -> np.ndarray:
    """Latents after the layer whose row is one of `directions`."""
    return np.flatnonzero((dictionaries[AFTER].W_dec @ directions.T).amax(1).numpy() > 0.85)


def test_newborn_features_stay_newborn_and_carried_ones_are_carried(world, trained):
    nulls = nulls_of(world, trained)
    links = link_dictionaries(
        trained, options=LinkOptions(n_null=4096), held_out=world.held_out, start_nulls=nulls
    )
    assert "same start" in str(
        links.pairs.loc[links.pairs["relation"] == "residual", "null"].iloc[0]
    )
    after = links.nodes[(links.nodes["site"] == "L1")].reset_index(drop=True)
    born, carried = slots(trained, world.born), slots(trained, world.carried)
    assert len(born) >= 10
    assert len(carried) >= 40
    newborn = after.loc[born][after.loc[born, "alive"]]
    assert (newborn["class"] == "newborn").mean() >= 0.95
    flowing = after.loc[carried][after.loc[carried, "alive"]]
    assert flowing["class"].isin(["translated", "processed"]).mean() >= 0.95


@pytest.mark.parametrize("start", ["shared", "chain"])
def test_inertia_alone_reaches_above_the_null_that_knows_nothing_of_starts(world, start):
    trained = train_all(world, start, steps=100, next_steps=50)  # brief, or the start is forgotten
    inertia = nulls_of(world, trained)["residual"]
    links = link_dictionaries(trained, options=LinkOptions(null=Rotation(), n_null=4096))
    rotation = links.pairs.loc[links.pairs["relation"] == "residual", "null_p99"].iloc[0]
    assert inertia.quantile(0.99) > rotation + 0.03


def test_what_was_learnt_from_metadata(trained):
    recipe = Recipe.of(trained[AFTER].metadata)
    assert (recipe.architecture, recipe.batch_size) == (TopK(k=K), 256)
    assert recipe.schedule == schedule_of(
        steps=recipe.schedule.steps, learning_rate=RATE, batch_size=256
    )
    older = {name: value for name, value in trained[AFTER].metadata.items() if name != "schedule"}
    schedule = Recipe.of({**older, "steps": 200, "learning_rate": RATE}).schedule
    assert (schedule.steps, schedule.beta1, schedule.beta2, schedule.dead_after) == (
        200,
        0.9,
        0.999,
        30 * 256,
    )
    assert Recipe.of(older) is None
    start = trained[AFTER].metadata["initialisation"]
    damages = (
        {"schedule": {"steps": "many"}},
        {"schedule": {"speed": 1}},
        {"initialisation": {**start, "parent": 5}},
    )
    for damage in damages:
        assert Recipe.of({**trained[AFTER].metadata, **damage}) is None, damage
    assert Recipe.of({"site": "blocks.1.hook_resid_post"}) is None
    assert Recipe.of({**trained[AFTER].metadata, "architecture": {"kind": "unheard of"}}) is None


def test_rotated_activations_keep_their_spectrum_and_nothing_else():
    rows = torch.randn(3000, 32, generator=torch.Generator().manual_seed(0)) * torch.linspace(
        3, 0.1, 32
    )
    turned = rotated_activations(rows, torch.Generator().manual_seed(1))
    before, after = torch.linalg.svdvals(rows), torch.linalg.svdvals(turned)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-2)
    cosines = torch.nn.functional.cosine_similarity(rows, turned)
    assert cosines.mean() < 0.4
