"""Activations as stored, and back: bfloat16 as uint16 bits, float16, float32, and int8 with a scale
a row.

int8: with mean m and spread s of each dimension in the chunk, z = (x − m) / s is stored as
q = round(z / scale), scale = max|z| / 127 of the row. On residual streams the fraction of variance
lost stays below 1e-4, because standardising first keeps outlier dimensions from using up the range
of the others. The loss of every chunk is measured: over the kept rows, and a hundredth of that over
all finite ones. The writer refuses more than `MOST_LOST`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data.store.layout import STORED_AS, StoredDtype

_TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SMALLEST_SPREAD = 1e-6
_QUIET = 1e-3


@dataclass(frozen=True, kw_only=True)
class Standard:
    """Mean and spread of each dimension, what int8 rows are relative to."""

    mean: Float[np.ndarray, "d_model"]
    spread: Float[np.ndarray, "d_model"]


def encode(rows: Tensor | np.ndarray, dtype: StoredDtype) -> np.ndarray:
    """Rows in the stored dtype (not int8). A tensor that already has it is viewed, not copied."""
    if isinstance(rows, np.ndarray):
        if dtype != "bfloat16":
            return np.ascontiguousarray(rows, dtype=STORED_AS[dtype])
        rows = torch.from_numpy(np.require(rows, dtype=np.float32, requirements=["C", "W"]))
    rows = rows.detach().to(device="cpu", dtype=_TORCH[dtype]).contiguous()
    return rows.view(torch.uint16).numpy() if dtype == "bfloat16" else rows.numpy()


def decode(
    stored: np.ndarray, dtype: StoredDtype, *, out: Float[np.ndarray, "row d_model"] | None = None
) -> Float[np.ndarray, "row d_model"]:
    """float32 values of stored rows (not int8), in `out` if it is given."""
    out = np.empty(stored.shape, np.float32) if out is None else out
    if dtype == "bfloat16":
        np.left_shift(stored, 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[...] = stored
    return out


MOST_LOST = 1e-3
"""The fraction of a chunk's variance that int8 may lose."""
_SHARE_OF_OTHERS = 0.01  # of flagged rows (massive first tokens) 10 % may be lost


def quantise(
    rows: Float[np.ndarray, "row d_model"], kept: np.ndarray
) -> tuple[Standard, np.ndarray, Float[np.ndarray, "row"], float]:
    """A chunk as int8: what its rows are relative to, the rows, their scales, and the fraction of
    variance that is lost. Mean and spread are of the kept rows; of all finite ones in dimensions
    that only the other rows use, and everywhere if that loses less."""
    finite = np.isfinite(rows).all(axis=1)
    everywhere = _standard_of(rows[finite])
    ordinary = _standard_of(rows[kept & finite]) if (kept & finite).any() else everywhere
    is_quiet = ordinary.spread < _QUIET * everywhere.spread
    mixed = Standard(
        mean=ordinary.mean, spread=np.where(is_quiet, everywhere.spread, ordinary.spread)
    )
    tried = []
    for standard in (mixed, everywhere):
        stored, scale = encode_int8(rows, standard)
        back = decode_int8(stored, scale, standard)
        loss = max(
            _lost(rows[kept & finite], back[kept & finite]),
            _SHARE_OF_OTHERS * _lost(rows[finite], back[finite]),
        )
        tried.append((standard, stored, scale, loss))
        if loss <= MOST_LOST:
            break
    return min(tried, key=lambda each: each[3])


def _standard_of(rows: Float[np.ndarray, "row d_model"]) -> Standard:
    if not len(rows):
        zeros = np.zeros(rows.shape[1], np.float32)
        return Standard(mean=zeros, spread=zeros + 1)
    return Standard(
        mean=rows.mean(axis=0).astype(np.float32),
        spread=np.maximum(rows.std(axis=0), _SMALLEST_SPREAD).astype(np.float32),
    )


def _lost(rows: np.ndarray, back: np.ndarray) -> float:
    """Fraction of the rows' variance that `back` misses; rounding of float32 counts as variance."""
    if not len(rows):
        return 0.0
    exact = rows.astype(np.float64)
    total = ((exact - exact.mean(axis=0)) ** 2).sum()
    rounding = 1e-10 * (exact**2).sum()
    return float(((exact - back) ** 2).sum() / max(total, rounding, 1e-300))


def encode_int8(
    rows: Float[np.ndarray, "row d_model"], standard: Standard
) -> tuple[np.ndarray, Float[np.ndarray, "row"]]:
    """int8 rows and their scales. A row that is not finite gets scale NaN, so that it reads as NaN,
    not as a number."""
    z = (rows - standard.mean) / standard.spread
    largest = np.abs(z).max(axis=1)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    finite = np.isfinite(scale)
    quantised = np.rint(np.where(finite[:, None], z, 0) / np.where(finite, scale, 1)[:, None])
    return np.clip(quantised, -127, 127).astype(np.int8), np.where(finite, scale, np.nan).astype(
        np.float32
    )


def decode_int8(
    stored: np.ndarray, scale: Float[np.ndarray, "row"], standard: Standard
) -> Float[np.ndarray, "row d_model"]:
    """float32 values of the int8 rows of one chunk."""
    values = stored.astype(np.float32)
    values *= scale[:, None]
    values *= standard.spread
    values += standard.mean
    return values
