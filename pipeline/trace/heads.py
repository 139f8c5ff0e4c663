"""Which attention heads write a supernode, and from which token.

The stream at a cut is the embedding and everything that attention and MLPs added to it. A
supernode's strength is w · h at its peak, plus a constant, so a head's part of it is exact:
w · W_O z, with z what the attention's last projection reads. By source token that is pattern × OV;
the strongest source is named where the model hands out its patterns and values.

It is the direct path: what a head writes and an MLP turns into the feature counts as the MLP's.
Cost: two forward passes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from featureflow.sites import Site, SiteKind
from pipeline.trace.stream import Reading, Traced

_MOST, _TOLERANCE = 4, 0.02
_COLUMNS = ("supernode", "layer", "head", "part", "source", "source_part", "heads", "mlps")


@torch.no_grad()
def heads_of(found: Traced, readings: Sequence[Reading], names: Sequence[int]) -> pd.DataFrame:
    """The strongest heads of each reading: their `part` of its strength, the `source` token that
    most of it comes from and that token's part (−1 and NaN where patterns cannot be read); `heads`
    and `mlps` are the parts of all of them up to the peak. Empty for a model whose heads do not add
    to the stream as they are."""
    model, rows = found.model, []
    blocks = getattr(model, "blocks", ())
    n_heads = getattr(getattr(model.hf, "config", None), "num_attention_heads", 0)
    if blocks and n_heads and all(at.z and at.mlp and at.attention for at in blocks):
        kinds: tuple[SiteKind, ...] = ("z", "attn_out", "mlp_out")
        sites = [Site(layer, kind) for layer in range(len(blocks)) for kind in kinds]
        seen = model.activations(torch.tensor([found.ids]), sites)
        mixed = _patterns_and_values(model, found.ids, n_heads)
        for name, reading in zip(names, readings, strict=True):
            rows += [(name, *row) for row in _heads(found, reading, seen, mixed, n_heads)]
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def _heads(
    found: Traced, reading: Reading, seen: Any, mixed: Any, n_heads: int
) -> Iterator[tuple[int, int, float, int, float, float, float]]:
    peak, token, latents, weights = reading
    w, blocks = found.saes[peak].W_enc[list(latents)].T @ weights, found.model.blocks
    layers = range(peak.layer + 1)
    parts = torch.stack(
        [
            _parts(blocks[k].z.module, _split(seen[Site(k, "z")][0, token], n_heads), w)
            for k in layers
        ]
    )
    heads, mlps = (
        sum(float(seen[Site(k, kind)][0, token] @ w) for k in layers)
        for kind in ("attn_out", "mlp_out")
    )
    if abs(heads - float(parts.sum()) - _constants(blocks, layers, w)) > _TOLERANCE * float(
        parts.abs().sum()
    ):
        return  # a norm stands between the projection and the stream
    for place in parts.flatten().abs().topk(min(_MOST, parts.numel())).indices.tolist():
        layer, head = divmod(place, n_heads)
        part, source, from_source = float(parts[layer, head]), -1, float("nan")
        if mixed is not None:
            pattern, value = (each[layer][head] for each in mixed)
            z = torch.zeros(len(value), n_heads, value.shape[-1]).to(value)
            z[:, head] = pattern[token, :, None] * value
            by_source = _parts(blocks[layer].z.module, z.flatten(1), w)
            if abs(float(by_source.sum()) - part) <= _TOLERANCE * float(by_source.abs().sum()):
                source = int(by_source.abs().argmax())
                from_source = float(by_source[source])
        yield layer, head, part, source, from_source, heads, mlps


def _split(z: Float[Tensor, "width"], n_heads: int) -> Float[Tensor, "head width"]:
    """One row a head, with only that head's part of z."""
    return torch.eye(n_heads).to(z).repeat_interleave(len(z) // n_heads, dim=1) * z


def _parts(
    projection: nn.Module, z: Float[Tensor, "row width"], w: Float[Tensor, "d_model"]
) -> Float[Tensor, "row"]:
    """w · W_O z without the projection's bias."""
    return (projection(z) - projection(torch.zeros_like(z[:1]))) @ w


def _constants(blocks: Any, layers: range, w: Float[Tensor, "d_model"]) -> float:
    """What the biases of the projections add."""
    modules = [blocks[k].z.module for k in layers]
    return sum(float(m(torch.zeros(blocks[0].z.width).to(w)) @ w) for m in modules)


def _patterns_and_values(
    model: Any, ids: Sequence[int], n_heads: int
) -> tuple[list[Tensor], list[Tensor]] | None:
    """By layer: who looks where `[head, token, token]`, and what is read there `[head, token, d]`;
    None for a model that does not say."""
    hf = model.hf
    kernel = getattr(hf.config, "_attn_implementation", None)
    try:
        hf.set_attn_implementation("eager")
        out = hf(torch.tensor([list(ids)]).to(hf.device), use_cache=True, output_attentions=True)
        pattern = [each[0] for each in out.attentions]
        values = [layer.values[0] for layer in out.past_key_values.layers]
    except (AttributeError, ValueError, TypeError):
        return None
    finally:
        if kernel is not None:
            hf.set_attn_implementation(kernel)
    repeated = [v.repeat_interleave(n_heads // len(v), dim=0) for v in values]
    return (pattern, repeated) if len(pattern) == len(repeated) == model.n_layers else None
