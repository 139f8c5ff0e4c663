"""Collection on a Dask cluster: one task runs the model over one shard's tokens and writes that
shard for all sites.

A worker loads the model once and keeps it. The task carries the token columns (about 13 bytes a
row) and brings back a line; activations go from the model straight to the store, which every worker
must reach under the same path or URL.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from data.model.spec import ModelSpec
from data.store.cluster import Machines, connected, map_shards, threads_of_worker
from data.store.collection import CollectedShard, collect_shards
from data.store.writer import StoreWriter
from data.tokens import TokenTable
from featureflow.errors import UserError
from featureflow.sites import Site

if TYPE_CHECKING:
    from data.model.language_model import LanguageModel


_ONE_SHARD = threading.Lock()
"""A worker has one model, whose hooks serve one shard at a time, whatever its --nthreads."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """What a worker needs to load the model, and to see that it is the same one."""

    spec: ModelSpec
    dtype: str
    device: str
    fingerprint: str


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One shard to collect."""

    url: str
    shard: int
    tokens: TokenTable
    model: ModelChoice
    sites: tuple[Site, ...]
    batch_rows: int
    n_threads: int | None
    allow_non_finite: bool


def collect_on_cluster(
    writer: StoreWriter,
    shards: Sequence[tuple[int, TokenTable]],
    *,
    model: ModelChoice,
    sites: Sequence[Site],
    batch_rows: int,
    machines: Machines,
) -> Iterator[CollectedShard]:
    """Collect shards on the workers; yields each as it is finished. Raises UserError."""
    tasks = [
        ShardTask(
            url=writer.place.url,
            shard=shard,
            tokens=TokenTable(
                id=table.id, document=table.document, position=table.position, flags=table.flags
            ),
            model=model,
            sites=tuple(sites),
            batch_rows=batch_rows,
            n_threads=threads_of_worker(machines),
            allow_non_finite=writer.allow_non_finite,
        )
        for shard, table in shards
    ]
    with connected(machines) as client:
        yield from map_shards(collect_task, tasks, machines, client=client)


def collect_task(task: ShardTask) -> CollectedShard:
    """Runs on a worker."""
    with _ONE_SHARD:
        return _collect(task)


def _collect(task: ShardTask) -> CollectedShard:
    import torch

    if task.n_threads is not None:
        torch.set_num_threads(task.n_threads)
    model = _loaded(task.model)
    if model.fingerprint != task.model.fingerprint:
        raise UserError(
            "a worker has another model under this name",
            expected=task.model.fingerprint[:16],
            found=model.fingerprint[:16],
            fix="give every worker the same files and versions",
        )
    done: list[CollectedShard] = []
    writer = StoreWriter.attach(task.url, allow_non_finite=task.allow_non_finite)
    collect_shards(
        model,
        writer,
        [(task.shard, task.tokens)],
        task.sites,
        batch_rows=task.batch_rows,
        rows_done=lambda n: None,
        shard_done=done.append,
    )
    return done[0]


@lru_cache(maxsize=1)
def _loaded(choice: ModelChoice) -> LanguageModel:
    from data.model.language_model import LanguageModel

    return LanguageModel.open(choice.spec, dtype=choice.dtype, device=choice.device)
