"""Codebook dictionaries: k codes of one strength, chosen by the inner product, trained straight
through the choice."""

from __future__ import annotations

from pathlib import Path

import torch

from sae import load_sae, save_sae
from sae.architectures import Codebook
from sae.architectures.codebook import Codes
from sae.batches import Batch, InMemoryBatches
from sae.normalisation import normalisation_of_rows
from sae.schedule import schedule_of
from sae.step import Situation
from sae.trainer import Trainer, random_start, train

N_CODES, D, K = 24, 32, 3


def planted(n_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of three of 24 orthonormal-ish codes, and which."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.linalg.qr(torch.randn(D, N_CODES, generator=generator)).Q.T * 2.0
    which = torch.rand(n_rows, N_CODES, generator=generator).topk(K, dim=1).indices
    return codes[which].sum(1), which


def test_k_codes_are_on_with_one_strength() -> None:
    pre = torch.tensor([[3.0, -1.0, 2.0, 0.5], [-4.0, -3.0, -2.0, -1.0]])
    codes = Codes(k=2, size=torch.full((4,), 1.5))
    assert codes(pre).tolist() == [[1.5, 0, 1.5, 0], [0, 0, 1.5, 1.5]]
    assert codes.scaled(2.0)(pre).max() == 3.0


def test_the_gradient_goes_straight_through_the_choice() -> None:
    x, _ = planted(40)
    weights = random_start(N_CODES, D, seed=1) | {"log_scale": torch.zeros(1)}
    now = Situation(progress=0.5, dead=torch.zeros(N_CODES, dtype=torch.bool))
    found = Codebook(k=K).gradients(weights, x, None, now)
    on = torch.zeros(40, N_CODES)
    for row, pre in enumerate(x @ weights["W_enc"].T):
        on[row, pre.argsort(descending=True)[:K]] = 1.0
    scale = (D / K) ** 0.5
    slope = 2 * (scale * on @ weights["W_dec"] - x) / x.numel()
    at_z = (slope @ weights["W_dec"].T) * on
    assert torch.allclose(found.gradients["W_dec"], scale * on.T @ slope, atol=1e-6)
    assert torch.allclose(found.gradients["W_enc"], at_z.T @ x, atol=1e-6)
    assert torch.allclose(found.gradients["log_scale"], scale * at_z.sum()[None], atol=1e-5)
    assert not found.gradients["b_enc"].any()


def test_planted_codes_are_found_and_survive_a_file(tmp_path: Path) -> None:
    x, which = planted(4096)
    codebook = Codebook(k=K)
    trainer = Trainer(
        architecture=codebook,
        schedule=schedule_of(steps=500, learning_rate=3e-3, batch_size=256),
        weights=codebook.prepared(random_start(N_CODES, D, seed=2)),
        source=normalisation_of_rows(x),
    )
    train(trainer, InMemoryBatches(x, batch_size=256, seed=0))
    sae = trainer.finish(Batch(x=x), {})
    save_sae(sae, tmp_path)
    again = load_sae(tmp_path)
    z = again.encode(x)
    assert torch.equal(z, sae.encode(x))
    assert ((z > 0).sum(1) == K).all()
    assert z[z > 0].max() - z[z > 0].min() < 1e-5, "one scale for the site"
    error = (again(x) - x).square().sum() / (x - x.mean(0)).square().sum()
    assert error < 0.25
    truth = torch.zeros(len(x), N_CODES).scatter_(1, which, 1.0)
    hits = truth.T @ (z > 0).float()
    f1 = 2 * hits / (truth.sum(0)[:, None] + (z > 0).sum(0))
    assert f1.max(1).values.mean() > 0.85


def test_what_cannot_be_is_told() -> None:
    assert Codebook(k=9).problems(8) == ["k = 9 of 8 latents"]
