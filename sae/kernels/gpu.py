"""The sparse products as Triton kernels, for GPUs; `codes` has the same functions on any device and
is their oracle.

    decode_gpu             one program per row and block of channels; loops over the row's entries,
    gathering W rows
    products_at_gpu        one program per entry; a dot product over all channels in registers
    summed_by_latent_gpu   one program per latent and block of channels; a segmented sum over the
    sorted entries, so no
                           atomics and the same bits every time

Triton comes with PyTorch's CUDA builds and is imported when a kernel is first used. Tables are
float32 and contiguous, indices int64.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

_BLOCK = 128


@cache
def is_available() -> bool:
    """Whether these kernels can run here."""
    return torch.cuda.is_available() and find_spec("triton") is not None


def decode_gpu(
    start: Int[Tensor, "row_and_one"],
    latent: Int[Tensor, "entry"],
    value: Float[Tensor, "entry"],
    W: Float[Tensor, "latent d"],
) -> Float[Tensor, "row d"]:
    """`Σ_e value_e W[latent_e]` for every row."""
    return _segmented(start, latent, value, W)


def summed_by_latent_gpu(
    start: Int[Tensor, "latent_and_one"],
    row: Int[Tensor, "entry"],
    weight: Float[Tensor, "entry"],
    A: Float[Tensor, "row d"],
) -> Float[Tensor, "latent d"]:
    """`Σ_e weight_e A[row_e]` for every latent; `row` and `weight` in the order of the latents."""
    return _segmented(start, row, weight, A)


def products_at_gpu(
    row: Int[Tensor, "entry"],
    latent: Int[Tensor, "entry"],
    A: Float[Tensor, "row d"],
    W: Float[Tensor, "latent d"],
) -> Float[Tensor, "entry"]:
    """`⟨A[row_e], W[latent_e]⟩` for every entry."""
    out = torch.empty(len(row), device=A.device, dtype=torch.float32)
    if len(row):
        _kernels().pair_products[(len(row),)](
            row, latent, A, W, out, A.shape[1], BLOCK=_power_of_two(A.shape[1])
        )
    return out


def _segmented(start: Tensor, index: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    n_segments, d = len(start) - 1, table.shape[1]
    out = torch.empty(n_segments, d, device=table.device, dtype=torch.float32)
    if n_segments:
        _kernels().segmented_sum[(n_segments, -(-d // _BLOCK))](
            start, index, weight, table, out, d, BLOCK=_BLOCK
        )
    return out


def _kernels() -> ModuleType:
    from sae.kernels import triton_source  # needs Triton

    return triton_source


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()
