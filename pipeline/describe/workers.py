"""Jobs of one site each, as many at a time as the machine has cores, or on the workers of a Dask
scheduler.

A killed run leaves what its finished sites wrote; an interrupt does not wait for sites that have
not begun.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import as_completed as completed
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from typing import Any

import torch
from distributed import Client, as_completed

from pipeline.context import RunContext
from sae.kernels.memory import kept_memory

Job = Callable[[str], Any]
"""What is done for one site, by short name; it and its result travel to other processes."""
EachSite = Callable[[str, Job, Sequence[str]], list[Any]]
"""`each_site(verb, job, sites)`: run a job for every site and return the results in the order in
which they came; the first failure is raised."""


@contextmanager
def site_workers(context: RunContext, n_sites: int) -> Iterator[EachSite]:
    """Workers for jobs over sites: this process, others, or those of `context.scheduler`."""
    with _runner(context, n_sites) as run:

        def each_site(verb: str, job: Job, sites: Sequence[str]) -> list[Any]:
            results: list[Any] = []
            context.progress(verb, 0, len(sites))
            for result in run(job, sites):
                results.append(result)
                context.progress(verb, len(results), len(sites))
            return results

        yield each_site


@contextmanager
def _runner(
    context: RunContext, n_sites: int
) -> Iterator[Callable[[Job, Sequence[str]], Iterator[Any]]]:
    if context.scheduler not in (None, "local"):
        with Client(context.scheduler) as client:
            yield lambda job, sites: (
                f.result() for f in as_completed([client.submit(job, s, pure=False) for s in sites])
            )
        return
    n_processes = min(max(context.n_workers, context.n_threads), n_sites)
    if n_processes <= 1:
        yield lambda job, sites: map(job, sites)
        return
    pool = ProcessPoolExecutor(
        n_processes, mp_context=get_context("spawn"), initializer=_begin_worker
    )
    try:
        yield lambda job, sites: (
            f.result() for f in completed([pool.submit(job, s) for s in sites])
        )
    except BaseException:
        for worker in list((pool._processes or {}).values()):
            worker.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _begin_worker() -> None:
    """One thread; freed memory stays with the process until it ends."""
    torch.set_num_threads(1)
    _memory.enter_context(kept_memory())


_memory = ExitStack()
