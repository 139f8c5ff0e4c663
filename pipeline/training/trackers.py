"""Training curves to an experiment tracker, for those who want one: each record of `metrics.jsonl`
as it is written.

    TensorBoard   scalars `<site>/<number>` in `<artifacts>/<recipe>/tensorboard`
    wandb         the same names in project "featureflow", each site against its own step; its files
    in
                  `<artifacts>/<recipe>/wandb`; WANDB_MODE, WANDB_PROJECT and the rest of its
                  environment hold

A tracker's package is imported when it is asked for and by nothing else. What a tracker is reported
changes no result.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from featureflow.errors import Problem, UserError
from featureflow.progress import Metrics

Tracker = Literal["tensorboard", "wandb"]
Record = Mapping[str, float | int | str]


def check_trackers(names: Sequence[Tracker]) -> None:
    """Raises UserError naming every tracker that is not installed."""
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise UserError(
            "a tracker is not installed",
            problems=tuple(
                Problem(what="no such package", where="train.log_to", found=name)
                for name in missing
            ),
            fix=f"pip install {' '.join(missing)}, or take it out of train.log_to",
        )


@contextmanager
def tracked(
    names: Sequence[Tracker], folder: Path, config: Mapping[str, Any]
) -> Iterator[list[Metrics]]:
    """Open the trackers, yield one callback each, close them. They write below `folder`."""
    with ExitStack() as stack:
        yield [stack.enter_context(_TRACKERS[name](folder, config)) for name in names]


@contextmanager
def _tensorboard(folder: Path, config: Mapping[str, Any]) -> Iterator[Metrics]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def report(record: Record) -> None:
        label, step, numbers = _parts(record)
        for name, value in numbers.items():
            writer.add_scalar(f"{label}/{name}", value, step)

    try:
        yield _one_at_a_time(report)
    finally:
        writer.close()


@contextmanager
def _wandb(folder: Path, config: Mapping[str, Any]) -> Iterator[Metrics]:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    project = os.environ.get("WANDB_PROJECT", "featureflow")
    run = wandb.init(project=project, dir=str(folder), config=dict(config), reinit="create_new")
    known: set[str] = set()

    def report(record: Record) -> None:
        label, step, numbers = _parts(record)
        if label not in known:
            known.add(label)
            run.define_metric(f"{label}/step")
            run.define_metric(f"{label}/*", step_metric=f"{label}/step")
        run.log(
            {f"{label}/step": step} | {f"{label}/{name}": value for name, value in numbers.items()}
        )

    failed = 1
    try:
        yield _one_at_a_time(report)
        failed = 0
    finally:
        run.finish(exit_code=failed)


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


def _parts(record: Record) -> tuple[str, int, dict[str, float]]:
    """Whose record it is, its step, and its numbers."""
    of = str(record.get("of", "")).rpartition("/")[2]
    label = f"{record['site']} {of}".strip()
    numbers = {
        name: value
        for name, value in record.items()
        if isinstance(value, (int, float)) and name != "step"
    }
    return (
        label,
        int(record.get("step", 0)),
        {name: float(value) for name, value in numbers.items()},
    )


def _one_at_a_time(report: Callable[[Record], None]) -> Metrics:
    """Sites train in several threads."""
    lock = threading.Lock()

    def locked(record: Record) -> None:
        with lock:
            report(record)

    return locked
