"""Whether a plan fits in memory, before anything is trained: bytes in use at the worst moment
against what is free.

Per worker: the batch job's rows (or two windows of them), once; for each of its dictionaries the
weights, two moments, gradients and a rounded copy of the encoder; the batch's residuals and a block
of pre-activations; and for architectures that PyTorch differentiates, about six `batch × latent`
matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from data.store import ActivationStore
from featureflow.errors import UserError
from pipeline.training.batch_jobs import BatchJob, SaeJob
from pipeline.training.reading import TrainingOptions
from sae.kernels.select import BLOCK_BYTES

_SHARE_OF_FREE = 0.9
_WINDOW_BYTES = 1 << 30
_DENSE_KINDS = ("relu_l1", "gated", "jump_relu")


def check_memory(
    batch_jobs: Sequence[BatchJob], store: ActivationStore, options: TrainingOptions, n_workers: int
) -> None:
    """Raises UserError with what would fit."""
    free = int(_free_bytes(options.device) * _SHARE_OF_FREE)
    costs = sorted((_bytes(batch_job, store, options) for batch_job in batch_jobs), reverse=True)
    needed = sum(costs[:n_workers])
    if needed <= free:
        return
    raise UserError(
        "training would need more memory than there is",
        expected=f"at most {free / 1e9:.1f} GB on {options.device}",
        found=f"{needed / 1e9:.1f} GB for {min(n_workers, len(batch_jobs))} sites at once",
        fix=_what_fits(batch_jobs, store, options, costs, free),
    )


def _bytes(batch_job: BatchJob, store: ActivationStore, options: TrainingOptions) -> int:
    latents = sum(
        sae_job.job.n_latents * _bytes_per_latent(sae_job, store, options) for sae_job in batch_job
    )
    return _row_bytes(batch_job, store, options) + latents


def _row_bytes(batch_job: BatchJob, store: ActivationStore, options: TrainingOptions) -> int:
    width = _width(batch_job, store)
    rows = min(store.n_rows, options.max_rows_in_memory)
    held = 4 * width * rows if store.n_rows <= options.max_rows_in_memory else _WINDOW_BYTES
    return held + 4 * width * (options.held_out_rows + 4 * options.batch_size) + BLOCK_BYTES


def _width(batch_job: BatchJob, store: ActivationStore) -> int:
    """Numbers of a row: those of both sites for a transcoder."""
    return sum(store.width(site) for site in batch_job[0].sites)


def _bytes_per_latent(sae_job: SaeJob, store: ActivationStore, options: TrainingOptions) -> int:
    """Two matrices with two moments and a gradient each, a half-width copy, and dense latents where
    there are any."""
    dense = 6 * 4 * options.batch_size if sae_job.job.architecture.kind in _DENSE_KINDS else 0
    return store.width(sae_job.job.site) * (2 * 4 * 4 + 2) + dense


def _free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _what_fits(
    batch_jobs: Sequence[BatchJob],
    store: ActivationStore,
    options: TrainingOptions,
    costs: Sequence[int],
    free: int,
) -> str:
    """Fewer workers if that is enough; else the most latents that fit beside the rows."""
    fitting = 0
    while fitting < len(costs) and sum(costs[: fitting + 1]) <= free:
        fitting += 1
    if fitting:
        return f"use --threads {fitting}"
    worst = max(batch_jobs, key=lambda batch_job: _bytes(batch_job, store, options))
    left = free - _row_bytes(worst, store, options)
    if left <= 0:
        most = free // 2 // (4 * _width(worst, store))
        return f"set train.max_rows_in_memory = {most} (or fewer), so that rows are read in windows"
    most = left // sum(_bytes_per_latent(sae_job, store, options) for sae_job in worst)
    shorter = ", or take variants out of train.sweep" if len(worst) > 1 else ""
    return f"set train.n_latents = {most} (or fewer){shorter}, and use --threads 1"
