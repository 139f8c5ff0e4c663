"""Sparse latents as compressed rows, and the three products that training needs of them.

With `E` selected entries over `R` rows, `d` numbers to a vector and a dictionary of `N` rows, on
CPU and GPU alike:

    decode            Σ_e value_e W[latent_e] for every row                          2 E d
    products_at       ⟨A[row_e], W[latent_e]⟩ for every entry                        2 E d
    summed_by_latent  Σ_{e of latent} weight_e A[row_e] for every latent             2 E d

None of them touches a `row × latent` matrix. The sort is made once per step (`order_by_latent`) and
serves the gradients of both weight matrices. All are deterministic. The inner loops are in
sae/kernels/cpu.py and sae/kernels/gpu.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import cpu, gpu


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
    if W.is_cuda:
        return torch.linalg.vecdot(A[codes.row()], W[codes.latent])
    out = torch.empty(len(codes.latent), dtype=A.dtype)
    work = partial(
        cpu.products_at,
        codes.start.numpy(),
        codes.latent.numpy(),
        A.contiguous().numpy(),
        W.contiguous().numpy(),
        out.numpy(),
    )
    cpu.in_parts(codes.n_rows, len(out) * A.shape[1], work)
    return out


def residual_and_slope(
    codes: Codes, W: Float[Tensor, "latent d"], base: Float[Tensor, "row d"], scale: float
) -> tuple[Float[Tensor, "row d"], Float[Tensor, "entry"]]:
    """What the decoded rows and `base` make together, and `scale` times its products with the
    dictionary rows of the positive entries."""
    if W.is_cuda:
        residual = decode(codes, W).add_(base)
        return residual, products_at(codes, residual, W) * (codes.value > 0) * scale
    residual, at_z = torch.empty_like(base), torch.empty_like(codes.value)
    work = partial(
        cpu.residual_and_slope,
        *(part.numpy() for part in (codes.start, codes.latent, codes.value)),
        W.contiguous().numpy(),
        base.contiguous().numpy(),
        W.numpy().dtype.type(scale),
        residual.numpy(),
        at_z.numpy(),
    )
    cpu.in_parts(codes.n_rows, len(at_z) * W.shape[1], work)
    return residual, at_z


def order_by_latent(codes: Codes, n_latents: int) -> ByLatent:
    """The one sort of a step."""
    start = torch.zeros(n_latents + 1, dtype=torch.int64, device=codes.latent.device)
    if start.is_cuda:
        order = torch.sort(codes.latent, stable=True).indices
        torch.cumsum(torch.bincount(codes.latent, minlength=n_latents), 0, out=start[1:])
        return ByLatent(order=order, start=start, row=codes.row()[order])
    order, row = torch.empty_like(codes.latent), torch.empty_like(codes.latent)
    cpu.order_by_latent(
        codes.start.numpy(), codes.latent.numpy(), order.numpy(), row.numpy(), start.numpy()
    )
    return ByLatent(order=order, start=start, row=row)


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
    if A.is_cuda:
        return F.embedding_bag(
            rows,
            A,
            groups.start,
            per_sample_weights=weight[groups.order],
            mode="sum",
            include_last_offset=True,
        )
    out = torch.empty(len(groups.start) - 1, A.shape[1], dtype=A.dtype)
    work = partial(
        cpu.summed_by_latent,
        groups.start.numpy(),
        rows.numpy(),
        weight[groups.order].numpy(),
        A.contiguous().numpy(),
        out.numpy(),
    )
    cpu.in_parts(len(out), len(rows) * A.shape[1], work)
    return out


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
