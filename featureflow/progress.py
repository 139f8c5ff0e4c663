"""What a long-running function tells its caller: progress and numbers, through two small callbacks.

Libraries never print and never import a progress bar or an experiment tracker; the command line
passes callbacks that draw bars and write `metrics.jsonl`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

Progress = Callable[[str, int, int], None]
"""`progress(label, done, total)`; called often, cheap to call. `label` names the unit of work, e.g.
``"train L12"``; what follows a `DETAIL` in it are the latest numbers of that unit, which may change
from call to call."""

DETAIL = " · "

Metrics = Callable[[Mapping[str, float | int | str]], None]
"""`metrics(record)`; one flat record per call."""


def silent(label: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""


def discard(record: Mapping[str, float | int | str]) -> None:
    """The metrics callback that keeps nothing."""
