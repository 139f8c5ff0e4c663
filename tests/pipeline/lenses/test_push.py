"""Gradients against finite differences, and the Jacobian of the last layer against itself."""

from __future__ import annotations

import torch

from featureflow.sites import parse_site
from pipeline.lenses import push, translators
from pipeline.lenses.base import run_lens
from pipeline.lenses.parts.gradients import gradients, gradients_between
from pipeline.run import Run

L0, L1, L2, L3 = (parse_site(f"L{layer}") for layer in range(4))


def test_gradients_are_finite_differences(run: Run) -> None:
    model = run.exact_model
    ids = torch.arange(3, 15)[None]
    seen, found = gradients(model, ids, [L1, L3], lambda logits, _: logits[0, -1, 5])
    direction = torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
    for site in (L1, L3):

        def at(eps: float, site=site) -> float:
            def edit(h: torch.Tensor) -> torch.Tensor:
                h = h.clone()
                h[0, -1] += eps * direction
                return h

            with model.edited({site: edit}):
                return float(model.logits(ids)[0, -1, 5])

        slope = (at(1e-2) - at(-1e-2)) / 2e-2
        torch.testing.assert_close(
            float(found[site][0, -1] @ direction), slope, rtol=0.02, atol=1e-3
        )
    torch.testing.assert_close(seen[L1], model.activations(ids, [L1])[L1])
    assert (
        next(model.hf.parameters()).requires_grad == next(run.model.hf.parameters()).requires_grad
    )


def test_a_gradient_between_two_sites_is_that_of_the_whole_pass(run: Run) -> None:
    model, ids = run.exact_model, torch.arange(3, 15)[None]
    along = torch.randn(model.d_model, generator=torch.Generator().manual_seed(1))
    _, whole = gradients(model, ids, [L1, L2], lambda _, stream: stream[L2][0, -1] @ along)
    h = model.activations(ids, [L1])[L1]
    part = gradients_between(model, h, L1, L2, lambda value: value[0, -1] @ along)
    torch.testing.assert_close(part, whole[L1], rtol=1e-4, atol=1e-5)


def test_the_jacobian_of_the_last_layer_is_the_identity(run: Run) -> None:
    found = push.jacobians(run, [L0, L3], push.Config(n_jacobian_tokens=512))
    torch.testing.assert_close(found[L3], torch.eye(len(found[L3])), atol=0.02, rtol=0)
    assert float((found[L0] - torch.eye(len(found[L0]))).norm()) > 0.3


def test_carried_tokens_are_raised_and_another_features_are_not(run: Run) -> None:
    run_lens("translators", run, translators.Config(n_tokens=3000, n_held_out=600))
    table = push.look(run, push.Config(n_layers=1, n_features=8, n_contexts=2)).tables["summary"]
    raised = table.set_index("way")["raised"]
    assert (raised[["direct", "carried", "jacobian"]] > raised["permuted"] + 0.2).all()
