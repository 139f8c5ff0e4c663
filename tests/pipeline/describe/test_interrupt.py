"""An interrupted stage ends at once: its workers are ended, sites that wait are not begun."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from pipeline.context import RunContext
from pipeline.describe.workers import site_workers

N_SITES = 12


def slow_job(folder: str, short: str) -> str:
    Path(folder, short).write_text("begun")
    time.sleep(3)
    return short


def test_an_interrupt_does_not_begin_the_sites_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3])  # workers import this module by name
    sites = [f"L{i}" for i in range(N_SITES)]
    with (
        pytest.raises(KeyboardInterrupt),
        site_workers(RunContext(n_threads=2), N_SITES) as each_site,
    ):

        def run_all() -> None:
            with suppress(BaseException):
                each_site("slow", partial(slow_job, str(tmp_path)), sites)

        threading.Thread(target=run_all, daemon=True).start()
        deadline = time.monotonic() + 120
        while not any(tmp_path.iterdir()):
            assert time.monotonic() < deadline, "no site was begun"
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) < N_SITES
