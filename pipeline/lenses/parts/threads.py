"""Sites looked at side by side: as many at once as a run may use cores, one thread each.

Torch and compiled loops release the interpreter's lock, so threads share what the run has open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from pipeline.context import RunContext

Item, Found = TypeVar("Item"), TypeVar("Found")


def side_by_side(
    context: RunContext, look: Callable[[Item], Found], items: Sequence[Item]
) -> Iterator[Found]:
    """`look(item)` for each, in order. The first failure is raised, and what has not begun then is
    left."""
    before, n_workers = torch.get_num_threads(), max(1, min(context.n_threads, len(items)))
    pool = ThreadPoolExecutor(n_workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(look, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
