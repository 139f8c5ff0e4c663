"""Every name in the code is defined. Shapes of jaxtyping are strings that look like names, so the
linter's own rule is off; outside strings it holds."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
ROOMS = ("featureflow", "sae", "data", "steering", "pipeline", "benchmarks", "tests")


def test_no_name_is_undefined() -> None:
    command = ["ruff", "check", "--select", "F821", "--config", "lint.ignore = []"]
    done = subprocess.run(
        [sys.executable, "-m", *command, "--output-format", "json", *ROOMS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    problems = json.loads(done.stdout)
    assert problems, "shapes are found, so the linter looked"
    found = [
        f"{problem['filename']}:{problem['location']['row']}: {problem['message']}"
        for problem in problems
        if not _in_string(problem["filename"], problem["location"])
    ]
    assert not found


def _in_string(path: str, location: dict[str, int]) -> bool:
    place = (location["row"], location["column"] - 1)
    return any(start <= place < end for start, end in _strings(path))


@cache
def _strings(path: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    tokens = tokenize.generate_tokens(io.StringIO(Path(path).read_text(encoding="utf-8")).readline)
    return [(token.start, token.end) for token in tokens if token.type == tokenize.STRING]
