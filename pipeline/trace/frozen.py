"""The model as a linear map of its stream, for one prompt: attention patterns and the scales of
norms are held, values are the same.

1. Queries and keys take no gradient, so it passes attention only through the values, at the pattern
   that the prompt has.
2. A norm is `scale · gain · x` (LayerNorm: of the centred x, plus a bias) with the scale of each
   row held.

MLPs are left as they are; transcoders take their place (pipeline/trace/transcoders.py).
The rule is that of circuit-tracer (Ameisen et al. 2025, Circuit Tracing).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from data.model.module_sites import norm_gain
from featureflow.errors import UserError

_NAME = "sdpa_held_pattern"


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Inside, gradients see patterns and scales as constants. Raises UserError for a model whose
    attention cannot be replaced."""
    hf = model.hf
    text = hf.config.get_text_config()
    if getattr(text, "attn_logit_softcapping", None):
        raise UserError(
            f"the attention of {model.name} cannot be held: it caps its logits",
            fix="trace this model without --through transcoders",
        )
    kernel = getattr(hf.config, "_attn_implementation", None)
    try:
        hf.set_attn_implementation(_NAME)
    except (AttributeError, ValueError) as error:
        raise UserError(f"the attention of {model.name} cannot be held", found=str(error)) from None
    with ExitStack() as hooks:
        hooks.callback(hf.set_attn_implementation, kernel)
        for module in hf.modules():
            name = type(module).__name__.lower()
            if "norm" in name and "model" not in name:
                hooks.callback(_held_scale(module).remove)
        yield


def _attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kw: Any) -> Any:
    return sdpa_attention_forward(module, q.detach(), k.detach(), v, *rest, **kw)


def _held_scale(norm: nn.Module) -> Any:
    width = max(each.shape[-1] for each in norm.parameters())
    gain = norm_gain(norm, width)

    def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        x = args[0]
        centred = x - x.mean(-1, keepdim=True) if isinstance(norm, nn.LayerNorm) else x
        direction = gain.to(x) * centred
        with torch.no_grad():
            rest = out - norm.forward(torch.zeros_like(x[:1, :1]))
            scale = (rest * direction).sum(-1, keepdim=True) / direction.square().sum(-1, True)
        held = scale * direction
        return out.detach() + held - held.detach()

    return norm.register_forward_hook(hook)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
