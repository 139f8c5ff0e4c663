"""Sparse latents as compressed rows, and the three products that training needs of them.

With `E` selected entries over `R` rows, `d` numbers to a vector and a dictionary of `N` rows, on
CPU and GPU alike:

    decode            Σ_e value_e W[latent_e] for every row                          2 E d
    (embedding_bag)
    products_at       ⟨A[row_e], W[latent_e]⟩ for every entry                        2 E d
    (sampled_addmm)
    summed_by_latent  Σ_{e of latent} weight_e A[row_e] for every latent             2 E d
    (embedding_bag after one
    sort)

None of them touches a `row × latent` matrix. The sort is made once per step (`order_by_latent`) and
serves the gradients of both weight matrices. All are deterministic.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import gpu


@dataclass(frozen=True, kw_only=True, eq=False)
class Codes:
    """Selected latents: row r owns entries `start[r] … start[r+1]`; `latent` ascends inside a
    row."""

    start: Int[Tensor, "row_and_one"]
    latent: Int[Tensor, "entry"]
    value: Float[Tensor, "entry"]

    @property
    def n_rows(self) -> int:
        return len(self.start) - 1

    def row(self) -> Int[Tensor, "entry"]:
        """The row of every entry."""
        rows = torch.arange(self.n_rows, device=self.start.device)
        return rows.repeat_interleave(self.start.diff(), output_size=len(self.latent))


@dataclass(frozen=True, kw_only=True, eq=False)
class ByLatent:
    """The same entries grouped by latent: latent i owns `order[start[i] : start[i+1]]`."""

    order: Int[Tensor, "entry"]
    start: Int[Tensor, "latent_and_one"]
    row: Int[Tensor, "entry"]


def decode(codes: Codes, W: Float[Tensor, "latent d"]) -> Float[Tensor, "row d"]:
    """Each row's weighted sum of dictionary rows."""
    if W.is_cuda and gpu.is_available():
        return gpu.decode_gpu(codes.start, codes.latent, codes.value, W.contiguous())
    return F.embedding_bag(
        codes.latent,
        W,
        codes.start,
        per_sample_weights=codes.value,
        mode="sum",
        include_last_offset=True,
    )


def products_at(
    codes: Codes, A: Float[Tensor, "row d"], W: Float[Tensor, "latent d"]
) -> Float[Tensor, "entry"]:
    """`A Wᵀ` at the selected entries only."""
    if W.is_cuda and gpu.is_available():
        return gpu.products_at_gpu(codes.row(), codes.latent, A.contiguous(), W.contiguous())
    silence_csr_warning()
    shape = (codes.n_rows, W.shape[0])
    pattern = torch.sparse_csr_tensor(
        codes.start, codes.latent, torch.zeros_like(codes.value), shape, check_invariants=False
    )
    return torch.sparse.sampled_addmm(pattern, A, W.T, beta=0.0).values()


def order_by_latent(codes: Codes, n_latents: int) -> ByLatent:
    """The one sort of a step. Narrow integers sort several times faster."""
    narrow = codes.latent.to(torch.int16) if n_latents <= 2**15 else codes.latent
    order = torch.sort(narrow, stable=True).indices
    start = torch.zeros(n_latents + 1, dtype=torch.int64, device=codes.latent.device)
    torch.cumsum(torch.bincount(codes.latent, minlength=n_latents), 0, out=start[1:])
    return ByLatent(order=order, start=start, row=codes.row()[order])


def summed_by_latent(
    groups: ByLatent,
    weight: Float[Tensor, "entry"],
    A: Float[Tensor, "row d"],
    row: Int[Tensor, "entry"] | None = None,
) -> Float[Tensor, "latent d"]:
    """`Cᵀ A` where C holds `weight` at the entries. `row` (already in the groups' order) names
    other rows of A."""
    rows = groups.row if row is None else row
    if A.is_cuda and gpu.is_available():
        return gpu.summed_by_latent_gpu(
            groups.start, rows, weight[groups.order].contiguous(), A.contiguous()
        )
    return F.embedding_bag(
        rows,
        A,
        groups.start,
        per_sample_weights=weight[groups.order],
        mode="sum",
        include_last_offset=True,
    )


def totals_by_latent(
    codes: Codes, groups: ByLatent, weight: Float[Tensor, "entry"]
) -> Float[Tensor, "latent"]:
    """The sum of `weight` over each latent's entries."""
    if weight.is_cuda and gpu.is_available():
        one = torch.ones(1, 1, device=weight.device)
        in_order = weight[groups.order].contiguous()
        return gpu.summed_by_latent_gpu(
            groups.start, torch.zeros_like(groups.order), in_order, one
        ).flatten()
    n_latents = len(groups.start) - 1
    return torch.bincount(codes.latent, weights=weight.double(), minlength=n_latents).to(
        weight.dtype
    )


@cache
def silence_csr_warning() -> None:
    """PyTorch says once per process that CSR tensors are in beta; let it say so here, unheard."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.sparse_csr_tensor(
            torch.tensor([0, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([]), (1, 1)
        )
