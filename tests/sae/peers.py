"""Scripts of benchmarks/peers, run in the environment of the peer."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "peers"


def run_peer(peer: str, *arguments: str) -> list[dict]:
    root = os.environ.get("FEATUREFLOW_PEERS")
    python = Path(root or "") / peer / "bin" / "python"
    if root is None or not python.is_file():
        pytest.skip(
            f"no environment for {peer}: bash benchmarks/peers/make_environments.sh, then "
            "FEATUREFLOW_PEERS"
        )
    command = [str(python), str(SCRIPTS / f"check_{peer}.py"), *arguments]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/"),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
