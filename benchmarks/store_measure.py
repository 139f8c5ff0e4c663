"""Paired timing for the store's benchmarks: a control and a candidate back to back, many times;
ratios and spread.

On a shared machine one duration says little; the ratio of two runs beside each other says more.
Each line of output is one JSON object: the claim, the median ratio with quartiles, best rates, CPU
seconds, and the number of pairs.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall and CPU seconds of one call; CPU counts all threads of this process."""

    wall: float
    cpu: float


def timed(function: Callable[[], object]) -> Timing:
    """Run once and time it."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return Timing(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu)


def compare(
    claim: str,
    *,
    control: Callable[[], object],
    candidate: Callable[[], object],
    units: float,
    unit: str,
    n_pairs: int,
    target: float | None = None,
    warm_up: bool = True,
    **facts: object,
) -> dict[str, object]:
    """Time pairs in turn, in alternating order, after one that does not count (`warm_up`); print
    and return the record. `ratio` is the candidate's speed over the control's; `units` is how much
    one call does."""
    if warm_up:
        control()
        candidate()
    pairs = []
    for k in range(n_pairs):
        if k % 2:
            second, first = timed(candidate), timed(control)
        else:
            first, second = timed(control), timed(candidate)
        pairs.append((first, second))
    ratios = sorted(first.wall / second.wall for first, second in pairs)
    quartiles = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    record: dict[str, object] = {
        "claim": claim,
        "ratio": round(statistics.median(ratios), 3),
        "ratio_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
        "cpu_ratio": round(
            statistics.median(first.cpu / max(second.cpu, 1e-9) for first, second in pairs), 3
        ),
        "target": target,
        "n_pairs": n_pairs,
        "unit": f"{unit}/s",
        "control_best": round(units / min(first.wall for first, _ in pairs), 1),
        "candidate_best": round(units / min(second.wall for _, second in pairs), 1),
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {platform.machine()}",
        **facts,
    }
    print(json.dumps(record), flush=True)
    return record
