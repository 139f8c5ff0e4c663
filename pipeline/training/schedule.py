"""Jobs that wait for their parents, over the cores: every worker trains one site at a time on its
own threads.

1. A job is ready when its parent is finished; ready jobs start in the plan's order.
2. `n_threads` cores are shared by as many workers as there can be jobs at once; a job that has its
   generation to itself gets them all. A job's thread count depends on the plan only, so that a
   resumed run computes the same bits.
3. The first failure, or an interrupt, stops all workers after their present step; their checkpoints
   stay.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import torch

from featureflow.sites import Site
from pipeline.training.plan import SiteJob

Work = Callable[[SiteJob, Callable[[], bool]], dict[str, Any]]
"""`work(job, stopping)` trains one site and returns what is known about it."""


def run_jobs(
    jobs: Sequence[SiteJob], work: Work, *, n_workers: int, n_threads: int
) -> dict[Site, dict[str, Any]]:
    """Every job's result. Raises what the first failing job raised."""
    width_of = _generation_widths(jobs)
    stop = threading.Event()
    waiting, done = list(jobs), dict[Site, dict[str, Any]]()
    running: dict[Future[dict[str, Any]], SiteJob] = {}

    def start(job: SiteJob) -> dict[str, Any]:
        torch.set_num_threads(max(1, n_threads // min(n_workers, width_of[job.site])))
        return work(job, stop.is_set)

    with _threads_restored(), ThreadPoolExecutor(n_workers, thread_name_prefix="train") as pool:
        try:
            while waiting or running:
                for job in _ready(waiting, done, n_workers - len(running)):
                    waiting.remove(job)
                    running[pool.submit(start, job)] = job
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    done[running[future].site] = future.result()
                    del running[future]
        finally:
            stop.set()
    return done


def widest(jobs: Sequence[SiteJob]) -> int:
    """How many jobs can run at once, at most: the widest generation of the plan."""
    return max(_generation_widths(jobs).values(), default=1)


def _generation_widths(jobs: Sequence[SiteJob]) -> dict[Site, int]:
    """For each job, how many jobs are as many steps away from a random start: they may all run at
    once."""
    generation: dict[Site, int] = {}
    for job in jobs:
        generation[job.site] = 0 if job.parent is None else generation[job.parent] + 1
    counts = Counter(generation.values())
    return {site: counts[depth] for site, depth in generation.items()}


def _ready(waiting: Sequence[SiteJob], done: dict[Site, Any], n_free: int) -> list[SiteJob]:
    return [job for job in waiting if job.parent is None or job.parent in done][: max(0, n_free)]


@contextmanager
def _threads_restored() -> Iterator[None]:
    """Workers set their own thread counts; part of that setting belongs to the whole process."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
