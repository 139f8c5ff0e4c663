"""What steering needs from a language model and from a dictionary, and nothing more.

`data.model.language_model.LanguageModel` and `sae.Sae` satisfy these; so does any object of your
own with the same methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from featureflow.sites import Site


class SteerableModel(Protocol):
    """A language model whose sites can be edited. `hf` is the Hugging Face module that is really
    run."""

    name: str
    n_layers: int
    d_model: int
    d_vocab: int
    n_context: int
    tokenizer: Any
    hf: Any

    @property
    def fingerprint(self) -> str: ...
    def sites(self) -> tuple[Site, ...]: ...
    def edited(
        self, edits: Mapping[Site, Callable[[Tensor], Tensor]]
    ) -> AbstractContextManager[Any]: ...


class Dictionary(Protocol):
    """The decoder rows of one SAE and the encoder columns that an edit reads."""

    @property
    def W_dec(self) -> Float[Tensor, "latent d_out"]: ...
    def encode_selected(
        self, x: Float[Tensor, "token d_in"], latents: Any
    ) -> Float[Tensor, "token selected"]: ...
