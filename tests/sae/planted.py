"""Data with a known dictionary: sparse, positive combinations of unit directions, plus a mean and a
little noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NOT_A_START = 7_919
"""Keeps the directions apart from `random_start`, which with the same seed would begin at the very
answer."""


@dataclass(frozen=True, kw_only=True)
class Planted:
    directions: Tensor
    x: Tensor


def planted(
    *,
    n_directions: int,
    d: int,
    n_active: int,
    n_rows: int,
    seed: int = 0,
    noise: float = 0.01,
    inseparable: bool = False,
) -> Planted:
    """Each row is a mean plus exactly `n_active` directions with strengths between 0.5 and 1.5.
    `inseparable`: those of them with an even number, each with its neighbour (0 and 1, 2 and 3, …)
    at the same strength, so that the rows are also those of a dictionary of the pairs' sums:
    nothing in the data tells two neighbours apart."""
    generator = torch.Generator().manual_seed(_NOT_A_START + seed)
    directions = torch.nn.functional.normalize(torch.randn(n_directions, d, generator=generator))
    index = torch.rand(n_rows, n_directions, generator=generator).topk(n_active, dim=1).indices
    strength = torch.rand(n_rows, n_active, generator=generator) + 0.5
    codes = torch.zeros(n_rows, n_directions).scatter_(1, index, strength)
    if inseparable:
        codes = codes[:, ::2].repeat_interleave(2, dim=1)
    mean = torch.randn(d, generator=generator)
    return Planted(
        directions=directions,
        x=3 * codes @ directions + mean + noise * torch.randn(n_rows, d, generator=generator),
    )


def share_recovered(decoder: Tensor, directions: Tensor, cosine: float = 0.95) -> float:
    """The share of planted directions that some decoder row points along."""
    best = (torch.nn.functional.normalize(decoder) @ directions.T).max(0).values
    return float((best >= cosine).float().mean())
