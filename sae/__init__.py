"""Sparse autoencoders: dictionaries over vectors. Knows torch; knows nothing of language models,
stores or stages.

The names below load torch when they are first used, not when the package is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from featureflow.lazy import lazy_names

if TYPE_CHECKING:
    from sae.activations import Activation, Gated, Relu, Threshold, TopKActivation
    from sae.dictionary import Sae, SparseCodes
    from sae.formats.native import load_sae, save_sae

__getattr__, __all__ = lazy_names(__name__, __file__)
