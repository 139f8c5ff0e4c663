"""One prompt's residual stream, cut at chosen layers into features, error, bias and sinks, with the
gradient of one number at every cut.

1. One forward pass in float32 keeps the stream h at every cut; one backward pass gives g = ∂y/∂h
   there, with nothing frozen.
2. At a cut h = Σ z_i d_i + error + b_dec on every token. A token whose norm is more than 10 times
   the median (the start token in any case) is a sink: the SAE never saw such rows, so the whole row
   is one node.
3. A node's score is its part of the stream times g: s = z_i g·d_i, g·error, g·b_dec, g·h. Scores of
   different cuts are the same effect seen at different depths; they are never added over cuts.
4. `removed` runs the model with features taken off, one set a row. What is taken off is the running
   value, z_i relu(pre_i) / pre_i: after an earlier removal the stored value would be subtracted
   twice. Features that only the removal wakes are left alone.

Cost: one forward and one backward pass; a removal is one row of a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.sites import FeatureId, Site
from sae import Sae
from steering.sequences import device_of, forward_arguments

Stream = dict[Site, Float[Tensor, "row token d_model"]]
FEATURE, ERROR, BIAS, SINK = "feature", "error", "bias", "sink"
_SINK = 10.0


@dataclass(frozen=True, kw_only=True)
class Target:
    """The number that is explained: the logit of `answer` less that of `foil` after the last token,
    or (with `feature`) the pre-activation of a feature on `token`."""

    answer: int = -1
    foil: int = -1
    feature: FeatureId | None = None
    token: int = -1

    def value(
        self, logits: Float[Tensor, "row vocab"], stream: Stream, saes: Mapping[Site, Sae]
    ) -> Float[Tensor, "row"]:
        if self.feature is None:
            return logits[:, self.answer] - logits[:, self.foil]
        site, latent = self.feature.site, self.feature.latent
        return pre_activations(saes[site], stream[site][:, self.token], [latent])[:, 0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Traced:
    """The pass: everything that scores and removals are made from. `nodes` has one row for every
    active feature and every error, bias and sink: cut, token, kind, latent, z, pre, score."""

    model: Any
    saes: Mapping[Site, Sae]
    ids: tuple[int, ...]
    cuts: tuple[Site, ...]
    target: Target
    y: float
    logits: Float[Tensor, "vocab"]
    stream: Stream
    gradient: Stream
    nodes: pd.DataFrame


@dataclass(frozen=True, kw_only=True, eq=False)
class Removal:
    """What one batch of removals gave, row by row; `read` is what was read before the edits."""

    y: Float[Tensor, "row"]
    logits: Float[Tensor, "row vocab"]
    read: Float[Tensor, "row reading"]


def pre_activations(
    sae: Sae, x: Float[Tensor, "*token d_in"], latents: Sequence[int]
) -> Float[Tensor, "*token selected"]:
    """`w_i·(x − b_in) + b_i` of some latents, with gradients."""
    chosen = torch.as_tensor(latents, dtype=torch.int64)
    return (x - sae.b_in) @ sae.W_enc[chosen].T + sae.b_enc[chosen]


def traced(
    model: Any, saes: Mapping[Site, Sae], ids: Sequence[int], cuts: Sequence[Site], target: Target
) -> Traced:
    """Run the prompt and score every node. `cuts` lie before the target."""
    stream: Stream = {}
    wanted = sorted({*cuts, *([] if target.feature is None else [target.feature.site])})

    def keep(site: Site, h: Tensor) -> Tensor:
        stream[site] = h.detach().requires_grad_() if site == wanted[0] else h.view_as(h)
        return stream[site]

    edits = {site: partial(keep, site) for site in wanted}
    with torch.enable_grad():
        logits = run_model(model, [ids], edits)
        y = target.value(logits, stream, saes)
        found = torch.autograd.grad(y.sum(), [stream[site] for site in cuts], allow_unused=True)
    gradient = {
        site: torch.zeros_like(stream[site]) if g is None else g
        for site, g in zip(cuts, found, strict=True)
    }
    kept = {site: h.detach() for site, h in stream.items()}
    nodes = [nodes_at(saes[site], site, kept[site][0], gradient[site][0]) for site in cuts]
    return Traced(
        model=model,
        saes=saes,
        ids=tuple(ids),
        cuts=tuple(cuts),
        target=target,
        y=float(y.detach()),
        logits=logits[0].detach(),
        stream=kept,
        gradient=gradient,
        nodes=pd.concat(nodes, ignore_index=True),
    )


def run_model(
    model: Any, rows: Sequence[Sequence[int]], edits: Mapping[Site, Callable[[Tensor], Tensor]]
) -> Float[Tensor, "row vocab"]:
    """Logits after the last token of every row, with the edits in force."""
    ids = torch.tensor([list(row) for row in rows], device=device_of(model))
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    real = torch.ones_like(ids, dtype=torch.bool)
    arguments = forward_arguments(model, mask=real, positions=positions, n_last=1)
    with model.edited(edits):
        return model.hf(input_ids=ids, use_cache=False, **arguments).logits[:, -1].float()


@torch.no_grad()
def nodes_at(
    sae: Sae, site: Site, h: Float[Tensor, "token d_model"], g: Float[Tensor, "token d_model"]
) -> pd.DataFrame:
    """Every node of one cut with its score."""
    norm = h.norm(dim=-1)
    sink = norm > _SINK * norm[1:].median()
    sink[0] = True
    z, pre = sae.encode(h), sae.pre_activations(h)
    z[sink] = 0
    token, latent = (z != 0).nonzero(as_tuple=True)
    value, error = z[token, latent], h - sae.decode(z)
    rest, at = (~sink).nonzero().squeeze(1), sink.nonzero().squeeze(1)
    rows = (
        (FEATURE, token, latent, value, value * (g @ sae.W_dec.T)[token, latent]),
        (ERROR, rest, rest * 0 - 1, error[rest].norm(dim=-1), (g * error).sum(-1)[rest]),
        (BIAS, rest, rest * 0 - 1, rest * 0.0, (g @ sae.b_dec)[rest]),
        (SINK, at, at * 0 - 1, norm[at], (g * h).sum(-1)[at]),
    )
    frames = [
        pd.DataFrame(
            {
                "cut": site.short,
                "layer": site.layer,
                "kind": kind,
                "token": t.cpu().numpy(),
                "latent": i.cpu().numpy(),
                "z": v.cpu().numpy().astype(np.float64),
                "score": s.cpu().numpy().astype(np.float64),
            }
        )
        for kind, t, i, v, s in rows
    ]
    frames[0]["pre"] = pre[token, latent].cpu().numpy()
    return pd.concat(frames, ignore_index=True)


@torch.no_grad()
def removed(
    traced: Traced,
    sets: Sequence[pd.DataFrame],
    *,
    readings: Sequence[tuple[Site, int, Sequence[int], Float[Tensor, "selected"]]] = (),
) -> Removal:
    """Run the prompt once a set, with the set's features (rows of `nodes`) taken off. A reading
    (cut, token, latents, weights) is the weighted sum of pre-activations, read before the edit."""
    read = torch.zeros(len(sets), len(readings))
    frame = pd.concat([each.assign(row=row) for row, each in enumerate(sets)])
    stream: Stream = {}

    def edit(site: Site, h: Tensor) -> Tensor:
        for number, (cut, token, latents, weights) in enumerate(readings):
            if cut == site:
                pre = pre_activations(traced.saes[site], h[:, token], latents)
                read[:, number] = pre @ weights
        here = frame[(frame["cut"] == site.short) & (frame["kind"] == FEATURE)]
        stream[site] = _without(traced.saes[site], h, here) if len(here) else h
        return stream[site]

    sites = {*traced.cuts, *(cut for cut, *_ in readings)}
    sites |= set() if traced.target.feature is None else {traced.target.feature.site}
    rows = [traced.ids] * len(sets)
    logits = run_model(traced.model, rows, {site: partial(edit, site) for site in sorted(sites)})
    return Removal(y=traced.target.value(logits, stream, traced.saes), logits=logits, read=read)


def _without(
    sae: Sae, h: Float[Tensor, "row token d_model"], nodes: pd.DataFrame
) -> Float[Tensor, "row token d_model"]:
    row, token, latent = (torch.tensor(nodes[name].tolist()) for name in ("row", "token", "latent"))
    pre = (h[row, token] - sae.b_in).mul(sae.W_enc[latent]).sum(-1) + sae.b_enc[latent]
    z, first = (torch.tensor(nodes[name].tolist()) for name in ("z", "pre"))
    value = z * pre.relu() / first
    return h.index_put((row, token), -value[:, None] * sae.W_dec[latent], accumulate=True)
