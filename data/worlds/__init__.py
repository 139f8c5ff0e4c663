"""Worlds where the answer is known: `compiled`, `fsm`, `maze`, `superposed`.

A recipe names one twice: as the model and as the text.

    [collect]
    model = {kind = "world", world = "fsm"}
    corpus = {kind = "world", world = "fsm"}
"""

from __future__ import annotations

from typing import Annotated

from data.worlds.base import NEVER, Variable, World, check_names
from data.worlds.compiled import Compiled
from data.worlds.fsm import Fsm
from data.worlds.maze import Maze
from data.worlds.superposed import Superposed
from featureflow.settings import ByKind

AnyWorld = Annotated[Compiled | Fsm | Maze | Superposed, ByKind()]

__all__ = [
    "NEVER",
    "AnyWorld",
    "Compiled",
    "Fsm",
    "Maze",
    "Superposed",
    "Variable",
    "World",
    "check_names",
]
