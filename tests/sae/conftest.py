"""The numbers of a small dictionary, with decoder rows of unequal length."""

from __future__ import annotations

import pytest
import torch

from tests.sae.foreign_files import TOKENS, D, N, numbers


@pytest.fixture
def parts():
    """Tensors of a dictionary as stored by most peers, [in, out], with rows of unequal length."""
    return {
        "W_enc": numbers(D, N, seed=1),
        "b_enc": numbers(N, seed=2, scale=0.3),
        "W_dec": numbers(N, D, seed=3) * torch.linspace(0.4, 2.5, N)[:, None],
        "b_dec": numbers(D, seed=4),
        "x": numbers(TOKENS, D, seed=5) + numbers(D, seed=6),
        "theta": numbers(N, seed=7).abs() * 0.8,
    }
