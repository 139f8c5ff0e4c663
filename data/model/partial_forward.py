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

_N_GIVEN: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""How many values blocks were seen to return, 0 for a bare tensor; asked once per model, since
asking costs a forward pass."""


@contextmanager
def continued_from(
    model: LanguageModel, layer: int, residual: Float[Tensor, "batch position d_model"]
) -> Iterator[None]:
    """Inside, a forward pass treats `residual` as `resid_post` of block `layer`; blocks 0 … `layer`
    are not computed (hooks on their outputs still run, and the last of them sees `residual`). The
    ids passed in give only the shape."""
    blocks = [sites.block for sites in model.blocks[: layer + 1]]
    if blocks[0] not in _N_GIVEN:
        _N_GIVEN[blocks[0]] = _n_given(model, blocks[0])
    value = residual.to(model.device, model.dtype)
    for block in blocks:
        block.forward = _constant(value, _N_GIVEN[blocks[0]])
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
    if blocks and first not in _N_GIVEN:
        _N_GIVEN[first] = _n_given(model, first)
    for block in blocks:
        block.forward = _identity(_N_GIVEN[first])
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _as_given(value: Tensor, n: int) -> Any:
    """The stream first; what else a block hands on (a state, attentions) as None."""
    return (value, *[None] * (n - 1)) if n else value


def _identity(n: int) -> Callable[..., Any]:
    def forward(*args: Any, **options: Any) -> Any:
        return _as_given(args[0] if args else options["hidden_states"], n)

    return forward


def _constant(value: Tensor, n: int) -> Callable[..., Any]:
    def forward(*_: Any, **__: Any) -> Any:
        return _as_given(value, n)

    return forward


def _n_given(model: LanguageModel, block: nn.Module) -> int:
    """How many values this architecture's blocks return, seen in a pass over one token."""
    seen: list[int] = []
    handle = block.register_forward_hook(
        lambda _, __, output: seen.append(len(output) if isinstance(output, tuple) else 0)
    )
    try:
        with torch.no_grad():
            model.base(torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        handle.remove()
    return seen[0]
