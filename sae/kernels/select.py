"""Which latents are active: the encoder's one dense product, and the k largest entries of each row
or of the whole batch.

    1. pre = x W_encᵀ + b_enc, a usual batch at once and a large one in blocks (measured on two
       threads, d = 768, N = 12,288: 261 ms for 2,048 tokens at once, 475 ms in blocks that fit the
       cache, because a product packs W_enc anew every time); in bfloat16 where the machine
       multiplies bfloat16 several times faster (`has_fast_bfloat16`)
    2. select. Per row exactly (sae/kernels/cpu.py on a CPU). Whole batch: entries above a cut taken
       from the first tokens, and of those the `k × tokens` largest; exact because the cut is
       lowered until it lets enough of them through
    3. after a bfloat16 pass, compute the selected values again in float32

Cost: `2 · token · d · latent` for 1, about one pass over the pre-activations for 2. Which of
several equal values at the edge are kept is unspecified but deterministic. A selected value that is
not positive stays in the codes as an entry with value 0 (TopK) or is left out (BatchTopK).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sae.kernels import cpu
from sae.kernels.codes import Codes, products_at
from sae.step import Precision

BLOCK_BYTES = 128 << 20
_CUT_ROWS = 256
_CUT_MARGIN = 0.85
_AS_INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}


@dataclass(frozen=True, kw_only=True)
class PerRow:
    """The `k` largest of every token."""

    k: int


@dataclass(frozen=True, kw_only=True)
class WholeBatch:
    """The `k × tokens` largest positive entries of a batch; `k` need not be whole."""

    k: float

    def count(self, n_tokens: int) -> int:
        return max(1, round(self.k * n_tokens))


Selection = PerRow | WholeBatch


@cache
def has_fast_bfloat16(device: str = "cpu") -> bool:
    """Whether a bfloat16 product is worth its rounding: AVX512-BF16 or AMX on a CPU, tensor cores
    on a GPU."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def encode(
    x: Float[Tensor, "token d"],
    W_enc: Float[Tensor, "latent d"],
    b_enc: Float[Tensor, "latent"],
    selection: Selection,
    precision: Precision,
) -> Codes:
    """The latents of a centred batch. Values are float32 whatever the precision of the pass that
    chose them."""
    if isinstance(selection, PerRow):
        codes = _encode_per_row(x, W_enc, b_enc, selection.k, precision)
    else:
        codes = _encode_whole_batch(x, W_enc, b_enc, selection, precision)
    value = codes.value
    if precision == "bfloat16":
        value = products_at(codes, x, W_enc) + b_enc[codes.latent]
    return Codes(start=codes.start, latent=codes.latent, value=value.relu())


def pre_activation_blocks(
    x: Float[Tensor, "token d"],
    W_enc: Float[Tensor, "latent d"],
    b_enc: Float[Tensor, "latent"],
    precision: Precision,
) -> Iterator[Float[Tensor, "block latent"]]:
    """Pre-activations of consecutive blocks of tokens, in `precision`. On a CPU a block is
    overwritten by the next."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    W, b, x = W_enc.to(dtype), b_enc.to(dtype), x.to(dtype)
    if x.is_cuda:
        yield F.linear(x, W, b)
        return
    for block in x.split(max(64, BLOCK_BYTES // (4 * len(W)))):
        yield torch.addmm(b, block, W.T, out=_scratch.of(len(block), len(W), dtype))


class _Scratch(threading.local):
    """Room for a block of pre-activations, kept from step to step: the system would have to clear
    new pages every time, which took a third as long as the product itself (measured, 34 MB)."""

    def __init__(self) -> None:
        self._room = torch.empty(0)

    def of(self, n_rows: int, n_latents: int, dtype: torch.dtype) -> Float[Tensor, "row latent"]:
        if self._room.dtype != dtype or self._room.numel() < n_rows * n_latents:
            self._room = torch.empty(n_rows * n_latents, dtype=dtype)
        return self._room[: n_rows * n_latents].view(n_rows, n_latents)


_scratch = _Scratch()


def _encode_per_row(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, precision: Precision) -> Codes:
    parts = [largest_of_rows(pre, k) for pre in pre_activation_blocks(x, W_enc, b_enc, precision)]
    index, value = torch.cat([part[1] for part in parts]), torch.cat([part[0] for part in parts])
    start = torch.arange(0, index.numel() + 1, k, device=x.device)
    return Codes(start=start, latent=index.flatten(), value=value.flatten().float())


def largest_of_rows(
    pre: Float[Tensor, "row latent"], k: int
) -> tuple[Float[Tensor, "row k"], Int[Tensor, "row k"]]:
    """Values and indices of the k largest entries of each row, indices ascending. NaN counts as
    largest, as in PyTorch. Raises ValueError for more than there are."""
    if k > pre.shape[1]:
        raise ValueError(f"the {k} largest of {pre.shape[1]} entries")
    if pre.is_cuda or pre.dtype not in _AS_INTEGERS:
        index = pre.topk(k, dim=1, sorted=False).indices.sort(dim=1).values
        return pre.gather(1, index), index
    bits = pre.contiguous().view(_AS_INTEGERS[pre.dtype]).numpy()
    index = torch.empty(len(pre), k, dtype=torch.int64)
    n_bits = 8 * bits.itemsize - 1
    infinity = torch.tensor(float("inf"), dtype=pre.dtype).view(_AS_INTEGERS[pre.dtype]).item()
    numbers = (np.int32(number) for number in (n_bits, 2**n_bits - 1, infinity))
    work = partial(cpu.largest_of_rows, bits, k, *numbers, index.numpy())
    cpu.in_parts(len(pre), pre.numel(), work)
    return pre.gather(1, index), index


def _encode_whole_batch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, which: WholeBatch, precision: Precision
) -> Codes:
    n_wanted, n_latents = which.count(len(x)), len(W_enc)
    cut: float | None = None
    while True:
        places, values, offset = [], [], 0
        for pre in pre_activation_blocks(x, W_enc, b_enc, precision):
            if cut is None:
                sample = pre[:_CUT_ROWS]
                cut = _CUT_MARGIN * _largest_value(sample.flatten(), which.count(len(sample)))
            place = _nonzero(~(pre.flatten() <= cut))  # NaN too: it must be seen
            values.append(pre.flatten()[place].float())
            places.append(place + offset)
            offset += pre.numel()
        if cut == 0.0 or sum(map(len, places)) >= n_wanted:
            return _keep_largest(torch.cat(places), torch.cat(values), n_wanted, len(x), n_latents)
        cut = cut / 2 if cut is not None and cut > 1e-3 else 0.0


def _largest_value(values: Float[Tensor, "entry"], rank: int) -> float:
    """The value of the `rank`-th largest entry, at least 0."""
    if values.is_cuda:
        return max(float(values.float().kthvalue(len(values) - rank + 1).values), 0.0)
    return max(
        float(np.partition(values.float().numpy(), len(values) - rank)[len(values) - rank]), 0.0
    )


def _nonzero(mask: Tensor) -> Int[Tensor, "entry"]:
    return (
        mask.nonzero().flatten() if mask.is_cuda else torch.from_numpy(np.flatnonzero(mask.numpy()))
    )


def _keep_largest(
    place: Tensor, value: Tensor, n_wanted: int, n_rows: int, n_latents: int
) -> Codes:
    if len(place) > n_wanted:
        if place.is_cuda:
            kept = value.topk(n_wanted, sorted=False).indices.sort().values
        else:
            kept = torch.from_numpy(
                np.sort(np.argpartition(value.numpy(), len(value) - n_wanted)[-n_wanted:])
            )
        place, value = place[kept], value[kept]
    start = torch.zeros(n_rows + 1, dtype=torch.int64, device=place.device)
    row = torch.div(place, n_latents, rounding_mode="floor")
    torch.cumsum(torch.bincount(row, minlength=n_rows), 0, out=start[1:])
    return Codes(start=start, latent=place - row * n_latents, value=value)
