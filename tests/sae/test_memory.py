"""Freed memory stays while a training runs and goes back when it ends: seen in the new pages the
process asks for."""

from __future__ import annotations

import resource

import pytest
import torch

from sae.kernels.memory import _glibc, kept_memory

pytestmark = pytest.mark.skipif(_glibc() is None, reason="the switches are glibc's")
_N_NUMBERS = 12 << 20
_PAGES = 4 * _N_NUMBERS // 4096


def _new_pages() -> int:
    """Pages that filling a new block of 48 MB asks the system for. The first few still ask, until
    free ones fit."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(_N_NUMBERS).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_kept_inside_and_given_back_after() -> None:
    assert _new_pages() > 0.9 * _PAGES
    with kept_memory():
        with kept_memory():
            assert min(_new_pages() for _ in range(12)) < 0.1 * _PAGES
        assert min(_new_pages() for _ in range(12)) < 0.1 * _PAGES, (
            "an inner block that ends leaves the outer one"
        )
    assert _new_pages() > 0.9 * _PAGES
