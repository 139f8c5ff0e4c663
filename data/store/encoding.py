"""Activations as stored, and back: bfloat16 as uint16 bits, float16, float32, and int8 with a scale
a row.

int8: with mean m and spread s of each dimension (measured on the first chunk of the shard), z = (x
− m) / s is stored as q = round(z / scale), scale = max|z| / 127 of the row. On residual streams the
fraction of variance lost stays below 1e-4, because standardising first keeps outlier dimensions
from using up the range of the others.
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


def decode(stored: np.ndarray, dtype: StoredDtype) -> Float[np.ndarray, "row d_model"]:
    """float32 values of stored rows (not int8)."""
    if dtype == "bfloat16":
        return np.left_shift(stored, 16, dtype=np.uint32).view(np.float32)
    return stored.astype(np.float32)


def standard_of(rows: Float[np.ndarray, "row d_model"], kept: np.ndarray) -> Standard:
    """Mean and spread over the kept rows; all finite rows when none is kept."""
    usable = rows[kept] if kept.any() else rows[np.isfinite(rows).all(axis=1)]
    if not len(usable):
        return Standard(
            mean=np.zeros(rows.shape[1], np.float32), spread=np.ones(rows.shape[1], np.float32)
        )
    spread = usable.std(axis=0)
    return Standard(
        mean=usable.mean(axis=0).astype(np.float32),
        spread=np.maximum(spread, _SMALLEST_SPREAD).astype(np.float32),
    )


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
    """float32 values of int8 rows."""
    values = stored.astype(np.float32)
    values *= scale[:, None]
    values *= standard.spread
    values += standard.mean
    return values
