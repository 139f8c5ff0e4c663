"""Memory that a step or a batch frees is kept for the next one, instead of going back to the system
every time.

Otherwise the C library gives large freed blocks back at once, and the next step pays for clearing
every page again, on one thread (measured: a third of the time of the product that fills them).
Inside `kept_memory` it keeps them, process-wide; at the end the defaults return and what is free
goes back. Only glibc has the switches; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_KEEP = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_MAX: 0}
_DEFAULTS = {_TRIM_THRESHOLD: 128 << 10, _MMAP_THRESHOLD: 128 << 10, _MMAP_MAX: 65536}
_lock = threading.Lock()
_n_inside = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory until the last of these blocks ends."""
    _enter(+1, _KEEP)
    try:
        yield
    finally:
        if _enter(-1, _DEFAULTS):
            _give_back()


def _enter(change: int, switches: dict[int, int]) -> bool:
    """Count who is inside; the first to come and the last to go set the switches."""
    global _n_inside
    with _lock:
        before, _n_inside = _n_inside, _n_inside + change
        moved, library = 0 in (before, _n_inside), _glibc()
        if moved and library is not None:
            for name, value in switches.items():
                library.mallopt(name, value)
        return moved


def _give_back() -> None:
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return (
        library
        if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")
        else None
    )
