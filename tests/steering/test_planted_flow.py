"""A toy whose truth is planted: one feature carried from layer to layer in a new direction each
time, halved on the way.

At layer l the feature lies along its own random direction d_l; each block reads h·d_l, halves it
and writes it along d_(l+1). So a push of size p at layer l arrives at the last layer L as p ·
0.5^(L−l), and what the arms must do is arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from featureflow.sites import FeatureId, Site
from sae import Relu, Sae
from steering.arms import Flow, Scales, along_flow, copied, single
from steering.dose import persistence
from steering.edits import Cap, Floor
from steering.hooks import applied
from steering.plan import Plan

N_LAYERS, WIDTH, GAIN = 5, 64, 0.5
SITES = [Site(layer, "resid_post") for layer in range(N_LAYERS)]


class _Block(nn.Module):
    """Halves the feature and turns it from one direction to the next; leaves the rest of the stream
    alone."""

    def __init__(self, here: Tensor, there: Tensor) -> None:
        super().__init__()
        self.here, self.there = here, there

    def forward(self, h: Tensor) -> Tensor:
        a = (h @ self.here)[..., None]
        return h - a * self.here + GAIN * a * self.there


class _Base(nn.Module):
    def __init__(self, directions: Tensor, start: Tensor) -> None:
        super().__init__()
        self.start = nn.Parameter(start, requires_grad=False)
        first = [nn.Identity()]
        self.layers = nn.ModuleList(
            first + [_Block(directions[k], directions[k + 1]) for k in range(N_LAYERS - 1)]
        )

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.start[input_ids]
        for layer in self.layers:
            h = layer(h)
        return h


class Toy:
    """Satisfies `SteerableModel` as far as a forward pass goes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
        self.directions = basis[:N_LAYERS]
        rest = torch.randn(7, WIDTH - N_LAYERS, generator=generator) @ basis[N_LAYERS:]
        self.base = _Base(
            self.directions, rest + 0.25 * torch.arange(7.0)[:, None] * self.directions[0]
        )
        self.hf = SimpleNamespace(base_model=self.base, parameters=self.base.parameters)
        self.d_model, self.fingerprint = WIDTH, "toy"

    def sites(self) -> tuple[Site, ...]:
        return tuple(SITES)

    @contextmanager
    def edited(self, edits: Mapping[Site, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        with ExitStack() as stack:
            for site, edit in edits.items():
                layer = self.base.layers[site.layer]
                handle = layer.register_forward_hook(
                    lambda module, inputs, out, edit=edit: edit(out)
                )
                stack.callback(handle.remove)
            yield

    def final(self, plan: Plan | None, saes: Mapping[Site, Sae]) -> Tensor:
        """The feature at the last layer, for five tokens of different natural strength."""
        ids = torch.tensor([[0, 1, 2, 4, 6]])
        if plan is None:
            return (self.base(ids) @ self.directions[-1])[0]
        with applied(self, saes, plan):
            return (self.base(ids) @ self.directions[-1])[0]


@pytest.fixture(scope="module")
def toy() -> Toy:
    return Toy()


@pytest.fixture(scope="module")
def saes(toy: Toy) -> dict[Site, Sae]:
    rows = {site: toy.directions[site.layer : site.layer + 1] for site in SITES}
    return {
        site: Sae(
            W_enc=row.clone(),
            b_enc=torch.zeros(1),
            W_dec=row,
            b_dec=torch.zeros(WIDTH),
            b_in=torch.zeros(WIDTH),
            activation=Relu(),
        )
        for site, row in rows.items()
    }


FLOW = Flow(
    seed=FeatureId(SITES[1], 0), steps=tuple((FeatureId(site, 0), 1.0) for site in SITES[1:])
)
SCALES = Scales(
    norms=dict.fromkeys(SITES, 1.0), activations={feature: 1.0 for feature, _ in FLOW.steps}
)
LEVEL = 2.0


def everywhere(plan: Plan) -> Plan:
    from dataclasses import replace

    return replace(plan, skip_first=0)


def test_the_closed_loop_reaches_its_level_at_every_token_and_overshoots_at_none(toy, saes):
    plan = everywhere(along_flow(FLOW, SCALES, edit=Floor(), strength=LEVEL))
    torch.testing.assert_close(toy.final(plan, saes), torch.full((5,), LEVEL))


def test_a_single_layer_with_the_same_level_falls_short(toy, saes):
    one = Flow(seed=FLOW.seed, steps=FLOW.steps[:1])
    plan = everywhere(along_flow(one, SCALES, edit=Floor(), strength=LEVEL))
    torch.testing.assert_close(
        toy.final(plan, saes), torch.full((5,), LEVEL * GAIN ** (N_LAYERS - 2))
    )


def test_pushes_along_the_flow_arrive_as_the_geometric_sum(toy, saes):
    """Open loop: every layer adds its share on top of what arrives; the sum is known."""
    budget = 4.0
    plan = everywhere(along_flow(FLOW, SCALES, strength=budget))
    arrived = sum(budget / 4 * GAIN**k for k in range(4))
    torch.testing.assert_close(
        toy.final(plan, saes) - toy.final(None, saes), torch.full((5,), arrived)
    )
    lone = everywhere(single(FLOW, SCALES, strength=budget))
    torch.testing.assert_close(
        toy.final(lone, saes) - toy.final(None, saes), torch.full((5,), budget * GAIN**3)
    )


def test_the_seeds_vector_copied_to_all_layers_misses_the_later_ones(toy, saes):
    plan = everywhere(copied(FLOW, SCALES, strength=4.0))
    torch.testing.assert_close(
        toy.final(plan, saes) - toy.final(None, saes), torch.full((5,), 1.0 * GAIN**3)
    )


def test_the_cap_along_the_flow_leaves_nothing(toy, saes):
    assert toy.final(None, saes).max() > 0.05
    plan = everywhere(along_flow(FLOW, SCALES, edit=Cap(), strength=1.0))
    assert toy.final(plan, saes).abs().max() < 1e-6


def test_persistence_is_how_much_more_arrives(toy, saes):
    one = Flow(seed=FLOW.seed, steps=FLOW.steps[:2])
    plan = everywhere(along_flow(one, SCALES, strength=2.0))
    reports = []
    for strength in (0.0, 2.0):
        with applied(toy, saes, plan.with_strength(strength), monitor=True) as run:
            toy.base(torch.tensor([[1, 2, 4, 6]]))
        reports.append(run.report())
    natural = 0.25 * 13 / 4 * GAIN**2
    expected = (natural + 1.0 * GAIN) / natural
    assert persistence(reports[1], reports[0]) == pytest.approx(expected, rel=1e-5)
