"""Where the time of shuffled reading goes: each step of the threads timed, per window of the
shuffle.

    python -m benchmarks.store_read_trace [--rows 262144] [--width 576] [--batch 4096] [--windows
    96] [--dtype bfloat16]

Prints one JSON line a step: calls, wall and CPU milliseconds a window, over all threads that take
it. Wall time above CPU time is waiting: for another thread, for Python's lock, or for a core. The
timers cost a few percent.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import google_crc32c

from benchmarks.store_read import EVERYTHING, SITE, make_store, take
from data.store import batches, places, staging, windows

STEPS: tuple[tuple[str, Any, str], ...] = (
    ("hand out: wait for a window", windows.Windows, "at"),
    ("hand out: wait for the consumer", batches._Pipeline, "_put"),
    ("read: all of a thread's share", windows.Window, "_read"),
    ("read: file into memory", places.LocalPlace, "read_into"),
    ("read: checksums", google_crc32c, "value"),
    ("gather and widen", staging.StagingBuffers, "gather"),
    ("gather: rows", staging, "_take"),
    ("consume", batches._Pipeline, "next"),
)


class Timer:
    """Sums calls, wall and CPU seconds over threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.calls, self.wall, self.cpu = 0, 0.0, 0.0

    def add(self, wall: float, cpu: float) -> None:
        with self._lock:
            self.calls, self.wall, self.cpu = self.calls + 1, self.wall + wall, self.cpu + cpu


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=262_144)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=96)
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        store = make_store(Path(folder) / "store.zarr", options.rows, options.width, options.dtype)
        timers = {
            label: stack.enter_context(timed_calls(place, name)) for label, place, name in STEPS
        }
        choices = {
            "batch_size": options.batch,
            "seed": 0,
            "filters": EVERYTHING,
            "reuse_buffers": True,
        }
        reader = stack.enter_context(store.batches([SITE], **choices))
        stream = (batch[SITE] for batch in reader)
        window = reader.choices.window_blocks * reader.choices.block_rows
        take(stream, 4 * window // options.batch)
        for timer in timers.values():
            timer.reset()
        started, cpu = time.perf_counter(), time.process_time()
        take(stream, options.windows * window // options.batch)
        whole = {
            "step": "everything",
            "wall_ms": time.perf_counter() - started,
            "cpu_ms": time.process_time() - cpu,
        }
        print_line(whole, options.windows)
        for label, timer in timers.items():
            step = {"step": label, "calls": timer.calls, "wall_ms": timer.wall, "cpu_ms": timer.cpu}
            print_line(step, options.windows)


def print_line(step: dict[str, Any], n_windows: int) -> None:
    """A line, seconds over all windows turned into milliseconds a window."""
    scaled = {
        key: round(value * 1e3 / n_windows, 2) for key, value in step.items() if key.endswith("_ms")
    }
    if "calls" in step:
        step["calls"] = round(step["calls"] / n_windows, 1)
    print(json.dumps({**step, **scaled}), flush=True)


@contextmanager
def timed_calls(place: Any, name: str) -> Iterator[Timer]:
    """Inside, every call of `place.name` is timed."""
    timer, whole = Timer(), getattr(place, name)

    @functools.wraps(whole)
    def timed(*arguments: Any, **options: Any) -> Any:
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            return whole(*arguments, **options)
        finally:
            timer.add(time.perf_counter() - wall, time.thread_time() - cpu)

    setattr(place, name, timed)
    try:
        yield timer
    finally:
        setattr(place, name, whole)


if __name__ == "__main__":
    main()
