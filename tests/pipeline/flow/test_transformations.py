"""Planted over nine layers: births, deaths, rotations, splits, merges and recombinations, with
activations that follow them. Lives come out within a layer, and kinds are told apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from featureflow.sites import Site
from pipeline.flow.directions import directions_of
from pipeline.flow.functional import encode_tokens
from pipeline.flow.link import link_dictionaries
from pipeline.flow.options import LinkOptions
from pipeline.flow.transformations import MERGE, RECOMBINED, SPLIT, mixtures_of, transformations_of
from sae import Sae, TopKActivation

N_LAYERS, N, D, N_TOKENS, K = 9, 256, 192, 4000, 8
NOISE = 0.2
N_EACH = {"turned": 24, SPLIT: 8, MERGE: 8, RECOMBINED: 8, "born": 32}
"""How many features of each layer are made in each way; the rest is carried as it is."""


@dataclass
class Slot:
    """One feature at one layer: direction, tokens where it is active, where its life began, whether
    that life can be told (no mixture on the way), and the places of its parents."""

    row: Tensor
    active: np.ndarray
    birth: int
    plain: bool = True
    kind: str = "carried"
    parents: tuple[int, ...] = ()
    children: list[str] = field(default_factory=list)


class World:
    """Layers of slots, and SAEs that know them up to noise."""

    def __init__(self, seed: int = 0) -> None:
        self.torch = torch.Generator().manual_seed(seed)
        self.rng = np.random.default_rng(seed)
        self.layers = [[self.fresh(0) for _ in range(N)]]
        while len(self.layers) < N_LAYERS:
            self.layers.append(self.next_layer(len(self.layers)))
        self.saes = {Site(i, "resid_post"): self.sae(slots) for i, slots in enumerate(self.layers)}

    def direction(self) -> Tensor:
        return torch.nn.functional.normalize(torch.randn(D, generator=self.torch), dim=0)

    def tokens(self) -> np.ndarray:
        return self.rng.gamma(3.0, size=N_TOKENS) * (self.rng.random(N_TOKENS) < 0.02)

    def fresh(self, layer: int) -> Slot:
        return Slot(self.direction(), self.tokens(), layer, kind="born")

    def next_layer(self, layer: int) -> list[Slot]:
        before = self.layers[-1]
        order = self.rng.permutation(N).tolist()
        made: list[Slot] = []

        def take() -> tuple[int, Slot]:
            place = order.pop()
            return place, before[place]

        for _ in range(N_EACH["turned"]):
            i, old = take()
            row = 0.8 * old.row + 0.6 * self.direction()
            made.append(Slot(row, old.active, old.birth, old.plain, "turned", (i,)))
        for _ in range(N_EACH[SPLIT] // 2):
            i, old = take()
            aside = self.direction()
            half = self.rng.random(N_TOKENS) < 0.5
            for sign, part in ((0.7, half), (-0.7, ~half)):
                row = old.row + sign * aside
                made.append(Slot(row, old.active * part, layer, False, SPLIT, (i,)))
        for _ in range(N_EACH[MERGE]):
            (i, a), (j, b) = take(), take()
            made.append(Slot(a.row + b.row, a.active + b.active, layer, False, MERGE, (i, j)))
        for _ in range(N_EACH[RECOMBINED] // 2):
            (i, a), (j, b) = take(), take()
            for x in (1, -1):  # the plane of the two, turned by 45 degrees
                active = np.maximum(x * a.active + b.active, 0)
                row = x * a.row + b.row
                made.append(Slot(row, active, layer, False, RECOMBINED, (i, j)))
        made += [self.fresh(layer) for _ in range(N_EACH["born"])]
        while len(made) < N:
            i, old = take()
            made.append(Slot(old.row, old.active, old.birth, old.plain, "carried", (i,)))
        for slot in made:
            slot.row = torch.nn.functional.normalize(slot.row, dim=0)
            for parent in slot.parents:
                before[parent].children.append(slot.kind)
        return [made[i] for i in self.rng.permutation(N)]

    def sae(self, slots: list[Slot]) -> Sae:
        rows = torch.stack([slot.row + NOISE * self.direction() for slot in slots])
        rows = torch.nn.functional.normalize(rows, dim=1)
        zeros = torch.zeros(D)
        return Sae(
            W_enc=rows,
            b_enc=torch.zeros(N),
            W_dec=rows,
            b_dec=zeros,
            b_in=zeros,
            activation=TopKActivation(k=K),
        )

    def held_out(self, site: Site) -> Iterator[Tensor]:
        slots = self.layers[site.layer]
        strength = np.stack([slot.active for slot in slots], axis=1).astype(np.float32)
        yield torch.from_numpy(strength) @ torch.stack([slot.row for slot in slots])

    def deaths(self) -> list[list[int]]:
        """The last layer of every slot whose end can be told: the one before nothing is made of
        it; −1 where it ends in a mixture."""
        last = [[N_LAYERS - 1] * N]
        for layer in range(N_LAYERS - 2, -1, -1):
            here = [layer] * N
            for place, slot in enumerate(self.layers[layer + 1]):
                if slot.kind in ("carried", "turned"):
                    here[slot.parents[0]] = last[0][place]
                else:
                    for parent in slot.parents:
                        here[parent] = -1
            last.insert(0, here)
        return last


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_births_and_deaths_are_within_a_layer(world: World) -> None:
    links = link_dictionaries(world.saes, held_out=world.held_out, options=LinkOptions(n_null=2048))
    nodes = links.nodes.set_index(["layer", "latent"])
    deaths = world.deaths()
    right = {"birth": [], "death": []}
    for layer, slots in enumerate(world.layers):
        for latent, slot in enumerate(slots):
            found = nodes.loc[(layer, latent)]
            if slot.plain:
                right["birth"].append(abs(found["birth_layer"] - slot.birth) <= 1)
            if deaths[layer][latent] >= 0:
                right["death"].append(abs(found["death_layer"] - deaths[layer][latent]) <= 1)
    assert len(right["birth"]) > 1000
    assert len(right["death"]) > 1000
    assert np.mean(right["birth"]) >= 0.9
    assert np.mean(right["death"]) >= 0.9


@pytest.mark.parametrize("with_tokens", [False, True])
def test_kinds_are_told_apart(world: World, with_tokens: bool) -> None:
    kinds = (SPLIT, MERGE, RECOMBINED)
    hits = dict.fromkeys(kinds, 0)
    planted, false, n_found, n_explained = dict.fromkeys(kinds, 0), 0, 0, []
    for layer in range(1, 5):
        sites = [Site(layer - 1, "resid_post"), Site(layer, "resid_post")]
        source, target = (directions_of(world.saes[site].W_dec, name=site.short) for site in sites)
        codes = [encode_tokens(world.saes[site], world.held_out(site)) for site in sites]
        backward = mixtures_of(target, source, codes=(codes[1], codes[0]) if with_tokens else None)
        forward = mixtures_of(source, target, codes=(codes[0], codes[1]) if with_tokens else None)
        found = transformations_of(backward, forward)
        for latent, slot in enumerate(world.layers[layer]):
            rows = found[found["target_latent"] == latent]
            n_found += len(rows)
            false += int((~rows["source_latent"].isin(slot.parents)).sum())
            if slot.kind in kinds:
                planted[slot.kind] += 1
                hits[slot.kind] += bool((rows["kind"] == slot.kind).any())
                if slot.kind == MERGE and len(rows):
                    n_explained.append(rows["explained_share"].iloc[0])
    for kind in kinds:
        assert hits[kind] / planted[kind] >= 0.85, (kind, hits, planted)
    assert false / n_found <= 0.1
    assert np.median(n_explained) > 0.8, "two rows, each known up to noise"


def test_nothing_is_a_mixture_of_unrelated_rows() -> None:
    generator = torch.Generator().manual_seed(5)
    sides = [torch.randn(300, 128, generator=generator) for _ in range(2)]
    left, right = (directions_of(rows, name="random") for rows in sides)
    found = transformations_of(mixtures_of(left, right), mixtures_of(right, left))
    assert len(found) <= 3
