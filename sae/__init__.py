"""Sparse autoencoders: dictionaries over vectors. Knows torch; knows nothing of language models,
stores or stages.

The names below load torch when they are first used, not when the package is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae.activations import Activation, Gated, Relu, Threshold, TopKActivation
    from sae.dictionary import Sae, SparseCodes
    from sae.formats.native import load_sae, save_sae

__all__ = [
    "Activation",
    "Gated",
    "Relu",
    "Sae",
    "SparseCodes",
    "Threshold",
    "TopKActivation",
    "load_sae",
    "save_sae",
]

_HOMES = {
    **dict.fromkeys(
        ("Activation", "Gated", "Relu", "Threshold", "TopKActivation"), "sae.activations"
    ),
    **dict.fromkeys(("Sae", "SparseCodes"), "sae.dictionary"),
    **dict.fromkeys(("load_sae", "save_sae"), "sae.formats.native"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
