"""Freed memory stays while a training runs and goes back when it ends: seen in the memory the
process holds. Counts of page faults would depend on the size of the system's pages."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from sae.kernels.memory import _glibc, kept_memory

pytestmark = pytest.mark.skipif(_glibc() is None, reason="the switches are glibc's")
_N_NUMBERS = 12 << 20
_BYTES = 4 * _N_NUMBERS


def _resident() -> int:
    """Bytes of memory this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _new_bytes() -> int:
    """Memory that filling a new block of 48 MB takes from the system. The first few still take,
    until free ones fit."""
    before = _resident()
    block = torch.empty(_N_NUMBERS).fill_(1.0)
    taken = _resident() - before
    del block
    return taken


def test_freed_memory_is_kept_inside_and_given_back_after() -> None:
    assert _new_bytes() > 0.9 * _BYTES
    with kept_memory():
        with kept_memory():
            assert min(_new_bytes() for _ in range(12)) < 0.1 * _BYTES
        assert min(_new_bytes() for _ in range(12)) < 0.1 * _BYTES, (
            "an inner block that ends leaves the outer one"
        )
    assert _new_bytes() > 0.9 * _BYTES
