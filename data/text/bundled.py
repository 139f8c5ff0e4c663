"""The small text that ships in this repository: short passages with a title and a label, for tests
and the tiny recipe.

Hamlet and Moby-Dick are in the public domain, State of the Union addresses are works of the United
States government, the other passages were written for this project (Apache-2.0). 1 JSON object a
line in `bundled.jsonl`.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files


@cache
def bundled_records() -> tuple[dict[str, str], ...]:
    """Objects with text, source, title and label, in the order of the file."""
    content = files("data.text").joinpath("bundled.jsonl").read_text(encoding="utf-8")
    return tuple(json.loads(line) for line in content.splitlines() if line)
