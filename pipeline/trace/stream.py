"""One prompt's residual stream, cut at chosen layers into features, error, bias and sinks, with the
gradient of one number at every cut.

1. One forward pass in float32 keeps the stream h at every cut; one backward pass gives g = ∂y/∂h
   there, with nothing frozen.
2. At a cut h = Σ z_i d_i + error + b_dec on every token. A token whose norm is more than 10 times
   the median (the start token in any case) is a sink: the SAE never saw such rows, so the whole row
   is one node.
3. A node's score is its part of the stream times g: s = z_i g·d_i, g·error, g·b_dec, g·h. Scores of
   different cuts are the same effect seen at different depths; they are never added over cuts.
4. Through transcoders a cut is the output of an MLP, which the transcoder reads its features of at
   another site (`input_of`). Its bias node holds the skip map too. g is the gradient of the linear
   replacement model: attention patterns and norm scales are held, and an MLP is its transcoder's
   skip map and active features.
5. `edited` runs the model with features set to 0, or to the value in the column `to`, one set a
   row. What is taken off is the running value, z_i relu(pre_i) / pre_i: after an earlier removal
   the stored value would be subtracted twice, and a factor on it would compound from cut to cut.
   Features that only the edit wakes are left alone.

Cost: one forward and one backward pass; an edit is one row of a forward pass from its first cut on.
Rows run in blocks of like first cuts, so memory is that of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data.model.language_model import LanguageModel
from data.model.partial_forward import continued_from
from featureflow.errors import UserError
from featureflow.progress import Progress, silent
from featureflow.sites import FeatureId, Site, parse_site
from pipeline.trace.frozen import frozen
from sae import Sae
from steering.sequences import device_of, forward_arguments

Stream = dict[Site, Float[Tensor, "row token d_model"]]
FEATURE, ERROR, BIAS, SINK = "feature", "error", "bias", "sink"
EMBEDDING = Site(0, "resid_pre")
BLOCK_TOKENS, _SINK = 128, 10.0


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
        seen = stream[input_of(saes[site], site)]
        return pre_activations(saes[site], seen[:, self.token], [latent])[:, 0]


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

    @property
    def is_linear(self) -> bool:
        """Whether it goes through transcoders."""
        return input_of(self.saes[self.cuts[0]], self.cuts[0]) != self.cuts[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Edited:
    """What a batch of edits gave, row by row; `read` is what was read before the edits."""

    y: Float[Tensor, "row"]
    logits: Float[Tensor, "row vocab"]
    read: Float[Tensor, "row reading"]


def input_of(sae: Sae, site: Site) -> Site:
    """What a dictionary at a site encodes: the site, or what a transcoder reads."""
    reads = sae.metadata.get("reads")
    return parse_site(reads) if reads else site


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
    seen = {*cuts, *([] if target.feature is None else [target.feature.site])}
    with kept_stream(model, saes, seen, features=True) as (stream, edits):
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
    nodes = [
        nodes_at(saes[at], at, kept[input_of(saes[at], at)][0], kept[at][0], gradient[at][0])
        for at in cuts
    ]
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


@contextmanager
def kept_stream(
    model: Any, saes: Mapping[Site, Sae], sites: Iterable[Site], *, features: bool
) -> Iterator[tuple[Stream, dict[Site, Callable[[Tensor], Tensor]]]]:
    """Inside, edits that keep what passes at the sites and what their dictionaries read, from the
    first on with gradients. For transcoders the model is linear inside, from the embedding on, with
    their `features` or, without, the skip maps alone."""
    reads = {site: input_of(saes[site], site) for site in sites}
    linear = any(a != b for a, b in reads.items())
    wanted = sorted({*reads, *reads.values(), *([EMBEDDING] if linear else [])})
    stream: Stream = {}

    def keep(site: Site, h: Tensor) -> Tensor:
        if site == wanted[0]:
            stream[site] = h.detach().requires_grad_()
        elif reads.get(site, site) != site:
            part = _linear_part(saes[site], stream[reads[site]], features)
            stream[site] = h.detach().requires_grad_() + part - part.detach()
        else:
            stream[site] = h.view_as(h)
        return stream[site]

    with torch.enable_grad(), frozen(model) if linear else nullcontext():
        yield stream, {site: partial(keep, site) for site in wanted}


def _linear_part(sae: Sae, x: Float[Tensor, "row token d_in"], features: bool) -> Tensor:
    """What of a transcoder's output its input moves: the skip map and the active features."""
    part = x.new_zeros(*x.shape[:-1], sae.d_out)
    if sae.W_skip is not None:
        part = part + x @ sae.W_skip.T
    if features:
        active = (sae.encode(x.detach()) != 0) & ~sinks(x.detach())[..., None]
        part = part + (sae.pre_activations(x) * active) @ sae.W_dec
    return part


def sinks(x: Float[Tensor, "*row token d_model"]) -> Bool[Tensor, "*row token"]:
    """Tokens whose row is one node."""
    norm = x.norm(dim=-1)
    found = norm > _SINK * norm[..., x.shape[-2] > 1 :].median(-1, keepdim=True).values
    found[..., 0] = True
    return found


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
    sae: Sae,
    site: Site,
    x: Float[Tensor, "token d_in"],
    h: Float[Tensor, "token d_model"],
    g: Float[Tensor, "token d_model"],
) -> pd.DataFrame:
    """Every node of one cut with its score; `x` is what the dictionary reads, `h` what it gives."""
    norm, sink = h.norm(dim=-1), sinks(x)
    z, pre = sae.encode(x), sae.pre_activations(x)
    z[sink] = 0
    token, latent = (z != 0).nonzero(as_tuple=True)
    bias = sae.b_dec if sae.W_skip is None else sae.b_dec + x @ sae.W_skip.T
    value, error = z[token, latent], h - z @ sae.W_dec - bias
    rest, at = (~sink).nonzero().squeeze(1), sink.nonzero().squeeze(1)
    rows = (
        (FEATURE, token, latent, value, value * (g @ sae.W_dec.T)[token, latent]),
        (ERROR, rest, rest * 0 - 1, error[rest].norm(dim=-1), (g * error).sum(-1)[rest]),
        (BIAS, rest, rest * 0 - 1, rest * 0.0, (g * bias).sum(-1)[rest]),
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
    starts = [_start(traced, each) for each in sets]
    order = sorted(range(len(sets)), key=lambda i: starts[i] or EMBEDDING)
    size = max(1, BLOCK_TOKENS // len(traced.ids))
    parts = []
    for done in range(0, len(sets), size):
        progress("edits", done, len(sets))
        rows = order[done : done + size]
        parts.append(_block(traced, [sets[i] for i in rows], readings, starts[rows[0]]))
    progress("edits", len(sets), len(sets))
    back = torch.tensor(order).argsort()
    y, logits, read = (torch.cat(each)[back] for each in zip(*parts, strict=True))
    return Edited(y=y, logits=logits, read=read)


def _start(traced: Traced, nodes: pd.DataFrame) -> Site | None:
    """The first cut that an edit changes, where the model can go on from it. An edit of nothing
    runs whole."""
    if nodes.empty or traced.is_linear or not isinstance(traced.model, LanguageModel):
        return None
    first = min(parse_site(cut) for cut in nodes["cut"].unique())
    return first if first.kind == "resid_post" else None


def continued(traced: Traced, site: Site | None, n_rows: int) -> AbstractContextManager[None]:
    """Inside, the model goes on from a cut of the prompt; None: it runs whole."""
    if site is None or not isinstance(traced.model, LanguageModel) or site.kind != "resid_post":
        return nullcontext()
    return continued_from(traced.model, site.layer, traced.stream[site].expand(n_rows, -1, -1))


def _block(
    traced: Traced, sets: Sequence[pd.DataFrame], readings: Sequence[Reading], start: Site | None
) -> tuple[Tensor, Tensor, Tensor]:
    read, stream = torch.zeros(len(sets), len(readings)), dict[Site, Tensor]()
    edits = edits_of(traced.saes, sets)

    def edit(site: Site, h: Tensor) -> Tensor:
        for number, (cut, token, latents, weights) in enumerate(readings):
            if input_of(traced.saes[cut], cut) == site:
                read[:, number] = pre_activations(traced.saes[cut], h[:, token], latents) @ weights
        stream[site] = edits[site](h) if site in edits else h
        return stream[site]

    sites = {*traced.cuts, *(cut for cut, *_ in readings)}
    sites |= set() if traced.target.feature is None else {traced.target.feature.site}
    sites |= {input_of(traced.saes[site], site) for site in sites}
    for number, (cut, token, latents, weights) in enumerate(readings):
        if start is not None and cut < start:  # as in the prompt
            x = traced.stream[cut][0, token]
            read[:, number] = pre_activations(traced.saes[cut], x, latents) @ weights
    taken = {site: partial(edit, site) for site in sorted(sites) if not start or site >= start}
    with continued(traced, start, len(sets)):
        logits = run_model(traced.model, [traced.ids] * len(sets), taken)
    return traced.target.value(logits, stream, traced.saes), logits, read


def edits_of(
    saes: Mapping[Site, Sae], sets: Sequence[pd.DataFrame]
) -> dict[Site, Callable[[Tensor], Tensor]]:
    """The edit of every site that a batch with one row a set changes: columns cut, token, latent,
    z, pre and, for values other than 0, to."""
    frame = pd.concat([each.assign(row=row) for row, each in enumerate(sets)])
    frame = frame.assign(to=frame["to"].fillna(0.0) if "to" in frame else 0.0)
    by_cut = {parse_site(cut): here for cut, here in frame.groupby("cut", sort=False)}
    edits: dict[Site, Callable[[Tensor], Tensor]] = {}
    for site, here in by_cut.items():
        source, seen = input_of(saes[site], site), dict[Site, Tensor]()
        if source != site:
            edits[source] = partial(_seen, seen, source)
        edits[site] = partial(_set_to, saes[site], here, seen, source)
    return edits


def _seen(seen: Stream, site: Site, x: Tensor) -> Tensor:
    seen[site] = x
    return x


def _set_to(
    sae: Sae, nodes: pd.DataFrame, seen: Stream, source: Site, h: Float[Tensor, "row token d_model"]
) -> Float[Tensor, "row token d_model"]:
    names = ("row", "token", "latent", "z", "pre", "to")
    row, token, latent, z, first, to = (
        torch.tensor(nodes[name].tolist(), device=h.device) for name in names
    )
    x = seen.get(source, h)
    pre = (x[row, token] - sae.b_in).mul(sae.W_enc[latent]).sum(-1) + sae.b_enc[latent]
    change = to - z * pre.relu() / first
    return h.index_put((row, token), change[:, None] * sae.W_dec[latent], accumulate=True)
