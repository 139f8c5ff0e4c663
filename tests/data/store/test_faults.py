"""The fault suite at a small size: killed, damaged, full, locked and contended stores all end as
they should."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_every_fault_ends_in_the_same_bytes_or_in_a_refusal(tmp_path: Path) -> None:
    # In a process of its own: the suite forks, and a fork of a process with threads can wait for
    # ever.
    table = tmp_path / "faults.md"
    command = [
        sys.executable,
        "benchmarks/store_faults.py",
        "--small",
        "--kills",
        "3",
        "--markdown",
        str(table),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in table.read_text().splitlines() if line.startswith("|")][2:]
    assert len(rows) == 13
