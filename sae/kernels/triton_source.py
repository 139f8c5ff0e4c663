"""The two Triton kernels under `gpu`: segmented sums of weighted rows, and dot products of named
pairs of rows.

Importing this module needs Triton, which comes with PyTorch's CUDA builds; nothing imports it
before a kernel is used.
"""

import triton
import triton.language as tl


@triton.jit
def segmented_sum(start, index, weight, table, out, d, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[s] = Σ over entries e of segment s of weight[e] · table[index[e]], one block of
    channels."""
    segment = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channel < d
    total = tl.zeros([BLOCK], dtype=tl.float32)
    first = tl.load(start + segment)
    last = tl.load(start + segment + 1)
    for entry in range(first, last):
        row = tl.load(table + tl.load(index + entry) * d + channel, mask=inside, other=0.0)
        total += tl.load(weight + entry) * row
    tl.store(out + segment * d + channel, total, mask=inside)


@triton.jit
def pair_products(row, latent, A, W, out, d, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """out[e] = ⟨A[row[e]], W[latent[e]]⟩."""
    entry = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, BLOCK)
    inside = channel < d
    left = tl.load(A + tl.load(row + entry) * d + channel, mask=inside, other=0.0)
    right = tl.load(W + tl.load(latent + entry) * d + channel, mask=inside, other=0.0)
    tl.store(out + entry, tl.sum(left * right, axis=0))
