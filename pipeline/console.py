"""What a person sees in the terminal: bars with an ETA while a stage works, one line when it is
done, errors that help.

Bars appear only on a terminal and only for work that takes longer than two seconds; piped output
gets plain lines.
"""

from __future__ import annotations

import codecs
import io
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from featureflow.progress import DETAIL, silent

_PATIENCE = 2.0
_UNLIMITED = 100_000


@dataclass(kw_only=True)
class Bars:
    """A progress callback that draws one bar a unit of work, its latest numbers before it, and
    leaves a line when a unit with numbers ends. A bar waits `_PATIENCE` seconds before it shows."""

    progress: Progress
    _tasks: dict[str, TaskID] = field(default_factory=dict)
    _since: dict[str, float] = field(default_factory=dict)

    def __call__(self, label: str, done: int, total: int) -> None:
        unit, _, numbers = label.partition(DETAIL)
        if numbers and done >= total:
            self.progress.console.print(f"  {unit}  {numbers}", highlight=False, markup=False)
        since = self._since.setdefault(unit, time.monotonic())
        if unit not in self._tasks:
            if done >= total or time.monotonic() - since < _PATIENCE:
                return
            self._tasks[unit] = self.progress.add_task(label, total=total)
        task = self._tasks[unit]
        self.progress.update(
            task, description=label, completed=done, total=total, visible=done < total
        )


def tell_finished(label: str, done: int, total: int) -> None:
    """The progress callback where there is no terminal: one line for each finished unit that has
    numbers to show."""
    unit, detail, numbers = label.partition(DETAIL)
    if detail and done >= total:
        complain(f"  {unit}  {numbers}")


@contextmanager
def progress_bars(*, quiet: bool) -> Iterator[Any]:
    """Yield a progress callback. Silent when quiet; a line for what is finished when standard error
    is no terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield silent if quiet else tell_finished
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bars(progress=progress)


_PLAIN = str.maketrans({"≥": ">=", "≤": "<=", "→": "->", "…": "...", "−": "-", "×": "x"})


def use_any_console() -> None:
    """Let standard output and error print every text: what their encoding (cp1252, say) lacks is
    written in plain letters, or as `\\u2603`."""
    codecs.register_error("plain letters", _in_plain_letters)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain letters")


def _in_plain_letters(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


def say(text: str = "") -> None:
    """One line on standard output, flushed."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def complain(text: str) -> None:
    """One block on standard error."""
    sys.stderr.write(text.rstrip() + "\n")
    sys.stderr.flush()


def table(rows: Sequence[tuple[str, ...]], *, header: Sequence[str] = ()) -> list[str]:
    """Left-aligned columns, as lines. On a terminal the last column folds; in a file or a pipe no
    line is cut."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNLIMITED
    columns = Table(
        *header, box=None, show_header=bool(header), header_style="", pad_edge=False, expand=False
    )
    for row in rows:
        columns.add_row(*row)
    for column in columns.columns:
        column.no_wrap, column.overflow = column is not columns.columns[-1], "fold"
    with console.capture() as printed:
        console.print(columns)
    return [line.rstrip() for line in printed.get().splitlines()] if rows else []


def show_number(value: object) -> str:
    """A headline number as a person reads it: four significant digits, thousands separated."""
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {show_number(item)}" for key, item in value.items())
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and all(isinstance(item, float) for item in value):
            return f"[{show_number(value[0])}, {show_number(value[1])}]"
        return ", ".join(show_number(item) for item in value)
    return str(value)
