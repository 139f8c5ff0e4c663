"""The name of a model: a digest of everything its forward pass reads.

`2:<weights>` is the sha256 of the configuration, every parameter rounded to bfloat16, every buffer
in full and the tokenizer. A model that runs in float32 and has more than bfloat16 can hold adds
`.<detail>`, a digest of all its digits. So the same files give names that agree up to the detail
whatever dtype they run in (`same_weights`), and within one dtype equal names are equal models.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from data.text.tokenizer import Tokenizer

VERSION = "2"
_VOLATILE = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_attn_implementation",
    "architectures",
}


def fingerprint_of(hf: nn.Module, tokenizer: Tokenizer) -> str:
    """See the module's text. Cost: one pass over the weights, a second over those in float32."""
    weights = hashlib.sha256(_config_text(hf.config).encode())
    detail = hashlib.sha256()
    has_detail = False
    for name, weight in sorted(hf.named_parameters()):
        rounded = weight.detach().to("cpu", torch.bfloat16)
        _add(weights, name, rounded)
        if weight.dtype == torch.float32:
            exact = weight.detach().cpu()
            _add(detail, name, exact)
            has_detail = has_detail or not torch.equal(exact, rounded.float())
    for name, buffer in sorted(hf.named_buffers()):
        exact = buffer.detach().cpu()
        _add(weights, name, exact.float() if exact.is_floating_point() else exact)
    weights.update(tokenizer.fingerprint.encode())
    name = f"{VERSION}:{weights.hexdigest()}"
    return f"{name}.{detail.hexdigest()[:16]}" if has_detail else name


def same_weights(one: str, other: str) -> bool:
    """Whether two names may be of the same files, each run in a dtype of its own."""
    (weights, _, detail), (others, _, other_detail) = one.partition("."), other.partition(".")
    return weights == others and (not detail or not other_detail or detail == other_detail)


def _add(hasher: Any, name: str, values: Tensor) -> None:
    hasher.update(f"{name}:{tuple(values.shape)}".encode())
    hasher.update(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _config_text(config: Any) -> str:
    """The config without what changes from load to load."""
    plain = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE}
    return json.dumps(plain, sort_keys=True, default=str)
