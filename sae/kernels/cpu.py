"""The inner loops of a training step on a CPU, compiled by Numba; `codes`, `select` and the
optimizer call them, and PyTorch's own operations are their oracle in the tests.

    largest_of_rows   the k largest of each row: a lower limit from the maxima of groups of 16
                      neighbours, then bisection over the few entries above it. Numbers are compared
                      as integers whose order is that of the floats, so bfloat16 needs no copy
    products_at       ⟨A[row_e], W[latent_e]⟩ for every entry
    residual_and_slope  decode, subtract the target, and products_at of the result, in one walk
    order_by_latent   a counting sort of the entries by latent
    summed_by_latent  Σ_e weight_e A[row_e] for every latent
    row_products      ⟨a, a⟩ and ⟨a, b⟩ of every row
    adam_rows         one walk over the rows of a weight: remove what is parallel, clip, Adam, unit
                      length

They release the interpreter's lock. Each works on a range of rows or latents, and `in_parts` gives
PyTorch's number of threads a range each. Sums may be taken in any order, but the same one every
time. Compiled code is kept on disk (about ten seconds, once per machine).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from numba import njit

_GROUP = 16
_NUMBERS_PER_THREAD = 1 << 15
_SUMS = {"reassoc", "contract", "nsz", "arcp"}


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Numba's compiler without the lock; without a cache where no folder can be written."""

    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError:
            return njit(nogil=True, error_model="numpy", **options)(function)

    return wrapped


def in_parts(n: int, numbers: int, work: Callable[[int, int], None]) -> None:
    """Call `work(first, last)` over all of `range(n)`, in as many threads as `numbers` numbers are
    worth."""
    n_threads = min(torch.get_num_threads(), numbers // _NUMBERS_PER_THREAD, n)
    if n_threads < 2:
        work(0, n)
        return
    ends = [n * i // n_threads for i in range(n_threads + 1)]
    list(_pool(n_threads).map(work, ends[:-1], ends[1:]))


@cache
def _pool(n_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n_threads, thread_name_prefix="kernel")


@compiled()
def largest_of_rows(
    bits: np.ndarray,
    k: int,
    sign: int,
    magnitude: int,
    infinity: int,
    index: np.ndarray,
    first: int,
    last: int,
) -> None:
    """`bits` are floats seen as integers [row n]; `sign` is the place of their sign bit,
    `magnitude` the mask of the others, `infinity` that number's bits. `index` [row k] receives
    ascending columns; of equal values the first are kept. NaN of either sign is above every number,
    so that no latent leaves unseen."""
    n = bits.shape[1]
    n_groups = n // _GROUP
    key = np.empty(n, np.int32)
    top = np.empty(n_groups + 1, np.int32)
    column = np.empty(n + 1, np.int32)
    value = np.empty(n + 1, np.int32)
    least = np.int32(-magnitude - 1)
    for r in range(first, last):
        for j in range(n):
            b = np.int32(bits[r, j])
            ordered = b ^ ((b >> sign) & magnitude)
            key[j] = magnitude if (b & magnitude) > infinity else ordered
        low, high, n_kept, grouped = least, np.int32(magnitude), 0, 0
        if n_groups >= k:
            grouped, high = n_groups * _GROUP, least
            for g in range(n_groups):
                most = key[g * _GROUP]
                for s in range(1, _GROUP):
                    most = max(most, key[g * _GROUP + s])
                top[g] = most
                high = max(high, most)
            low = _kth_largest(top, n_groups, k, least, high)
            for g in range(n_groups):
                if top[g] >= low:
                    for j in range(g * _GROUP, (g + 1) * _GROUP):
                        column[n_kept], value[n_kept] = j, key[j]
                        n_kept += key[j] >= low
        for j in range(grouped, n):
            column[n_kept], value[n_kept] = j, key[j]
            n_kept += key[j] >= low
            high = max(high, key[j])
        edge = _kth_largest(value, n_kept, k, low, high)
        n_equal = k
        for i in range(n_kept):
            n_equal -= value[i] > edge
        place = 0
        for i in range(n_kept):
            equal = value[i] == edge and n_equal > 0
            if value[i] > edge or equal:
                index[r, place] = column[i]
                place += 1
                n_equal -= equal


@compiled()
def _kth_largest(key: np.ndarray, n: int, k: int, low: Any, high: Any) -> Any:
    """The k-th largest of the first `n` keys, which lies between `low` and `high`."""
    while low < high:
        middle = np.int32((np.int64(low) + high + 1) >> 1)
        n_above = 0
        for i in range(n):
            n_above += key[i] >= middle
        if n_above >= k:
            low = middle
        else:
            high = np.int32(middle - 1)
    return low


@compiled(fastmath=_SUMS)
def products_at(
    start: np.ndarray,
    latent: np.ndarray,
    A: np.ndarray,
    W: np.ndarray,
    out: np.ndarray,
    first: int,
    last: int,
) -> None:
    """`out` [entry] of the rows from `first` to `last`."""
    for r in range(first, last):
        a = A[r]
        for e in range(start[r], start[r + 1]):
            w, total = W[latent[e]], A.dtype.type(0)
            for j in range(len(a)):
                total += a[j] * w[j]
            out[e] = total


@compiled(fastmath=_SUMS)
def residual_and_slope(
    start: np.ndarray,
    latent: np.ndarray,
    value: np.ndarray,
    W: np.ndarray,
    base: np.ndarray,
    scale: float,
    residual: np.ndarray,
    at_z: np.ndarray,
    first: int,
    last: int,
) -> None:
    """`residual` [row d] is the decoded row plus `base`; `at_z` [entry] is `scale` ⟨residual, W⟩
    where the value is positive. A row's dictionary rows are still in the cache when they are read
    again."""
    d = W.shape[1]
    for r in range(first, last):
        sum_, b = residual[r], base[r]
        for j in range(d):
            sum_[j] = b[j]
        for e in range(start[r], start[r + 1]):
            w, v = W[latent[e]], value[e]
            for j in range(d):
                sum_[j] += v * w[j]
        for e in range(start[r], start[r + 1]):
            total = W.dtype.type(0)
            if value[e] > 0:
                w = W[latent[e]]
                for j in range(d):
                    total += sum_[j] * w[j]
            at_z[e] = scale * total


@compiled()
def order_by_latent(
    start: np.ndarray, latent: np.ndarray, order: np.ndarray, row: np.ndarray, ends: np.ndarray
) -> None:
    """`order` and `row` [entry] by latent, equal latents in the order they come in; `ends`
    [latent_and_one] are zeros that become where each latent's entries start."""
    for e in range(len(latent)):
        ends[latent[e] + 1] += 1
    for i in range(len(ends) - 1):
        ends[i + 1] += ends[i]
    next_place = ends[:-1].copy()
    for r in range(len(start) - 1):
        for e in range(start[r], start[r + 1]):
            place = next_place[latent[e]]
            next_place[latent[e]] = place + 1
            order[place], row[place] = e, r


@compiled(fastmath=_SUMS)
def summed_by_latent(
    start: np.ndarray,
    row: np.ndarray,
    weight: np.ndarray,
    A: np.ndarray,
    out: np.ndarray,
    first: int,
    last: int,
) -> None:
    """`out` [latent d] of the latents from `first` to `last`, two entries at a time."""
    d = A.shape[1]
    for i in range(first, last):
        total, e, end = out[i], start[i], start[i + 1]
        total[:] = 0
        while e + 1 < end:
            u, a, v, b = weight[e], A[row[e]], weight[e + 1], A[row[e + 1]]
            for j in range(d):
                total[j] += u * a[j] + v * b[j]
            e += 2
        if e < end:
            u, a = weight[e], A[row[e]]
            for j in range(d):
                total[j] += u * a[j]


@compiled(fastmath=_SUMS)
def row_products(
    a: np.ndarray, b: np.ndarray, square: np.ndarray, product: np.ndarray, first: int, last: int
) -> None:
    """⟨a, a⟩ and ⟨a, b⟩ of each row [row]."""
    for r in range(first, last):
        x, y = a[r], b[r]
        own = across = a.dtype.type(0)
        for j in range(len(x)):
            own += x[j] * x[j]
            across += x[j] * y[j]
        square[r], product[r] = own, across


@compiled(fastmath=_SUMS)
def adam_rows(
    weight: np.ndarray,
    gradient: np.ndarray,
    mean: np.ndarray,
    square: np.ndarray,
    parallel: np.ndarray,
    unit: bool,
    factor: float,
    beta1: float,
    beta2: float,
    rate: float,
    correction: float,
    eps: float,
    first: int,
    last: int,
) -> None:
    """Rows from `first` to `last` [row d]. With `unit`, what is parallel to a row is left out
    (`parallel` [row] is ⟨gradient, weight⟩), and rows end at unit length. `rate` is the learning
    rate over 1 − β₁ⁿ, `correction` is 1 / √(1 − β₂ⁿ)."""
    one = weight.dtype.type(1)
    for r in range(first, last):
        w, g, m, s = weight[r], gradient[r], mean[r], square[r]
        along = parallel[r] if unit else weight.dtype.type(0)
        length = weight.dtype.type(0)
        for j in range(len(w)):
            slope = (g[j] - along * w[j]) * factor
            m[j] = beta1 * m[j] + (one - beta1) * slope
            s[j] = beta2 * s[j] + (one - beta2) * slope * slope
            w[j] -= rate * m[j] / (np.sqrt(s[j]) * correction + eps)
            length += w[j] * w[j]
        if unit:
            inverse = one / np.sqrt(length)
            for j in range(len(w)):
                w[j] *= inverse
