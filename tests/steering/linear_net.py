"""A model whose blocks are linear maps of the stream, so that what an edit does is arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from featureflow.sites import Site
from sae import Relu, Sae


class _Base(nn.Module):
    def __init__(self, embedding: Tensor, blocks: Sequence[Tensor]) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding, requires_grad=False)
        self.layers = nn.ModuleList(_Block(block) for block in blocks)

    def forward(self, input_ids: Tensor) -> Tensor:
        h = self.embedding[input_ids]
        for layer in self.layers:
            h = layer(h)
        return h


class _Block(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, h: Tensor) -> Tensor:
        return h + h @ self.weight


class _Whole(nn.Module):
    def __init__(self, base: _Base, unembedding: Tensor) -> None:
        super().__init__()
        self.base_model, self.unembedding = base, nn.Parameter(unembedding, requires_grad=False)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.base_model(input_ids) @ self.unembedding)


class LinearNet:
    """h ← h + h·W at every layer, logits = h·U. Satisfies `SteerableModel`; a site is after a
    layer."""

    def __init__(self, embedding: Tensor, blocks: Sequence[Tensor], unembedding: Tensor) -> None:
        self.hf: Any = _Whole(_Base(embedding, blocks), unembedding)
        self.name = self.fingerprint = "linear"
        self.n_layers, self.d_model = len(blocks), embedding.shape[1]
        self.d_vocab, self.n_context = unembedding.shape[1], 1000
        self.tokenizer: Any = None

    def sites(self) -> tuple[Site, ...]:
        return tuple(Site(layer, "resid_post") for layer in range(self.n_layers))

    @contextmanager
    def edited(self, edits: Mapping[Site, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        with ExitStack() as stack:
            for site, edit in edits.items():
                layer = self.hf.base_model.layers[site.layer]
                handle = layer.register_forward_hook(lambda _, __, out, edit=edit: edit(out))
                stack.callback(handle.remove)
            yield


def sae_with(rows: Tensor, encoder: Tensor | None = None) -> Sae:
    """A ReLU SAE with these decoder rows; they are its encoder too if none is given."""
    return Sae(
        W_enc=(rows if encoder is None else encoder).clone(),
        b_enc=torch.zeros(len(rows)),
        W_dec=rows.clone(),
        b_dec=torch.zeros(rows.shape[1]),
        b_in=torch.zeros(rows.shape[1]),
        activation=Relu(),
    )
