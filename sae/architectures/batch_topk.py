"""BatchTopK: the k × tokens largest pre-activations of a whole batch (Bussmann et al. 2024, arXiv
2412.06410).

Tokens may use more or fewer latents than k. Inference needs no batch: one threshold for all
latents, set at the end so that held-out activations have k active latents on average.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Doc

from featureflow.settings import Settings
from sae.activations import Activation, Threshold
from sae.kernels.select import WholeBatch
from sae.kernels.sparse_step import AuxK, sparse_step
from sae.kernels.start import length_matched
from sae.step import Pass, Situation, Weights


class BatchTopK(Settings):
    """k latents per token on average over a batch; a threshold in inference."""

    k: Annotated[int, Gt(0), Doc("latents per token, on average")] = 32
    auxk_weight: Annotated[
        float, Ge(0), Doc("weight of the auxiliary loss on dead latents; 0 turns it off")
    ] = 1 / 8
    kind: Literal["batch_topk"] = "batch_topk"

    @property
    def target_l0(self) -> float:
        return float(self.k)

    unit_decoder: ClassVar[bool] = True
    closed_loop: ClassVar[bool] = False
    calibrated: ClassVar[bool] = True

    def problems(self, n_latents: int) -> list[str]:
        return [f"k = {self.k} of {n_latents} latents"] if self.k > n_latents else []

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
        return sparse_step(weights, x, y, now, selection=WholeBatch(k=self.k), auxk=auxk)

    def activation(self, weights: Weights, threshold: float) -> Activation:
        return Threshold(theta=torch.full_like(weights["b_enc"], threshold))

    def edges(self, weights: Weights) -> None:
        return None

    def raised(self, weights: Weights, by: float) -> Weights:
        return weights
