"""One prompt's residual stream, cut at chosen layers into features, error, bias and sinks, with the
gradient of one number at every cut.

1. One forward pass in float32 keeps the stream h at every cut; one backward pass gives g = ∂y/∂h
   there, with nothing frozen.
2. At a cut h = Σ z_i d_i + error + b_dec on every token. A token whose norm is more than 10 times
   the median (the start token in any case) is a sink: the SAE never saw such rows, so the whole row
   is one node.
3. A node's score is its part of the stream times g: s = z_i g·d_i, g·error, g·b_dec, g·h. Scores of
   different cuts are the same effect seen at different depths; they are never added over cuts.
4. `edited` runs the model with features set to 0, or to the value in the column `to`, one set a
   row. What is taken off is the running value, z_i relu(pre_i) / pre_i: after an earlier removal
   the stored value would be subtracted twice, and a factor on it would compound from cut to cut.
   Features that only the edit wakes are left alone.

Cost: one forward and one backward pass; an edit is one row of a forward pass. Rows run in blocks,
so memory is that of a block.
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

from featureflow.errors import UserError
from featureflow.progress import Progress, silent
from featureflow.sites import FeatureId, Site, parse_site
from sae import Sae
from steering.sequences import device_of, forward_arguments

Stream = dict[Site, Float[Tensor, "row token d_model"]]
FEATURE, ERROR, BIAS, SINK = "feature", "error", "bias", "sink"
BLOCK_TOKENS, _SINK = 2048, 10.0


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
class Edited:
    """What a batch of edits gave, row by row; `read` is what was read before the edits."""

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
    """Run the prompt and score every node. `cuts` lie before the target. Raises UserError for a
    model through which no gradient flows."""
    stream: Stream = {}
    wanted = sorted({*cuts, *([] if target.feature is None else [target.feature.site])})

    def keep(site: Site, h: Tensor) -> Tensor:
        stream[site] = h.detach().requires_grad_() if site == wanted[0] else h.view_as(h)
        return stream[site]

    edits = {site: partial(keep, site) for site in wanted}
    with torch.enable_grad():
        logits = run_model(model, [ids], edits)
        y = target.value(logits, stream, saes)
        if not y.requires_grad:
            raise UserError(
                f"no gradient flows through {model.name}",
                expected="weights that PyTorch differentiates through: float32 or bfloat16",
                fix="trace the model as it was before it was quantised or compiled",
            )
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
    return run_whole(model, rows, edits, n_last=1)[:, -1]


def run_whole(
    model: Any,
    rows: Sequence[Sequence[int]],
    edits: Mapping[Site, Callable[[Tensor], Tensor]],
    *,
    n_last: int = 0,
) -> Float[Tensor, "row token vocab"]:
    """Logits after every token, or after the last ones."""
    ids = torch.tensor([list(row) for row in rows], device=device_of(model))
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    real = torch.ones_like(ids, dtype=torch.bool)
    arguments = forward_arguments(model, mask=real, positions=positions, n_last=n_last)
    with model.edited(edits):
        return model.hf(input_ids=ids, use_cache=False, **arguments).logits.float()


@torch.no_grad()
def nodes_at(
    sae: Sae, site: Site, h: Float[Tensor, "token d_model"], g: Float[Tensor, "token d_model"]
) -> pd.DataFrame:
    """Every node of one cut with its score."""
    norm = h.norm(dim=-1)
    sink = norm > _SINK * norm[len(norm) > 1 :].median()
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


Reading = tuple[Site, int, Sequence[int], Float[Tensor, "selected"]]
"""(cut, token, latents, weights): the weighted sum of pre-activations there."""


@torch.no_grad()
def edited(
    traced: Traced,
    sets: Sequence[pd.DataFrame],
    *,
    readings: Sequence[Reading] = (),
    progress: Progress = silent,
) -> Edited:
    """Run the prompt once a set, with the set's features (rows of `nodes`) at 0 or at their `to`.
    Readings are taken before the edit of their cut."""
    size = max(1, BLOCK_TOKENS // len(traced.ids))
    parts = []
    for start in range(0, len(sets), size):
        progress("edits", start, len(sets))
        parts.append(_block(traced, sets[start : start + size], readings))
    progress("edits", len(sets), len(sets))
    y, logits, read = (torch.cat(each) for each in zip(*parts, strict=True))
    return Edited(y=y, logits=logits, read=read)


def _block(
    traced: Traced, sets: Sequence[pd.DataFrame], readings: Sequence[Reading]
) -> tuple[Tensor, Tensor, Tensor]:
    read, stream = torch.zeros(len(sets), len(readings)), dict[Site, Tensor]()
    edits = edits_of(traced.saes, sets)

    def edit(site: Site, h: Tensor) -> Tensor:
        for number, (cut, token, latents, weights) in enumerate(readings):
            if cut == site:
                read[:, number] = pre_activations(traced.saes[site], h[:, token], latents) @ weights
        stream[site] = edits[site](h) if site in edits else h
        return stream[site]

    sites = {*traced.cuts, *(cut for cut, *_ in readings)}
    sites |= set() if traced.target.feature is None else {traced.target.feature.site}
    rows = [traced.ids] * len(sets)
    logits = run_model(traced.model, rows, {site: partial(edit, site) for site in sorted(sites)})
    return traced.target.value(logits, stream, traced.saes), logits, read


def edits_of(
    saes: Mapping[Site, Sae], sets: Sequence[pd.DataFrame]
) -> dict[Site, Callable[[Tensor], Tensor]]:
    """The edit of every site that a batch with one row a set changes: columns cut, token, latent,
    z, pre and, for values other than 0, to."""
    frame = pd.concat([each.assign(row=row) for row, each in enumerate(sets)])
    frame = frame.assign(to=frame["to"].fillna(0.0) if "to" in frame else 0.0)
    by_cut = {parse_site(cut): here for cut, here in frame.groupby("cut", sort=False)}
    return {site: partial(_set_to, saes[site], here) for site, here in by_cut.items()}


def _set_to(
    sae: Sae, nodes: pd.DataFrame, h: Float[Tensor, "row token d_model"]
) -> Float[Tensor, "row token d_model"]:
    names = ("row", "token", "latent", "z", "pre", "to")
    row, token, latent, z, first, to = (
        torch.tensor(nodes[name].tolist(), device=h.device) for name in names
    )
    pre = (h[row, token] - sae.b_in).mul(sae.W_enc[latent]).sum(-1) + sae.b_enc[latent]
    change = to - z * pre.relu() / first
    return h.index_put((row, token), change[:, None] * sae.W_dec[latent], accumulate=True)
