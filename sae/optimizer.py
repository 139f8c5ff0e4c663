"""Adam over a dictionary's weights, two walks through memory per step.

    1. project   remove from ∂W_dec what is parallel to its row, so that only the direction of a
       unit row is learnt
    2. clip      scale all gradients if their joint norm exceeds `clip_norm`
    3. Adam      Kingma & Ba 2015, moments in float32
    4. renorm    decoder rows back to unit length

The first walk takes the row products and the joint norm; the second does all four, row by row
(sae/kernels/cpu.py). The norm of the projected gradient comes from the same row products that the
projection needs. On a GPU, and for biases, PyTorch's fused kernel is the third part. `eps` is far
below PyTorch's default because gradients of a mean over tokens and channels are small (Gao et al.
2024 use the same value).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from sae.kernels import cpu


class Adam:
    """Moments of every weight, and the update. `weights` passed to `update` are changed in
    place."""

    def __init__(
        self, weights: Mapping[str, Tensor], *, beta1: float, beta2: float, eps: float = 6.25e-10
    ) -> None:
        self._beta1, self._beta2, self._eps = beta1, beta2, eps
        self._first = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self._second = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self._n_updates = 0

    @torch.no_grad()
    def update(
        self,
        weights: dict[str, Tensor],
        gradients: dict[str, Tensor],
        *,
        learning_rate: float,
        clip_norm: float,
        unit_decoder: bool,
    ) -> float:
        """One step; returns the joint gradient norm before clipping. `gradients` are
        overwritten."""
        norm, parallel = _joint_norm(weights, gradients, unit_decoder)
        factor = clip_norm / norm if norm > clip_norm else 1.0
        self._n_updates += 1
        for name, gradient in gradients.items():
            along = parallel if unit_decoder and name == "W_dec" else None
            if gradient.is_cuda or gradient.ndim == 1:
                self._adam_whole(name, weights[name], gradient, along, factor, learning_rate)
            else:
                self._adam_by_row(name, weights[name], gradient, along, factor, learning_rate)
        return norm

    def state(self) -> tuple[dict[str, Tensor], int]:
        """Everything a later `restore` needs: moments by name, and how many updates were made."""
        first = {f"first.{name}": tensor for name, tensor in self._first.items()}
        return first | {
            f"second.{name}": tensor for name, tensor in self._second.items()
        }, self._n_updates

    def restore(self, tensors: Mapping[str, Tensor], n_updates: int) -> None:
        for name in self._first:
            self._first[name].copy_(tensors[f"first.{name}"])
            self._second[name].copy_(tensors[f"second.{name}"])
        self._n_updates = n_updates

    def _adam_by_row(
        self,
        name: str,
        weight: Tensor,
        gradient: Tensor,
        parallel: Tensor | None,
        factor: float,
        learning_rate: float,
    ) -> None:
        tensors = (weight, gradient.contiguous(), self._first[name], self._second[name])
        first, second = (
            1 - beta**self._n_updates for beta in (self._beta1, self._beta2)
        )  # how far each moment is from its average while it is young
        numbers = (factor, self._beta1, self._beta2, learning_rate / first, second**-0.5, self._eps)
        kind = weight.numpy().dtype.type
        work = partial(
            cpu.adam_rows,
            *(tensor.numpy() for tensor in tensors),
            (gradient[:, 0] if parallel is None else parallel).contiguous().numpy(),
            parallel is not None,
            *(kind(number) for number in numbers),
        )
        cpu.in_parts(len(weight), weight.numel(), work)

    def _adam_whole(
        self,
        name: str,
        weight: Tensor,
        gradient: Tensor,
        parallel: Tensor | None,
        factor: float,
        learning_rate: float,
    ) -> None:
        if parallel is not None:
            gradient.addcmul_(weight, parallel[:, None], value=-1)
        if factor != 1.0:
            gradient.mul_(factor)
        torch._fused_adam_(
            [weight],
            [gradient],
            [self._first[name]],
            [self._second[name]],
            [],
            [torch.tensor(float(self._n_updates), device=weight.device)],
            lr=learning_rate,
            beta1=self._beta1,
            beta2=self._beta2,
            weight_decay=0.0,
            eps=self._eps,
            amsgrad=False,
            maximize=False,
        )
        if parallel is not None:
            weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True))


def _joint_norm(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], unit_decoder: bool
) -> tuple[float, Float[Tensor, "latent"] | None]:
    """The norm of all gradients together, and the decoder's products with its rows where that part
    is left out: ‖g − (g·w) w‖² = ‖g‖² − (g·w)²."""
    total, parallel = 0.0, None
    for name, gradient in gradients.items():
        square, product = _row_products(gradient, weights[name])
        total += float(square.double().sum())
        if unit_decoder and name == "W_dec":
            parallel = product
            total -= float(product.double().square().sum())
    return max(total, 0.0) ** 0.5, parallel


def _row_products(
    a: Float[Tensor, "row d"], b: Float[Tensor, "row d"]
) -> tuple[Float[Tensor, "row"], Float[Tensor, "row"]]:
    """⟨a, a⟩ and ⟨a, b⟩ of every row."""
    if a.is_cuda or a.ndim == 1:
        return torch.linalg.vecdot(a, a), torch.linalg.vecdot(a, b)
    square, product = a.new_empty(len(a)), a.new_empty(len(a))
    parts = [tensor.contiguous().numpy() for tensor in (a, b, square, product)]
    cpu.in_parts(len(a), a.numel(), partial(cpu.row_products, *parts))
    return square, product
