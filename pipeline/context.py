"""What every stage is handed besides config and inputs: how to report, where to compute. It changes
no result."""

from __future__ import annotations

from dataclasses import dataclass, field

from featureflow.progress import Metrics, Progress, discard, silent


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """`device` is a torch device; `scheduler` is `None` (this process), `"local"` with `n_workers`,
    or a Dask scheduler address such as `tcp://10.0.0.1:8786`; `n_threads` is how many cores a stage
    may use."""

    progress: Progress = field(default=silent)
    metrics: Metrics = field(default=discard)
    device: str = "cpu"
    n_threads: int = 2
    scheduler: str | None = None
    n_workers: int = 0
