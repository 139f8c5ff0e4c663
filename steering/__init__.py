"""Steering: edits of the residual stream, plans, doses, generation and measurement.

The names below load torch when they are first used, not when the package is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steering.applied import RowPlan, applied
    from steering.dose import Calibrated, Dose, NeutralText, calibrate, measure
    from steering.generation import Generation, Sample, Sampling, generate, stream
    from steering.plan import Node, Plan
    from steering.plan_files import read_plan, write_plan

_HOMES = {
    **dict.fromkeys(("RowPlan", "applied"), "steering.applied"),
    **dict.fromkeys(("Calibrated", "Dose", "NeutralText", "calibrate", "measure"), "steering.dose"),
    **dict.fromkeys(
        ("Generation", "Sample", "Sampling", "generate", "stream"), "steering.generation"
    ),
    **dict.fromkeys(("Node", "Plan"), "steering.plan"),
    **dict.fromkeys(("read_plan", "write_plan"), "steering.plan_files"),
}
__all__ = [
    "Calibrated",
    "Dose",
    "Generation",
    "NeutralText",
    "Node",
    "Plan",
    "RowPlan",
    "Sample",
    "Sampling",
    "applied",
    "calibrate",
    "generate",
    "measure",
    "read_plan",
    "stream",
    "write_plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'steering' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
