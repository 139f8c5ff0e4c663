"""An interrupted atlas ends at once: its workers are ended, sites that wait are not begun."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.context import RunContext
from pipeline.site.build import _runner

N_SITES = 12


def slow_job(shop: Any, short: str) -> str:
    Path(shop.folder, short).write_text("begun")
    time.sleep(3)
    return short


def test_an_interrupt_does_not_begin_the_sites_that_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3])  # workers import this module by name
    shop = SimpleNamespace(sites=tuple(f"L{i}" for i in range(N_SITES)), folder=str(tmp_path))
    with pytest.raises(KeyboardInterrupt), _runner(RunContext(n_threads=2), N_SITES) as run:
        results = iter(run(slow_job, shop))

        def wait_for_the_first() -> None:
            with suppress(BaseException):
                next(results)

        threading.Thread(target=wait_for_the_first, daemon=True).start()
        deadline = time.monotonic() + 120
        while not any(tmp_path.iterdir()):
            assert time.monotonic() < deadline, "no site was begun"
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) < N_SITES
