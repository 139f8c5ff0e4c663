"""Matryoshka BatchTopK: prefixes of the dictionary reconstruct by themselves (Bussmann et al. 2025,
arXiv 2503.17547).

The loss is the mean over prefixes of each prefix' squared error, so early latents stay general
instead of being split up by later ones. Selection and inference are BatchTopK's.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Literal, Self

import torch
from jaxtyping import Int
from pydantic import model_validator
from torch import Tensor
from typing_extensions import Doc

from sae.architectures.topk import LargestOfBatch


class MatryoshkaBatchTopK(LargestOfBatch):
    """Nested dictionaries: `fractions` of the latents, each prefix holding the ones before it."""

    fractions: Annotated[
        tuple[float, ...], Doc("share of the latents in each group, in order; they add up to 1")
    ] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    kind: Literal["matryoshka_batch_topk"] = "matryoshka_batch_topk"

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if not self.fractions or min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(
                f"fractions must be positive and add up to 1, not {sum(self.fractions):g}"
            )
        return self

    def group_ends(self, n_latents: int) -> tuple[int, ...]:
        """Widths of the prefixes; the last is `n_latents`."""
        ends = [round(end * n_latents) for end in itertools.accumulate(self.fractions)]
        return (*ends[:-1], n_latents)

    def problems(self, n_latents: int) -> list[str]:
        ends = (0, *self.group_ends(n_latents))
        empty = any(later <= earlier for earlier, later in itertools.pairwise(ends))
        return super().problems(n_latents) + (
            [f"a group of {self.fractions} is empty at {n_latents} latents"] if empty else []
        )

    def prefixes(self, n_latents: int) -> Int[Tensor, "group"]:
        return torch.tensor(self.group_ends(n_latents))
