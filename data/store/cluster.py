"""Shards on several processes or machines, through Dask. One task is one shard; what travels is a
token table.

Without a scheduler the same functions run here, one shard after the other. Dask only says who does
what: a task that is run twice, on a worker that died or was thought dead, finds the shard recorded
or claims and writes it anew, and what is finished is known from the shard records, never from the
scheduler.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from distributed import Client, KilledWorker, LocalCluster, as_completed
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError

from featureflow.errors import UserError
from featureflow.progress import Progress

Task = TypeVar("Task")
Result = TypeVar("Result")
_RETRIES = 2
_CONNECT_SECONDS = 15


class Machines(Protocol):
    """Where to compute: `pipeline.context.RunContext` is one."""

    @property
    def progress(self) -> Progress: ...
    @property
    def scheduler(self) -> str | None: ...
    @property
    def n_workers(self) -> int: ...
    @property
    def n_threads(self) -> int: ...


@contextmanager
def connected(machines: Machines) -> Iterator[Client | None]:
    """A Dask client: of the scheduler's address, of workers started here for `local`, or None
    without a scheduler."""
    if machines.scheduler is None:
        yield None
        return
    if machines.scheduler == "local":
        n_workers = max(1, machines.n_workers)
        with (
            LocalCluster(
                n_workers=n_workers, threads_per_worker=1, processes=True, dashboard_address=None
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = Client(machines.scheduler, timeout=_CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        raise UserError(
            "no Dask scheduler answers",
            where=machines.scheduler,
            found=str(error) or type(error).__name__,
            fix="start one with `dask scheduler`, workers with `dask worker <address> --nthreads "
            "1`",
        ) from error
    with client:
        yield client


def map_shards(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    machines: Machines,
    *,
    client: Client | None = None,
) -> Iterator[Result]:
    """The results of `function` for every task, as they finish. Raises UserError for a worker that
    dies again and again or a scheduler that is gone; a UserError of a task is raised here, not
    retried."""
    if client is not None:
        yield from _map_on(client, function, tasks)
        return
    with connected(machines) as own:
        yield from map(function, tasks) if own is None else _map_on(own, function, tasks)


def threads_of_worker(machines: Machines) -> int | None:
    """Torch threads of each worker: a share of this machine's for local workers; None leaves it to
    a remote worker."""
    return (
        max(1, machines.n_threads // max(1, machines.n_workers))
        if machines.scheduler == "local"
        else None
    )


def _map_on(
    client: Client, function: Callable[[Task], Result], tasks: Sequence[Task]
) -> Iterator[Result]:
    """Two tasks a worker are under way at a time, so that the scheduler never holds all token
    tables."""
    waiting = iter(tasks)
    n_workers = len(client.scheduler_info(n_workers=-1)["workers"])
    first = itertools.islice(waiting, max(2, 2 * n_workers))
    with _explained():
        futures = as_completed([_submit(client, function, task) for task in first])
        for future in futures:
            failed, result = future.result()
            future.release()
            if failed:
                raise result
            futures.update(_submit(client, function, task) for task in itertools.islice(waiting, 1))
            yield result


def _submit(client: Client, function: Callable[[Task], Result], task: Task) -> Any:
    return client.submit(_guarded, function, task, pure=False, retries=_RETRIES)


def _guarded(function: Callable[[Task], Result], task: Task) -> tuple[bool, Result | UserError]:
    """A UserError comes back as a value: running the task again would not help."""
    try:
        return False, function(task)
    except UserError as error:
        return True, error


@contextmanager
def _explained() -> Iterator[None]:
    fix = "run again: finished shards are kept"
    try:
        yield
    except KilledWorker as error:
        raise UserError(
            "workers died again and again at one shard",
            found=str(error).split(". ")[0],
            expected="workers with enough memory for the model and one batch",
            fix=fix,
        ) from error
    except (CommClosedError, FutureCancelledError, TimeoutError) as error:
        raise UserError(
            "the Dask scheduler is gone", found=type(error).__name__, fix=fix
        ) from error
