"""What steering needs from a model and from a dictionary, and one forward pass over texts as padded
batches of token ids.

`data.model.language_model.LanguageModel` and `sae.Sae` satisfy `SteerableModel` and `Dictionary`;
so does any object of your own with the same methods.

Every sequence starts with the tokenizer's start token when it has one. Prompts are padded on the
left, so that generation appends at the right edge of every row; positions are counted over real
tokens and handed to the model, so padding changes nothing but float noise.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from featureflow.errors import UserError
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


Prompt = str | tuple[int, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows of token ids; `real` is False on padding."""

    ids: Int[Tensor, "batch column"]
    real: Bool[Tensor, "batch column"]

    def positions(self) -> Int[Tensor, "batch column"]:
        return (self.real.long().cumsum(dim=-1) - 1).clamp(min=0)


def encoded(model: SteerableModel, text: Prompt) -> list[int]:
    """Token ids with the start token in front; a prompt of ids (a chat) is taken as it is."""
    if not isinstance(text, str):
        return list(text)
    bos = model.tokenizer.bos_id
    ids = list(model.tokenizer.encode(text))
    return ids if bos is None else [bos, *ids]


def padded(rows: Sequence[Sequence[int]], *, device: Any = "cpu") -> Batch:
    """Rows of different lengths, padded on the left with id 0."""
    if not rows or not all(rows):
        raise UserError("an empty sequence cannot be run", expected="at least one token a row")
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    real = torch.tensor(
        [[False] * (width - len(row)) + [True] * len(row) for row in rows], device=device
    )
    return Batch(ids=ids, real=real)


def forward(
    model: SteerableModel, batch: Batch, *, n_last: int = 0
) -> Float[Tensor, "batch column vocab"]:
    """Logits at every column, in the model's dtype; columns of padding are meaningless. `n_last` >
    0 computes only that many last columns."""
    kwargs = forward_arguments(model, mask=batch.real, positions=batch.positions(), n_last=n_last)
    with torch.no_grad():
        return model.hf(input_ids=batch.ids, use_cache=False, **kwargs).logits[:, -n_last:]


@contextmanager
def arriving(model: SteerableModel, sites: Iterable[Site]) -> Iterator[dict[Site, Tensor]]:
    """Filled by every forward pass inside with the activation at each site as it arrives: before
    the edits of plans that are applied inside."""
    seen: dict[Site, Tensor] = {}

    def look(site: Site) -> Callable[[Tensor], Tensor]:
        def keep(h: Tensor) -> Tensor:
            seen[site] = h
            return h

        return keep

    with model.edited({site: look(site) for site in sites}):
        yield seen


@contextmanager
def block_outputs(model: SteerableModel) -> Iterator[list[Any]]:
    """Filled with what each transformer block gives in the forward pass made inside; stays empty
    for a model that does not say which its blocks are."""
    found: list[Any] = []
    handles = [
        block.register_forward_hook(lambda *seen: found.append(seen[-1]))
        for block in _blocks(model)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def resumed(model: SteerableModel, outputs: Sequence[Any], n_blocks: int) -> Iterator[None]:
    """Inside, the first `n_blocks` blocks are not computed but give `outputs`, recorded on the same
    batch. Edits at the last of them and later still act; the rest of the pass is the same to the
    bit."""
    skipped = list(zip(_blocks(model), outputs, strict=False))[:n_blocks]
    try:
        for block, output in skipped:
            block.forward = lambda *_, known=output, **__: known
        yield
    finally:
        for block, _ in skipped:
            vars(block).pop("forward", None)


def _blocks(model: SteerableModel) -> list[torch.nn.Module]:
    return [entry.block for entry in getattr(model, "blocks", ())]


def forward_arguments(
    model: SteerableModel,
    *,
    mask: Bool[Tensor, "batch column"],
    positions: Int[Tensor, "batch position"],
    n_last: int = 0,
) -> dict[str, Any]:
    """Mask, positions and how many logits to compute, as far as the model takes them."""
    wanted = {"attention_mask": mask.long(), "position_ids": positions, "logits_to_keep": n_last}
    taken = inspect.signature(model.hf.forward).parameters
    return {name: value for name, value in wanted.items() if name in taken}


def device_of(model: SteerableModel) -> torch.device:
    return next(model.hf.parameters()).device


def in_batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive slices of at most `size`."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]
