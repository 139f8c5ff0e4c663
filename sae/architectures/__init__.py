"""The ways to train a dictionary. Each owns its few choices; `base` is what they share.

A new architecture is one new file with a frozen model that satisfies `base.Architecture`: here with
a line below, or in any package under the entry point group `featureflow.architectures`.
"""

from __future__ import annotations

from typing import Annotated

from featureflow.settings import ByKind
from sae.architectures.base import Architecture
from sae.architectures.codebook import Codebook
from sae.architectures.dense import GatedL1, ReluL1
from sae.architectures.jump_relu import JumpRelu
from sae.architectures.topk import BatchTopK, MatryoshkaBatchTopK, TopK

AnyArchitecture = Annotated[
    TopK | BatchTopK | MatryoshkaBatchTopK | JumpRelu | ReluL1 | GatedL1 | Codebook,
    ByKind("architectures"),
]

__all__ = [
    "AnyArchitecture",
    "Architecture",
    "BatchTopK",
    "Codebook",
    "GatedL1",
    "JumpRelu",
    "MatryoshkaBatchTopK",
    "ReluL1",
    "TopK",
]
