"""The GPU kernels against the CPU's, on the same inputs; skipped where there is no GPU with
Triton."""

from __future__ import annotations

import pytest
import torch

from sae.architectures import BatchTopK, MatryoshkaBatchTopK, TopK
from sae.kernels import gpu
from sae.step import Situation
from sae.trainer import random_start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not gpu.is_available(), reason="no CUDA device with Triton"),
]


@pytest.mark.parametrize(
    "architecture",
    [TopK(k=8), BatchTopK(k=8), MatryoshkaBatchTopK(k=8)],
    ids=lambda choice: choice.kind,
)
@pytest.mark.parametrize("d", [64, 100, 576])
def test_a_step_on_the_gpu_is_a_step_on_the_cpu(
    architecture: TopK | BatchTopK | MatryoshkaBatchTopK, d: int
) -> None:
    weights = random_start(512, d, seed=0)
    x = torch.randn(300, d, generator=torch.Generator().manual_seed(1))
    dead = torch.arange(512) % 50 == 0
    here = architecture.gradients(weights, x, None, Situation(progress=0.0, dead=dead))
    there = architecture.gradients(
        {name: weight.cuda() for name, weight in weights.items()},
        x.cuda(),
        None,
        Situation(progress=0.0, dead=dead.cuda()),
    )
    torch.testing.assert_close(there.loss.cpu(), here.loss, rtol=1e-4, atol=1e-5)
    assert torch.equal(there.fired.cpu(), here.fired)
    for name, gradient in here.gradients.items():
        torch.testing.assert_close(
            there.gradients[name].cpu(), gradient, rtol=1e-3, atol=1e-6, msg=name
        )


def test_the_same_bits_every_time() -> None:
    weights = {name: weight.cuda() for name, weight in random_start(256, 64, seed=0).items()}
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(1)).cuda()
    now = Situation(progress=0.0, dead=torch.zeros(256, dtype=torch.bool, device="cuda"))
    first, second = (TopK(k=8).gradients(weights, x, None, now).gradients for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
