"""TopK: the k largest pre-activations of each token (Gao et al. 2024, arXiv 2406.04093). L0 is k by
construction. BatchTopK: the k × tokens largest of a whole batch (Bussmann et al. 2024, arXiv
2412.06410); tokens may use more or fewer than k, and inference has one threshold for all latents,
set at the end so that held-out activations have k active latents on average.

`KLargest` is what both have in common with Matryoshka. A random start is scaled so
that its reconstruction is not longer than what it reconstructs: with many active latents for the
width (k near d), a tied random dictionary adds up to far more than its input, and the first steps
are spent shrinking.
"""

from __future__ import annotations

import itertools
from typing import Annotated, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float, Int
from pydantic import model_validator
from torch import Tensor
from typing_extensions import Doc

from featureflow.settings import Settings
from sae.activations import Activation, Threshold, TopKActivation
from sae.kernels.codes import decode
from sae.kernels.select import PerRow, Selection, WholeBatch, encode
from sae.kernels.sparse_step import AuxK, sparse_step
from sae.step import Pass, Situation, Weights

_ROWS = 256


class KLargest(Settings):
    """k latents per token are kept, one way or another; no loss on activations."""

    k: Annotated[int, Gt(0), Doc("latents per token, on average")] = 32
    auxk_weight: Annotated[
        float, Ge(0), Doc("weight of the auxiliary loss on dead latents; 0 turns it off")
    ] = 1 / 8

    unit_decoder: ClassVar[bool] = True
    closed_loop: ClassVar[bool] = False
    calibrated: ClassVar[bool] = True

    @property
    def target_l0(self) -> float:
        return float(self.k)

    @property
    def selection(self) -> Selection:
        """Which latents of a batch are kept."""
        raise NotImplementedError

    def problems(self, n_latents: int) -> list[str]:
        return [f"k = {self.k} of {n_latents} latents"] if self.k > n_latents else []

    def extra_parameters(self, n_latents: int) -> Weights:
        return {}

    def prepared(self, weights: Weights) -> Weights:
        return length_matched(weights, self.k)

    def prefixes(self, n_latents: int) -> Int[Tensor, "group"] | None:
        """Widths of the prefixes that reconstruct by themselves; None: only the whole does."""
        return None

    def gradients(
        self,
        weights: Weights,
        x: Float[Tensor, "token d_in"],
        y: Float[Tensor, "token d_out"] | None,
        now: Situation,
    ) -> Pass:
        auxk = AuxK(weight=self.auxk_weight, k=max(1, x.shape[1] // 2))
        ends = self.prefixes(len(weights["W_enc"]))
        ends = None if ends is None else ends.to(x.device)
        return sparse_step(weights, x, y, now, selection=self.selection, auxk=auxk, group_ends=ends)

    def edges(self, weights: Weights) -> None:
        return None

    def raised(self, weights: Weights, by: float) -> Weights:
        return weights


class LargestOfBatch(KLargest):
    """The k × tokens largest of a batch; one threshold for all latents in inference."""

    @property
    def selection(self) -> Selection:
        return WholeBatch(k=self.k)

    def activation(self, weights: Weights, threshold: float) -> Activation:
        return Threshold(theta=torch.full_like(weights["b_enc"], threshold))


class BatchTopK(LargestOfBatch):
    """k latents per token on average over a batch; a threshold in inference."""

    kind: Literal["batch_topk"] = "batch_topk"


class TopK(KLargest):
    """Exactly k latents per token, fewer where fewer are positive."""

    k: Annotated[int, Gt(0), Doc("latents per token")] = 32
    kind: Literal["topk"] = "topk"

    calibrated: ClassVar[bool] = False

    @property
    def selection(self) -> Selection:
        return PerRow(k=self.k)

    def activation(self, weights: Weights, threshold: float) -> Activation:
        return TopKActivation(k=self.k)


class MatryoshkaBatchTopK(LargestOfBatch):
    """Nested dictionaries (Bussmann et al. 2025, arXiv 2503.17547): `fractions` of the latents,
    each prefix holding the ones before it. The loss is the mean over prefixes of each prefix'
    squared error, so early latents stay general instead of being split up by later ones."""

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


@torch.no_grad()
def length_matched(weights: Weights, k: int) -> Weights:
    """The weights with a scaled encoder, never scaled up: by the least-squares factor ⟨x, x̂⟩ /
    ‖x̂‖² on Gaussian rows of unit mean square, which is what normalised activations look like to
    random directions. A transcoder's start is left as it is."""
    W_enc, W_dec = weights["W_enc"], weights["W_dec"]
    if W_enc.shape != W_dec.shape:
        return weights
    x = torch.randn(_ROWS, W_enc.shape[1], generator=torch.Generator().manual_seed(0)).to(
        W_enc.device
    )
    out = decode(encode(x, W_enc, weights["b_enc"], PerRow(k=min(k, len(W_enc))), "float32"), W_dec)
    factor = float((x * out).sum() / out.square().sum())
    return weights | {"W_enc": W_enc * min(1.0, factor)}
