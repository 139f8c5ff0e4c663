"""BatchTopK: the k × tokens largest pre-activations of a whole batch (Bussmann et al. 2024, arXiv
2412.06410).

Tokens may use more or fewer latents than k. Inference needs no batch: one threshold for all
latents, set at the end so that held-out activations have k active latents on average.
"""

from __future__ import annotations

from typing import Literal

import torch

from sae.activations import Activation, Threshold
from sae.architectures.topk import KLargest
from sae.kernels.select import Selection, WholeBatch
from sae.step import Weights


class BatchTopK(KLargest):
    """k latents per token on average over a batch; a threshold in inference."""

    kind: Literal["batch_topk"] = "batch_topk"

    @property
    def selection(self) -> Selection:
        return WholeBatch(k=self.k)

    def activation(self, weights: Weights, threshold: float) -> Activation:
        return Threshold(theta=torch.full_like(weights["b_enc"], threshold))
