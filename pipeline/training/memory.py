"""Whether a plan fits in memory, before anything is trained: bytes in use at the worst moment against what is free.

Per worker: the site's rows (or two windows of them), weights, two moments, gradients and a rounded copy of the encoder;
the batch's residuals; and for architectures that PyTorch differentiates, about six `batch × latent` matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import psutil
import torch

from data.store import ActivationStore
from pipeline.training.plan import SiteJob
from pipeline.training.site import TrainingOptions
from sae.errors import UserError

_SHARE_OF_FREE = 0.9
_WINDOW_BYTES = 1 << 30
_DENSE_KINDS = ("relu_l1", "gated", "jump_relu")


def check_memory(jobs: Sequence[SiteJob], store: ActivationStore, options: TrainingOptions, n_workers: int) -> None:
    """Raises UserError with what would fit."""
    free = int(_free_bytes(options.device) * _SHARE_OF_FREE)
    costs = sorted((_bytes(job, store, options) for job in jobs), reverse=True)
    needed = sum(costs[:n_workers])
    if needed <= free:
        return
    raise UserError(
        "training would need more memory than there is",
        expected=f"at most {free / 1e9:.1f} GB on {options.device}",
        found=f"{needed / 1e9:.1f} GB for {min(n_workers, len(jobs))} sites at once",
        mend=_what_fits(jobs, store, options, costs, free),
    )


def _bytes(job: SiteJob, store: ActivationStore, options: TrainingOptions) -> int:
    return _row_bytes(job, store, options) + job.n_latents * _bytes_per_latent(job, store, options)


def _row_bytes(job: SiteJob, store: ActivationStore, options: TrainingOptions) -> int:
    width = store.width(job.site)
    rows = min(store.n_rows, options.max_rows_in_memory)
    held = 4 * width * rows if store.n_rows <= options.max_rows_in_memory else _WINDOW_BYTES
    return held + 4 * width * (options.held_out_rows + 4 * options.batch_size)


def _bytes_per_latent(job: SiteJob, store: ActivationStore, options: TrainingOptions) -> int:
    """Two matrices with two moments and a gradient each, a half-width copy, and dense latents where there are any."""
    dense = 6 * 4 * options.batch_size if job.architecture.kind in _DENSE_KINDS else 0
    return store.width(job.site) * (2 * 4 * 4 + 2) + dense


def _free_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def _what_fits(
    jobs: Sequence[SiteJob], store: ActivationStore, options: TrainingOptions, costs: Sequence[int], free: int
) -> str:
    """Fewer workers if that is enough; else the most latents that fit beside the rows."""
    fitting = 0
    while fitting < len(costs) and sum(costs[: fitting + 1]) <= free:
        fitting += 1
    if fitting:
        return f"use --threads {fitting}"
    worst = max(jobs, key=lambda job: _bytes(job, store, options))
    left = free - _row_bytes(worst, store, options)
    if left <= 0:
        most = free // 2 // (4 * store.width(worst.site))
        return f"set train.max_rows_in_memory = {most} (or fewer), so that rows are read in windows"
    return f"set train.n_latents = {left // _bytes_per_latent(worst, store, options)} (or fewer), and use --threads 1"
