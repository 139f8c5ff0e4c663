"""Options that several commands share, and what they become: a run's folder, a RunContext."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click
import torch

from pipeline.cli.given import remember
from pipeline.context import RunContext

PATH, THERE = click.Path(path_type=Path), click.Path(path_type=Path, exists=True)
_RUN_OPTIONS = (
    click.option(
        "--recipe",
        "-r",
        default="laptop",
        callback=remember,
        help="name of a recipe in configs/, or a TOML file",
    ),
    click.option(
        "--name",
        callback=remember,
        help="name of this run: its folder below --artifacts, for variants beside each other. What "
        "the recipe's own run has as it is wanted here, from collect to link, is shared with it  "
        "[default: the recipe's name]",
    ),
    click.option(
        "--artifacts",
        type=PATH,
        default=Path("artifacts"),
        callback=remember,
        help="folder that holds one folder of artifacts per run",
    ),
)
_MACHINE_OPTIONS = (
    click.option("--device", default="auto", help="torch device: cpu, cuda, cuda:1, mps, or auto"),
    click.option("--threads", default=0, help="cores to use; 0: all that this process may"),
    click.option(
        "--scheduler", help="address of a Dask scheduler that runs, such as tcp://10.0.0.1:8786"
    ),
    click.option(
        "--workers", default=0, help="start a local Dask cluster with this many worker processes"
    ),
)
quiet_option = click.option("--quiet", "-q", is_flag=True, help="no progress bars")
device_option = click.option("--device", default="cpu", help="torch device of the model")


def run_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--recipe --name --artifacts`: which run."""
    for option in reversed(_RUN_OPTIONS):
        command = option(command)
    return command


def of_a_run(command: Callable[..., Any]) -> Callable[..., Any]:
    """The same options for a tool that looks at a run: it is called with the run's `folder`."""

    @wraps(command)
    def with_folder(
        *args: Any, recipe: str, name: str | None, artifacts: Path, **others: Any
    ) -> Any:
        return command(*args, folder=run_folder(artifacts, recipe, name), **others)

    return run_options(with_folder)


def machine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--device --threads --scheduler --workers`: where to compute; they never change a result."""
    for option in reversed(_MACHINE_OPTIONS):
        command = option(command)
    return command


def run_folder(artifacts: Path, recipe: str, name: str | None = None) -> Path:
    """`artifacts/<name>`, by default that of the recipe: its file without `.toml`, other dots kept.
    Raises click.UsageError for a name that is no single folder, or that of a file."""
    if name is None:
        return artifacts / Path(recipe).name.removesuffix(".toml")
    if name in ("", ".", "..") or Path(name).name != name or name.endswith(".toml"):
        raise click.UsageError(f"--name is the name of one folder, and no file's, not {name!r}")
    return artifacts / name


def run_context(
    *, device: str, threads: int, scheduler: str | None, workers: int, progress: Any
) -> RunContext:
    """The RunContext that the machine options describe; sets torch's thread count."""
    n_threads = threads or _n_cores()
    torch.set_num_threads(n_threads)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = scheduler or ("local" if workers else None)
    return RunContext(
        progress=progress, device=device, n_threads=n_threads, scheduler=where, n_workers=workers
    )


def _n_cores() -> int:
    """Cores this process may use; where the system does not say (macOS, Windows), all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
