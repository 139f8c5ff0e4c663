"""What one training step is given and what it reports, whatever the architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

Precision = Literal["float32", "bfloat16"]
Weights = dict[str, Tensor]
"""W_enc [latent d_in], b_enc [latent], W_dec [latent d_out], b_dec [d_out], and what the
architecture adds."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """Where in the run a step happens. `progress` runs from 0 to 1; `pressure` is the closed loop's
    coefficient."""

    progress: float
    dead: Bool[Tensor, "latent"]
    pressure: float = 1.0
    precision: Precision = "float32"


@dataclass(frozen=True, kw_only=True, eq=False)
class Pass:
    """One batch seen. The loss is the sum of its parts; `squared_…` are sums over the batch."""

    losses: Mapping[str, Tensor]
    gradients: Weights
    fired: Bool[Tensor, "latent"]
    n_active: Tensor
    squared_error: Tensor
    squared_target: Tensor
    threshold: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        return torch.stack(list(self.losses.values())).sum()
