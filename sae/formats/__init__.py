"""Dictionaries on disk: the native form, and what other libraries and labs write.

`read(path)` recognises and reads any of them; `write_saelens(sae, folder)` writes what SAELens
opens, `write_circuit_tracer(saes, folder)` what circuit-tracer opens. The names load torch when
they are first used, not when the package is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae.formats.circuit_tracer import write_circuit_tracer
    from sae.formats.conventions import Conventions
    from sae.formats.cross_layer import layers_of, read_cross_layer
    from sae.formats.native import load_sae, save_sae
    from sae.formats.native_cross_layer import load_cross_layer, save_cross_layer
    from sae.formats.reading import FORMATS, find, read, recognise
    from sae.formats.saelens import write_saelens
    from sae.formats.sparsify import write_sparsify

__all__ = [
    "FORMATS",
    "Conventions",
    "find",
    "layers_of",
    "load_cross_layer",
    "load_sae",
    "read",
    "read_cross_layer",
    "recognise",
    "save_cross_layer",
    "save_sae",
    "write_circuit_tracer",
    "write_saelens",
    "write_sparsify",
]

_HOMES = {
    **dict.fromkeys(("load_sae", "save_sae"), "sae.formats.native"),
    **dict.fromkeys(("FORMATS", "find", "read", "recognise"), "sae.formats.reading"),
    **dict.fromkeys(("load_cross_layer", "save_cross_layer"), "sae.formats.native_cross_layer"),
    "Conventions": "sae.formats.conventions",
    **dict.fromkeys(("layers_of", "read_cross_layer"), "sae.formats.cross_layer"),
    "write_circuit_tracer": "sae.formats.circuit_tracer",
    "write_saelens": "sae.formats.saelens",
    "write_sparsify": "sae.formats.sparsify",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sae.formats' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
