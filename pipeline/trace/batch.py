"""Many prompts, one trace each, and what holds over all of them.

A file of prompts has one prompt a line, or one JSON object a line with `prompt` and, if wanted,
`answer`, `foil`, `feature` and `chat`. The unit of every interval is the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from featureflow.errors import Problem, UserError
from featureflow.statistics import bootstrap_mean
from pipeline.console import table
from pipeline.trace.document import Document, headline_of

_KEYS = {"prompt": str, "answer": str, "foil": str, "feature": str, "chat": bool, "family": str}


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompts of a file, in order. Raises UserError with every bad line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("this file cannot be read", where=str(path), found=str(error)) from error
    asked, problems = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found = _asked(line)
        if isinstance(found, str):
            problems.append(Problem(what=found, where=f"{path}:{number}", found=line[:60]))
        else:
            asked.append(found)
    if problems or not asked:
        raise UserError(
            "these are no prompts" if problems else "there is no prompt in this file",
            where=str(path),
            problems=tuple(problems[:50]),
            expected=f"a prompt a line, or JSON objects with {', '.join(_KEYS)}",
        )
    return asked


def _asked(line: str) -> dict[str, Any] | str:
    """The prompt of a line, or what is wrong with it."""
    if not line.lstrip().startswith("{"):
        return {"prompt": line}
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        return f"not JSON: {error}"
    if unknown := [key for key in found if key not in _KEYS]:
        return f"unknown key {unknown[0]!r}"
    wrong = [key for key, value in found.items() if not isinstance(value, _KEYS[key])]
    if wrong or "prompt" not in found:
        return f"{wrong[0]} is of another type" if wrong else "no prompt"
    return found


def checks_over(documents: Sequence[Document], *, seed: int = 0) -> pd.DataFrame:
    """Every check, averaged over prompts: `check, mean, low, high, n` (95 %, bootstrap)."""
    values: dict[str, list[float]] = {}
    for document in documents:
        for each in document["checks"]:
            if each["value"] is not None:
                values.setdefault(each["check"], []).append(each["value"])
    rows = []
    for check, found in values.items():
        interval = bootstrap_mean(found, seed=seed)
        rows.append((check, interval.mean, interval.low, interval.high, interval.n))
    return pd.DataFrame(rows, columns=["check", "mean", "low", "high", "n"])


def recurring(documents: Sequence[Document]) -> pd.DataFrame:
    """Flows (features that lie on none stand alone) that are shown in more than one prompt:
    `flow, name, prompts, mean_removed`, those of most prompts first."""
    rows = []
    for number, document in enumerate(documents):
        for node in document["supernodes"][: document["options"]["n_shown"]]:
            flow = node["flow"] if node["flow"] >= 0 else node["members"][0]["feature"]
            rows.append((str(flow), node["name"], number, node["removed"]))
    frame = pd.DataFrame(rows, columns=["flow", "name", "prompt", "removed"])
    frame = frame.groupby("flow").agg(
        name=("name", "first"), prompts=("prompt", "nunique"), mean_removed=("removed", "mean")
    )
    frame = frame[frame["prompts"] > 1].reset_index()
    return frame.sort_values(["prompts", "mean_removed"], ascending=False, key=abs)


def summary_lines(documents: Sequence[Document]) -> Iterator[str]:
    """What a person reads after the last prompt."""
    rows = []
    for document in documents:
        first = document["supernodes"][0]
        strongest = f"{first['removed']:+.2f} {first['name']}"
        rows.append((document["prompt"], headline_of(document), strongest))
    yield from table(rows, header=("prompt", "explained", "strongest supernode"))
    interval = checks_over(documents)
    rows = [
        (row.check, f"{row.mean:.2g}", f"{row.low:.2g} to {row.high:.2g}", str(row.n))
        for row in interval.itertuples()
    ]
    yield from table(rows, header=("check", "mean", "95 %", "prompts"))
    rows = [
        (row.name, str(row.prompts), f"{row.mean_removed:+.2f}")
        for row in recurring(documents).head(20).itertuples(index=False)
    ]
    if rows:
        yield from table(rows, header=("in several prompts", "prompts", "mean effect"))
