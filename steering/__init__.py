"""Steering: edits of the residual stream, plans, doses, generation and measurement.

The names below load torch when they are first used, not when the package is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from featureflow.lazy import lazy_names

if TYPE_CHECKING:
    from steering.dose import Calibrated, Dose, NeutralText, calibrate, measure
    from steering.generation import Generation, Sample, Sampling, generate, stream
    from steering.hooks import RowPlan, applied
    from steering.plan import Node, Plan
    from steering.plan_files import read_plan, write_plan

__getattr__, __all__ = lazy_names(__name__, __file__)
