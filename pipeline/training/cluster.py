"""The jobs of a plan on a Dask cluster: one task a site, each waiting for the site it starts from.

Workers open the store by its URL and write into the artifact's folder, so both must be visible to all of them. A task
run again, because its worker died, continues at the site's last checkpoint; a finished site is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data.sites import Site
from data.store import ActivationStore
from pipeline.training.plan import SiteJob
from pipeline.training.site import TrainingOptions, train_site
from sae.errors import UserError
from sae.report import Progress

if TYPE_CHECKING:
    from distributed import Client

_RETRIES = 2
Outcome = dict[str, Any] | UserError


def run_jobs_on_cluster(
    client: Client,
    jobs: Sequence[SiteJob],
    store: ActivationStore,
    options: TrainingOptions,
    folder: Path,
    *,
    n_threads: int | None,
    progress: Progress,
) -> dict[Site, dict[str, Any]]:
    """Every job's result. `n_threads` of each worker; None leaves it to the worker. Raises the first UserError."""
    from distributed import as_completed

    futures: dict[Site, Any] = {}
    for job in jobs:
        parent = None if job.parent is None else futures[job.parent]
        futures[job.site] = client.submit(
            _train, job, store.url, options, str(folder), n_threads, parent, pure=False, retries=_RETRIES
        )
    done: dict[Site, dict[str, Any]] = {}
    for future in as_completed(list(futures.values())):
        outcome = future.result()
        if isinstance(outcome, UserError):
            client.cancel(list(futures.values()))
            raise outcome
        site = next(site for site, other in futures.items() if other.key == future.key)
        done[site] = outcome
        progress("train", len(done), len(jobs))
    return done


def _train(
    job: SiteJob, url: str, options: TrainingOptions, folder: str, n_threads: int | None, parent: Outcome | None
) -> Outcome:
    """One site, on a worker. A UserError comes back as a value: running the task again would not help."""
    if isinstance(parent, UserError):
        return parent
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    place = Path(folder)
    try:
        if not place.parent.is_dir():
            raise UserError("this worker cannot see the artifact's folder", where=folder, expected="a shared folder")
        return train_site(job, ActivationStore.open(url), options, place)
    except UserError as error:
        return error
