"""What a batch job reads: rows of one site, or of two for a transcoder, as batches in memory or in
windows of the store.

Up to `max_rows_in_memory` rows are held in memory as float32; more are read in shuffled windows.
Both tell their position and return to it exactly, and name the rows and shards of a bad batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from data.store import ActivationStore
from data.tokens import RowFilters
from featureflow.sites import Site
from pipeline.training.batch_jobs import SaeJob
from sae.batches import Batch, Batches, InMemoryBatches
from sae.normalisation import Normalisation, normalisation_of
from sae.step import Precision

READ_ROWS = 8192


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What all sites of a run share."""

    batch_size: int
    warmup_steps: int
    decay_fraction: float
    clip_norm: float
    precision: Precision
    filters: RowFilters
    max_rows_in_memory: int
    held_out_rows: int
    record_every: int
    checkpoint_every: int
    device: str = "cpu"


def normalisation_at(store: ActivationStore, site: Site) -> Normalisation:
    """The training space of a site, from the statistics kept in the store."""
    statistics = store.statistics(site)
    mean, variance = (
        torch.from_numpy(np.array(statistics.mean)),
        torch.from_numpy(np.array(statistics.variance)),
    )
    return normalisation_of(mean, variance)


def read_rows(
    store: ActivationStore, site: Site, rows: Int64[np.ndarray, "row"]
) -> Float[Tensor, "row d_model"]:
    """The given rows (ascending) of a site."""
    out = torch.empty(len(rows), store.width(site))
    for first in range(0, store.n_rows, READ_ROWS):
        begin, end = np.searchsorted(rows, (first, first + READ_ROWS))
        if end > begin:
            values = store.read(site, int(rows[begin]), int(rows[end - 1]) + 1)
            out[begin:end] = torch.from_numpy(values[rows[begin:end] - rows[begin]])
    return out


def read_batch(store: ActivationStore, sae_job: SaeJob, rows: Int64[np.ndarray, "row"]) -> Batch:
    """The given rows of what an SAE reads and, for a transcoder, of what it predicts."""
    x, *y = (read_rows(store, site, rows) for site in sae_job.sites)
    return Batch(x=x, y=y[0] if y else None)


def held_out_rows(
    sites: Sequence[Site], store: ActivationStore, options: TrainingOptions
) -> Int64[np.ndarray, "row"]:
    """The rows that set thresholds and measure FVU: the first of the held-out ones that training's
    filters keep."""
    return store.kept_rows("validation", options.filters, sites=list(sites))[
        : options.held_out_rows
    ]


class _WindowBatches:
    """Batches read from the store in shuffled windows, for sites that do not fit in memory."""

    def __init__(self, store: ActivationStore, sae_job: SaeJob, options: TrainingOptions) -> None:
        self._sites = sae_job.sites
        self._reader = store.batches(
            list(self._sites),
            batch_size=options.batch_size,
            seed=sae_job.job.seed,
            filters=options.filters,
            device=options.device,
        )

    def next_batch(self) -> Batch:
        parts = next(self._reader)
        return Batch(
            x=parts[self._sites[0]], y=parts[self._sites[1]] if len(self._sites) > 1 else None
        )

    def state(self) -> dict[str, Any]:
        return self._reader.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        self._reader.restore(state)

    def locate(self, rows: Sequence[int]) -> str:
        state = self._reader.state()
        name, shard_rows = _names(self._sites), self._reader.store.shard_rows
        if state["batch"] == 0:
            return f"{name}, the last batch of epoch {state['epoch'] - 1}"
        found = self._reader.rows_of(state["epoch"], state["batch"] - 1)[list(rows)]
        return f"{name}, " + ", ".join(f"row {row} (shard {row // shard_rows})" for row in found)

    def close(self) -> None:
        self._reader.close()


@contextmanager
def reading(sae_job: SaeJob, store: ActivationStore, options: TrainingOptions) -> Iterator[Batches]:
    rows = store.kept_rows("train", options.filters, sites=list(sae_job.sites))
    if len(rows) > options.max_rows_in_memory:
        windows = _WindowBatches(store, sae_job, options)
        try:
            yield windows
        finally:
            windows.close()
        return
    held = read_batch(store, sae_job, rows)
    name, shard_rows = _names(sae_job.sites), store.shard_rows
    yield InMemoryBatches(
        held.x.to(options.device),
        None if held.y is None else held.y.to(options.device),
        batch_size=options.batch_size,
        seed=sae_job.job.seed,
        name_of_row=lambda row: f"{name} row {rows[row]} (shard {rows[row] // shard_rows})",
    )


def _names(sites: Sequence[Site]) -> str:
    return " and ".join(site.short for site in sites)
