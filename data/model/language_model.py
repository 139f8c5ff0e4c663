"""A language model as a source of activations and as a thing to edit.

`LanguageModel.open(spec)` gives a Hugging Face module with named sites
(`blocks.12.hook_resid_post`, TransformerLens' names and meanings). Activations are read and edited
by plain forward hooks on that module, which keeps the fused attention that TransformerBridge's
wrappers replace. `boot_bridge` (bridge.py) gives the same model as a TransformerBridge; a test
holds that both give the same activations at every kind of site.

Cost: one forward pass up to the last wanted site (the demo, two cores, SmolLM2-135M-Instruct in
bfloat16, 46 sites read and stored: 1,285 tokens a second, `make collect`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from data.model.fingerprint import fingerprint_of
from data.model.module_sites import BlockSites, Edit, Taps, find_blocks, find_sites, norm_gain
from data.model.spec import (
    Folder,
    Gguf,
    HuggingFace,
    ModelSpec,
    Packaged,
    Random,
    TransformerLens,
    name_of,
)
from data.text.tokenizer import Tokenizer
from featureflow.errors import UserError
from featureflow.progress import Progress, silent
from featureflow.sites import Site

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from data.model.sources import LoadedModel

__all__ = [
    "Edit",
    "Folder",
    "Gguf",
    "HuggingFace",
    "LanguageModel",
    "ModelSpec",
    "Packaged",
    "Random",
    "TransformerLens",
]


_NO_LIMIT = (
    2**31
)  # models without learned or rotary positions (BLOOM, MPT) take contexts of any length


class _Finished(Exception):
    """Raised by a hook once everything wanted has been seen; never leaves this module."""


class LanguageModel:
    """See the module's text. Not safe for two threads at once: hooks belong to the one module.

    `base` is the stack without the unembedding, `blocks` its transformer blocks with what each adds
    to the stream."""

    def __init__(self, *, name: str, loaded: LoadedModel) -> None:
        self.name = name
        self.loaded = loaded
        self.hf: PreTrainedModel = loaded.hf
        self.tokenizer: Tokenizer = loaded.tokenizer
        config = self.hf.config.get_text_config()
        self.n_layers: int = config.num_hidden_layers
        self.d_model: int = config.hidden_size
        self.n_context: int = getattr(config, "max_position_embeddings", None) or _NO_LIMIT
        self.d_vocab: int = self.hf.get_output_embeddings().weight.shape[0]
        self.dtype: torch.dtype = next(self.hf.parameters()).dtype
        self.device: torch.device = next(self.hf.parameters()).device
        self.base: nn.Module = self.hf.base_model
        self.blocks: tuple[BlockSites, ...] = self._find_sites()
        self._sites = tuple(
            Site(layer, kind) for layer, block in enumerate(self.blocks) for kind in block.kinds()
        )
        self._taps = Taps(self.blocks)
        self.hf.get_output_embeddings().register_forward_pre_hook(_in_one_piece)

    @classmethod
    def open(
        cls,
        spec: ModelSpec,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        progress: Progress = silent,
    ) -> LanguageModel:
        """Load the model `spec` names; `auto` is bfloat16 where that is fast, else float32. Raises
        UserError when it is unknown, missing, damaged or without support."""
        from data.model.sources import load_model  # loads transformers, a second, with the first

        return cls(
            name=name_of(spec),
            loaded=load_model(spec, dtype=dtype, device=device, progress=progress),
        )

    def sites(self) -> tuple[Site, ...]:
        """Every site this architecture has, in the order of the stream."""
        return self._sites

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Raises UserError naming every site that does not exist and those that do."""
        missing = [site for site in dict.fromkeys(sites) if site not in self._sites]
        if missing:
            kinds = ", ".join(dict.fromkeys(site.kind for site in self._sites))
            raise UserError(
                f"{self.name} has no such site",
                found=", ".join(site.name for site in missing),
                expected=f"blocks.<0 to {self.n_layers - 1}>.hook_<one of {kinds}>",
            )

    def width(self, site: Site) -> int:
        """Numbers of one activation at `site`: `d_model`, but for `z` those of all heads."""
        z = self.blocks[site.layer].z
        return z.width if site.kind == "z" and z is not None else self.d_model

    def activations(
        self, ids: Int[Tensor, "batch position"], sites: Sequence[Site]
    ) -> dict[Site, Float[Tensor, "batch position d_model"]]:
        """The activations at `sites`, in the model's dtype. What comes after the last of them is
        not computed. Raises UserError for a site that does not exist, ids outside the vocabulary, a
        context that is too long."""
        self._check_ids(ids)
        self.check_sites(sites)
        if not sites:
            return {}
        last = max(site.layer for site in sites)
        stopped = _stopped_after(self.blocks[last].block)
        with self.recorded(sites) as seen, stopped, torch.no_grad(), suppress(_Finished):
            self.base(ids.to(self.device), use_cache=False)
        return {site: seen[site] for site in sites}

    def logits(
        self,
        ids: Int[Tensor, "batch position"],
        attention_mask: Int[Tensor, "batch total"] | None = None,
        *,
        cache: Cache | None = None,
        n_last: int = 0,
    ) -> Float[Tensor, "batch kept vocab"]:
        """Next-token logits in the model's dtype, without gradients; edits in force apply.

        `attention_mask` (1 = read) may be padded on the left; positions count from each row's first
        1. With a `cache` (`new_cache()`), `ids` holds only the new tokens and the mask covers the
           old ones too. `n_last` > 0 computes the
        logits of only that many last positions. A model that reads padding in spite of the mask
        (recurrent ones) is run row by row; with a cache it is refused."""
        self._check_ids(ids, n_before=0 if cache is None else cache.get_seq_length())
        if attention_mask is not None and not bool(attention_mask.all()) and self.reads_padding:
            return self._logits_row_by_row(ids, attention_mask, cache, n_last)
        return self._logits(ids, attention_mask, cache, n_last)

    @cached_property
    def reads_padding(self) -> bool:
        """Whether padding on the left changes what follows it in spite of the mask, as in models
        whose state runs over every position. Seen in three short passes."""
        ids = (torch.arange(6, device=self.device)[None] * 7 + 1) % self.d_vocab
        padded = torch.cat([ids[:, :3], ids], dim=1)
        mask = (torch.arange(9, device=self.device) >= 3).long()[None]
        with self._taps.suspended():
            alone = self._logits(ids, torch.ones_like(ids), None, 0).float()
            masked = self._logits(padded, mask, None, 0)[:, 3:].float()
            read = self._logits(padded, torch.ones_like(padded), None, 0)[:, 3:].float()
        off = (masked - alone).norm()
        return bool(off > 0.5 * (read - alone).norm() and off > 1e-3 * alone.norm())

    def _logits_row_by_row(
        self, ids: Tensor, attention_mask: Tensor, cache: Cache | None, n_last: int
    ) -> Tensor:
        n_padding = (attention_mask == 0).sum(-1).tolist()
        is_left = bool((attention_mask.long().diff(dim=-1) >= 0).all())
        if cache is not None or not is_left or self._taps.n_hooks:
            raise UserError(
                f"{self.name} reads padding in spite of the attention mask",
                found=f"rows with {', '.join(map(str, n_padding[:8]))} tokens of padding",
                expected="rows of one length, since its state runs over every position",
                fix="give prompts of equal length, or one prompt at a time",
            )
        rows = [
            self._logits(row[None, n:], None, None, 0)[0]
            for row, n in zip(ids, n_padding, strict=True)
        ]
        logits = rows[0].new_zeros(len(rows), ids.shape[1], rows[0].shape[-1])
        for i, row in enumerate(rows):
            logits[i, ids.shape[1] - len(row) :] = row
        return logits[:, -n_last:] if n_last else logits

    def _logits(
        self, ids: Tensor, attention_mask: Tensor | None, cache: Cache | None, n_last: int
    ) -> Tensor:
        options: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            options["past_key_values"] = cache
        if attention_mask is not None:
            mask = attention_mask.to(self.device)
            options["attention_mask"] = mask
            options["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if self._keeps_last:
            options["logits_to_keep"] = n_last
        with torch.no_grad():
            logits = self.hf(ids.to(self.device), **options).logits
        return logits[:, -n_last:] if n_last else logits

    def new_cache(self) -> Cache:
        """An empty key-value cache for `logits`."""
        from transformers.cache_utils import DynamicCache

        return DynamicCache(config=self.hf.config)

    @contextmanager
    def edited(self, edits: Mapping[Site, Edit]) -> Iterator[None]:
        """Inside, each function maps the activation at its site: `[batch, position, d_model]` in
        the model's dtype, the new positions only when a cache is used. Nested uses run in order;
        the hooks are always taken off."""
        self.check_sites(tuple(edits))
        with self._taps.edited(edits):
            yield

    @contextmanager
    def recorded(self, sites: Sequence[Site]) -> Iterator[dict[Site, Tensor]]:
        """Yields a dictionary that every forward pass inside fills anew, with what the model went
        on with."""
        self.check_sites(sites)
        seen: dict[Site, Tensor] = {}
        with self._taps.recorded(sites, seen):
            yield seen

    def unembedding(self) -> tuple[Float[Tensor, "vocab d_model"], Float[Tensor, "d_model"]]:
        """The unembedding's rows and the gain of the norm before it, float32: direct effect on
        logits is `W_U @ (gain * direction)` up to the norm's scale and, for LayerNorm, its
        centring."""
        weight = self.hf.get_output_embeddings().weight.detach().float()
        return weight, norm_gain(self._final_norm(), self.d_model).to(weight.device)

    @cached_property
    def fingerprint(self) -> str:
        """The name of what the forward pass reads (`data.model.fingerprint`). Edits in place are
        seen until it is asked for the first time."""
        return fingerprint_of(self.hf, self.tokenizer)

    @cached_property
    def _keeps_last(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.hf.forward).parameters

    def _find_sites(self) -> tuple[BlockSites, ...]:
        probe = torch.arange(4, device=self.device)[None] % self.d_vocab

        def run() -> None:
            with torch.no_grad():
                self.base(probe, use_cache=False)

        return find_sites(find_blocks(self.base, self.n_layers, run), run)

    def _check_ids(self, ids: Tensor, *, n_before: int = 0) -> None:
        length = n_before + ids.shape[1]
        if length > self.n_context:
            raise UserError(
                "the context is longer than the model's",
                found=f"{length} tokens",
                expected=f"at most {self.n_context}",
                fix=f"choose n_context = {self.n_context} or less",
            )
        if ids.numel() and (int(ids.max()) >= self.d_vocab or int(ids.min()) < 0):
            raise UserError(
                "token ids outside the model's vocabulary",
                found=f"{int(ids.min())} to {int(ids.max())}",
                expected=f"0 to {self.d_vocab - 1}",
                fix="tokenise with this model's own tokenizer",
            )

    def _final_norm(self) -> nn.Module:
        """The last module of the base model outside the blocks that has a weight per model
        dimension."""
        inside = {id(module) for block in self.blocks for module in block.block.modules()}
        norms = [
            module
            for module in self.base.modules()
            if id(module) not in inside
            and "norm" in type(module).__name__.lower()
            and "Model" not in type(module).__name__
        ]
        if not norms:
            raise UserError(
                "this architecture has no final norm to read", where=type(self.hf).__name__
            )
        return norms[-1]


@contextmanager
def _stopped_after(block: nn.Module) -> Iterator[None]:
    """End the forward pass after `block`. Its hook is added last, so it runs after those that
    read."""

    def stop(*_: object) -> None:
        raise _Finished

    handle = block.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def _in_one_piece(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Last columns cut out of a batch are strided; torch multiplies those with the unembedding one
    row at a time (in bf16, 24 rows took longer than all 768 tokens of the batch)."""
    return tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)
