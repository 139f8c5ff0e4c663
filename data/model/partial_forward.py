"""Run a model from the middle: skip the blocks up to a layer and go on with a given residual
stream.

Causal checks repeat the same context thousands of times with one vector changed at one layer. What
lies below that layer is the same every time, so it is computed once; `continued_from` makes a
forward pass start above it. Cost: the blocks above the layer only (with
`LanguageModel.activations`, only those up to the last wanted site).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from data.model.language_model import LanguageModel

_GIVES_TUPLE: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What blocks were seen to return; asked once per model, since asking costs a forward pass."""


@contextmanager
def continued_from(
    model: LanguageModel, layer: int, residual: Float[Tensor, "batch position d_model"]
) -> Iterator[None]:
    """Inside, a forward pass treats `residual` as `resid_post` of block `layer`; blocks 0 … `layer`
    are not computed (hooks on their outputs still run, and the last of them sees `residual`). The
    ids passed in give only the shape."""
    blocks = [sites.block for sites in model.blocks[: layer + 1]]
    if blocks[0] not in _GIVES_TUPLE:
        _GIVES_TUPLE[blocks[0]] = _output_is_tuple(model, blocks[0])
    gives_tuple = _GIVES_TUPLE[blocks[0]]
    value = residual.to(model.device, model.dtype)
    for block in blocks:
        block.forward = _constant(value, gives_tuple)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


@contextmanager
def passed_over(model: LanguageModel, layers: Collection[int]) -> Iterator[None]:
    """Inside, these blocks hand on what they read."""
    blocks = [model.blocks[layer].block for layer in sorted(set(layers))]
    first = model.blocks[0].block
    if blocks and first not in _GIVES_TUPLE:
        _GIVES_TUPLE[first] = _output_is_tuple(model, first)
    for block in blocks:
        block.forward = _identity(_GIVES_TUPLE[first])
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _identity(as_tuple: bool) -> Callable[..., Any]:
    def forward(*args: Any, **options: Any) -> Any:
        value = args[0] if args else options["hidden_states"]
        return (value,) if as_tuple else value

    return forward


def _constant(value: Tensor, as_tuple: bool) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        return (value,) if as_tuple else value

    return forward


def _output_is_tuple(model: LanguageModel, block: nn.Module) -> bool:
    """What this architecture's blocks return, seen in a pass over one token."""
    seen: list[bool] = []
    handle = block.register_forward_hook(
        lambda _, __, output: seen.append(isinstance(output, tuple))
    )
    try:
        with torch.no_grad():
            model.base(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        handle.remove()
    return seen[0]
