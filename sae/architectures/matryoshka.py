"""Matryoshka BatchTopK: prefixes of the dictionary reconstruct by themselves (Bussmann et al. 2025,
arXiv 2503.17547).

The loss is the mean over prefixes of each prefix' squared error, so early latents stay general
instead of being split up by later ones. Selection and inference are BatchTopK's.
"""

from __future__ import annotations

import itertools
from typing import Annotated, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from pydantic import model_validator
from torch import Tensor
from typing_extensions import Doc

from featureflow.settings import Settings
from sae.activations import Activation, Threshold
from sae.kernels.select import WholeBatch
from sae.kernels.sparse_step import AuxK, sparse_step
from sae.kernels.start import length_matched
from sae.step import Pass, Situation, Weights


class MatryoshkaBatchTopK(Settings):
    """Nested dictionaries: `fractions` of the latents, each prefix holding the ones before it."""

    k: Annotated[int, Gt(0), Doc("latents per token, on average")] = 32
    fractions: Annotated[
        tuple[float, ...], Doc("share of the latents in each group, in order; they add up to 1")
    ] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 17 / 32)
    auxk_weight: Annotated[
        float, Ge(0), Doc("weight of the auxiliary loss on dead latents; 0 turns it off")
    ] = 1 / 8
    kind: Literal["matryoshka_batch_topk"] = "matryoshka_batch_topk"

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if not self.fractions or min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(
                f"fractions must be positive and add up to 1, not {sum(self.fractions):g}"
            )
        return self

    @property
    def target_l0(self) -> float:
        return float(self.k)

    unit_decoder: ClassVar[bool] = True
    closed_loop: ClassVar[bool] = False
    calibrated: ClassVar[bool] = True

    def group_ends(self, n_latents: int) -> tuple[int, ...]:
        """Widths of the prefixes; the last is `n_latents`."""
        ends, total = [], 0.0
        for fraction in self.fractions:
            total += fraction
            ends.append(round(total * n_latents))
        return (*ends[:-1], n_latents)

    def problems(self, n_latents: int) -> list[str]:
        ends = (0, *self.group_ends(n_latents))
        empty = any(later <= earlier for earlier, later in itertools.pairwise(ends))
        found = [f"k = {self.k} of {n_latents} latents"] if self.k > n_latents else []
        return found + (
            [f"a group of {self.fractions} is empty at {n_latents} latents"] if empty else []
        )

    def extra_parameters(self, n_latents: int) -> Weights:
        return {}

    def prepared(self, weights: Weights) -> Weights:
        return length_matched(weights, self.k)

    def gradients(
        self,
        weights: Weights,
        x: Float[Tensor, "token d_in"],
        y: Float[Tensor, "token d_out"] | None,
        now: Situation,
    ) -> Pass:
        auxk = AuxK(weight=self.auxk_weight, k=max(1, x.shape[1] // 2))
        ends = torch.tensor(self.group_ends(len(weights["W_enc"])), device=x.device)
        return sparse_step(
            weights, x, y, now, selection=WholeBatch(k=self.k), auxk=auxk, group_ends=ends
        )

    def activation(self, weights: Weights, threshold: float) -> Activation:
        return Threshold(theta=torch.full_like(weights["b_enc"], threshold))

    def edges(self, weights: Weights) -> None:
        return None

    def raised(self, weights: Weights, by: float) -> Weights:
        return weights
