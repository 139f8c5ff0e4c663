"""What is fixed between development and test: the dose of every arm, by development samples
alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.steering_study.options import SUPPRESSION_ARMS


def choose_dose(
    entries: Sequence[Mapping[str, Any]], arm: str, min_coherent: float, *, usual: float = 1.0
) -> dict[str, Any] | None:
    """The dose to test: most coherent successes (for suppression: fewest successes), ties to the
    lower dose, among doses whose samples are coherent at least `min_coherent` as often as unsteered
    ones (`usual`). None: none is."""
    admissible = [
        entry
        for entry in entries
        if entry.get("records")
        and np.mean([record["coherent"] for record in entry["records"]])
        >= min_coherent * usual - 1e-9
    ]
    if not admissible:
        return None
    sign = -1 if arm in SUPPRESSION_ARMS else 1

    def merit(entry: Mapping[str, Any]) -> tuple[float, float]:
        hits = [
            record["success"] and (record["coherent"] or sign < 0) for record in entry["records"]
        ]
        return sign * float(np.mean(hits)), -entry["dose"]

    best = max(admissible, key=merit)
    return {name: best[name] for name in ("dose", "kl", "strength", "reached")}


def with_whole_budget(locked: Mapping[str, Any]) -> dict[str, Any]:
    """The lock of a topic with the single-layer arm at the flow's whole coefficient (whose weights
    add up to 1)."""
    flow, arms = locked["arms"]["flow"]["choice"], dict(locked["arms"])
    arms["single"] = {**arms["single"], "choice": None if flow is None else {**flow, "kl": None}}
    return {**locked, "arms": arms}


def checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
