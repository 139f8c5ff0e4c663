"""`evaluate`: the part of the stage `lenses` that needs SAEs and no flow graph.

It runs the evaluation lenses with the options that the recipe's section `[lenses]` has for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from featureflow.errors import Problem
from pipeline.artifact import Artifact
from pipeline.lenses.base import EVALUATION
from pipeline.stages.lenses import Config as Lenses


class Config(Lenses):
    """Which evaluation lenses look at the run."""

    @classmethod
    def read(cls, raw: object, where: str, problems: list[Problem]) -> Self | None:
        """The section of a recipe without the other lenses."""
        if (whole := super().read(raw, where, problems)) is None:
            return None
        options = {name: each for name, each in whole.options.items() if name in EVALUATION}
        return whole.replace(names=EVALUATION, options=options)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is measured, and on what."""

    collect: Artifact
    train: Artifact
