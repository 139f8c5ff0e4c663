"""The tiny recipe run up to its features: what lenses look at in tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cli import run_command
from pipeline.context import RunContext
from pipeline.run import Run


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifacts")
    common = ["--recipe", "tiny", "--artifacts", str(folder), "--threads", "1", "-q"]
    assert run_command(["run", "--to", "describe", *common]) == 0
    return folder


@pytest.fixture(scope="session")
def run(artifacts: Path) -> Run:
    return Run.open(artifacts / "tiny", context=RunContext(n_threads=1))
