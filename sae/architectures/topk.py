"""TopK: the k largest pre-activations of each token (Gao et al. 2024, arXiv 2406.04093). L0 is k by
construction."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Doc

from featureflow.settings import Settings
from sae.activations import Activation, TopKActivation
from sae.kernels.select import PerRow
from sae.kernels.sparse_step import AuxK, sparse_step
from sae.kernels.start import length_matched
from sae.step import Pass, Situation, Weights


class TopK(Settings):
    """Exactly k latents per token, fewer where fewer are positive."""

    k: Annotated[int, Gt(0), Doc("latents per token")] = 32
    auxk_weight: Annotated[
        float, Ge(0), Doc("weight of the auxiliary loss on dead latents; 0 turns it off")
    ] = 1 / 8
    kind: Literal["topk"] = "topk"

    @property
    def target_l0(self) -> float:
        return float(self.k)

    unit_decoder: ClassVar[bool] = True
    closed_loop: ClassVar[bool] = False
    calibrated: ClassVar[bool] = False

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
        return sparse_step(weights, x, y, now, selection=PerRow(k=self.k), auxk=auxk)

    def activation(self, weights: Weights, threshold: float) -> Activation:
        return TopKActivation(k=self.k)

    def edges(self, weights: Weights) -> None:
        return None

    def raised(self, weights: Weights, by: float) -> Weights:
        return weights
