"""The neurons of MLPs: what their last projection reads, recorded while the model runs.

`mlp_projection` finds the module inside an MLP whose weight writes to the stream; its input is one
number a neuron, whatever the architecture (gated or not). `values` has what each neuron writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from data.model.language_model import LanguageModel
from data.model.module_sites import norm_gain
from featureflow.errors import UserError
from featureflow.progress import Progress, silent

_BATCH = 8


def mlp_projection(model: LanguageModel, layer: int) -> nn.Module:
    """The last module of a layer's MLP with a matrix that writes to the stream. Raises UserError
    when there is none."""
    reader = model.blocks[layer].mlp_reader
    matrices = [
        module
        for module in ([] if reader is None else reader.modules())
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
    if not matrices or model.d_model not in matrices[-1].weight.shape:  # type: ignore[operator]
        raise UserError(
            "this MLP has no projection that can be read neuron by neuron",
            where=f"{model.name}, layer {layer}",
            fix="a mixture of experts has one a token; name other layers",
        )
    return matrices[-1]


def values(model: LanguageModel, layer: int) -> Float[Tensor, "neuron d_model"]:
    """What a unit of every neuron writes to the stream."""
    rows = written_by(mlp_projection(model, layer), model.d_model)
    return _through_norm(rows, model.blocks[layer].mlp)


def values_of_heads(model: LanguageModel, layer: int) -> Float[Tensor, "input d_model"] | None:
    """What a unit of every input of W_O writes to the stream; None where no W_O was found."""
    at = model.blocks[layer]
    if at.z is None:
        return None
    return _through_norm(written_by(at.z.module, model.d_model), at.attention)


def written_by(projection: nn.Module, d_model: int) -> Float[Tensor, "input d_model"]:
    """Rows of a projection's weight: what a unit of each input writes."""
    weight: Any = projection.weight
    weight = weight.detach().float().cpu()
    is_turned = isinstance(projection, Conv1D) or weight.shape[0] != d_model  # GPT-2's layout
    return weight if is_turned and not isinstance(projection, nn.Linear) else weight.T


def _through_norm(
    rows: Float[Tensor, "input d_model"], added: nn.Module | None
) -> Float[Tensor, "input d_model"]:
    """Times the gain of a norm whose output is what is added (Gemma 2); the norm's scale, one
    number a token, is left out."""
    weights = [] if added is None else list(added.parameters())
    if added is None or not weights or any(each.ndim > 1 for each in weights):
        return rows
    return rows * norm_gain(added, rows.shape[1])


def record_neurons(
    model: LanguageModel,
    ids: Int[Tensor, "context position"],
    layers: Sequence[int],
    *,
    progress: Progress = silent,
) -> dict[int, Float[Tensor, "context position neuron"]]:
    """Every neuron of some layers on every token, in float32."""
    seen: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    handles = []
    for layer in layers:

        def keep(_: nn.Module, args: tuple[Tensor, ...], layer: int = layer) -> None:
            seen[layer].append(args[0].detach().float().cpu())

        handles.append(mlp_projection(model, layer).register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            for done, part in enumerate(ids.split(_BATCH)):
                progress("run the neurons", done * _BATCH, len(ids))
                model.base(part.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    progress("run the neurons", len(ids), len(ids))
    return {layer: torch.cat(parts).view(*ids.shape, -1) for layer, parts in seen.items()}
