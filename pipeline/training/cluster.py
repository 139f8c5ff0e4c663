"""The batch jobs of a plan on a Dask cluster: one task a site, each waiting for the site it starts
from.

Workers open the store by its URL and write into the artifact's folder, so both must be visible to
all of them. A task run again, because its worker died, continues at the site's last checkpoint; a
finished site is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from distributed import Client, as_completed

from data.store import ActivationStore
from featureflow.errors import UserError
from featureflow.progress import Progress
from featureflow.sites import Site
from pipeline.training.batch_jobs import BatchJob
from pipeline.training.reading import TrainingOptions
from pipeline.training.site import train_batch_job

_RETRIES = 2
Described = dict[str, dict[str, Any]]
"""Metadata of a batch job's dictionaries, by folder."""
Outcome = Described | UserError


def run_on_cluster(
    client: Client,
    batch_jobs: Mapping[Site, BatchJob],
    store: ActivationStore,
    options: TrainingOptions,
    folder: Path,
    *,
    n_threads: int | None,
    progress: Progress,
) -> dict[Site, Described]:
    """Every batch job's result; `batch_jobs` come parents first. `n_threads` of each worker; None
    leaves it to the worker. Raises the first UserError."""
    futures: dict[Site, Any] = {}
    for site, batch_job in batch_jobs.items():
        parents = [
            futures[sae_job.job.parent] for sae_job in batch_job if sae_job.job.parent is not None
        ]
        futures[site] = client.submit(
            _train,
            batch_job,
            store.url,
            options,
            str(folder),
            n_threads,
            *parents[:1],
            pure=False,
            retries=_RETRIES,
        )
    done: dict[Site, Described] = {}
    for future in as_completed(list(futures.values())):
        outcome = future.result()
        if isinstance(outcome, UserError):
            client.cancel(list(futures.values()))
            raise outcome
        site = next(site for site, other in futures.items() if other.key == future.key)
        done[site] = outcome
        progress("train", len(done), len(batch_jobs))
    return done


def _train(
    batch_job: BatchJob,
    url: str,
    options: TrainingOptions,
    folder: str,
    n_threads: int | None,
    parent: Outcome | None = None,
) -> Outcome:
    """One site, on a worker. A UserError comes back as a value: running the task again would not
    help."""
    if isinstance(parent, UserError):
        return parent
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    place = Path(folder)
    try:
        if not place.parent.is_dir():
            raise UserError(
                "this worker cannot see the artifact's folder",
                where=folder,
                expected="a shared folder",
            )
        return train_batch_job(batch_job, ActivationStore.open(url), options, place)
    except UserError as error:
        return error
