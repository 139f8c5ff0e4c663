"""`featureflow trace "PROMPT"`: why the model says what it says here, in its own features.

1. Run the prompt in float32 and score every active feature at every third layer by one gradient
   (pipeline/trace/stream.py). The gradient only finds candidates.
2. Group the strongest into supernodes: one flow on one token (pipeline/trace/supernodes.py).
3. Really remove each of the heaviest, all in one batch, beside equally many random active features.
   Sizes shown are the real ones; the prediction stands beside them.
4. Edges between supernodes: how much of B's strength (its part of y) goes when A is removed, beside
   what the gradient from the cut before B predicts.
5. Print the checks (pipeline/trace/checks.py) with every trace.

A trace does not claim to be the whole computation: what is kept at all cuts together does not bring
the answer back. It says what is necessary, how much, and what a supernode writes to later ones.
Cost: 2 forward passes, 1 backward pass, 2 rows of a forward pass a supernode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import UserError
from featureflow.sites import Site, parse_site
from pipeline.trace.checks import checks_of
from pipeline.trace.stream import (
    Removal,
    Stream,
    Target,
    Traced,
    pre_activations,
    removed,
    run_model,
    traced,
)
from pipeline.trace.supernodes import grouped, peak_cut, prediction, random_like, strongest
from sae import Sae

_TOP, _BROKEN, _SMALLEST = 5, 0.2, 0.2


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """`share` of Σ|score| kept per cut, how many supernodes are removed and how many are shown, and
    from what share of |y| on an edge is shown."""

    share: float = 0.8
    n_removed: int = 24
    n_shown: int = 12
    edge_share: float = 0.15
    seed: int = 0


DEFAULT = TraceOptions()


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """What was found. `supernodes` and `edges` are ordered by their real effect; `checks` has what
    was demanded and measured."""

    traced: Traced
    options: TraceOptions
    nodes: pd.DataFrame
    supernodes: pd.DataFrame
    edges: pd.DataFrame
    checks: pd.DataFrame
    n_groups: int
    share_removed: float


def every_third(sites: Sequence[Site]) -> tuple[Site, ...]:
    """The default cuts: every third residual site, counted back from the last."""
    residual = [site for site in sorted(sites) if site.kind == "resid_post"]
    if not residual:
        raise UserError("no SAE of the residual stream", fix="add resid_post to collect.sites")
    return tuple(residual[::-3][::-1]) if len(residual) > 6 else tuple(residual)


def trace_of(
    model: Any,
    saes: Mapping[Site, Sae],
    ids: Sequence[int],
    *,
    target: Target,
    cuts: Sequence[Site],
    flows: Mapping[str, int],
    options: TraceOptions = DEFAULT,
) -> Trace:
    """Trace one prompt of token ids (the start token first)."""
    found = traced(model, saes, ids, cuts, target)
    nodes = grouped(strongest(found.nodes, options.share), flows)
    if nodes.empty:
        raise UserError("no feature moves this number", expected="a target after an active feature")
    members = [each for _, each in nodes.groupby("group")][: options.n_removed]
    generator = np.random.default_rng(options.seed)
    controls = [random_like(each, found.nodes, generator) for each in members]
    readings = [_reading(found, each) for each in members]
    none = found.nodes.iloc[:0]
    gone = removed(found, [none, *members, *controls], readings=readings)
    supernodes = _supernodes(found, members, gone)
    return Trace(
        traced=found,
        options=options,
        nodes=nodes,
        supernodes=supernodes,
        edges=_edges(found, members, supernodes, readings, gone, options),
        checks=checks_of(found, supernodes, gone, seed=options.seed),
        n_groups=int(nodes["group"].max()) + 1,
        share_removed=_share(nodes, options.n_removed),
    )


Reading = tuple[Site, int, list[int], Float[Tensor, "member"]]


def _reading(found: Traced, members: pd.DataFrame) -> Reading:
    """A supernode's strength: its part of y at its peak cut, as a sum of pre-activations."""
    site = parse_site(peak_cut(members))
    here = members[members["cut"] == site.short]
    latents, token = here["latent"].tolist(), int(here["token"].iloc[0])
    return site, token, latents, found.saes[site].W_dec[latents] @ found.gradient[site][0, token]


def _supernodes(found: Traced, members: Sequence[pd.DataFrame], gone: Removal) -> pd.DataFrame:
    """One row a supernode: where it is, predicted and real change of y, what the model says
    without it."""
    n, before = len(members), gone.logits[0].log_softmax(-1)
    predicted = prediction(pd.concat(members))
    rows = []
    for number, each in enumerate(members):
        after = gone.logits[1 + number].log_softmax(-1)
        real = float(gone.y[0] - gone.y[1 + number])
        guess = float(predicted[each["group"].iloc[0]])
        layers = [parse_site(cut).layer for cut in each["cut"]]
        value, token = after.exp().topk(min(_TOP, len(after)))
        rows.append(
            {
                "supernode": number,
                "flow": int(each["flow"].iloc[0]),
                "token": int(each["token"].iloc[0]),
                "first_layer": min(layers),
                "last_layer": max(layers),
                "peak": peak_cut(each),
                "features": " ".join(each["feature"]),
                "predicted": guess,
                "removed": real,
                "control": float(gone.y[0] - gone.y[1 + n + number]),
                "kl": float((before.exp() * (before - after)).sum()),
                "top_tokens": token.tolist(),
                "top_probabilities": value.tolist(),
                "differs": abs(guess - real) > 0.5 * max(abs(real), _SMALLEST),
                "breaks": _breaks(found.target, after),
            }
        )
    frame = pd.DataFrame(rows)
    return frame.loc[frame["removed"].abs().sort_values(ascending=False, kind="stable").index]


def _breaks(target: Target, log_probs: Float[Tensor, "vocab"]) -> bool:
    """Whether neither answer nor foil is likely any more: the removal broke the text."""
    if target.feature is not None:
        return False
    return float(log_probs[[target.answer, target.foil]].exp().sum()) < _BROKEN


def _edges(
    found: Traced,
    members: Sequence[pd.DataFrame],
    supernodes: pd.DataFrame,
    readings: Sequence[Reading],
    gone: Removal,
    options: TraceOptions,
) -> pd.DataFrame:
    """From A to B where A begins before B's peak, on the same or an earlier token. `removed`: the
    change of B's strength when A is removed; `predicted`: by the gradient of B's strength at the
    cut before (NaN where A has no member there). `drawn` leaves out what a middle node explains."""
    change = (gone.read[0] - gone.read[1 : 1 + len(members)]).numpy()
    gradients = _gradients(found, readings)
    rows = []
    for b, (site, token, *_) in enumerate(readings):
        for a, each in enumerate(members):
            first = min(parse_site(cut) for cut in each["cut"])
            if a != b and first < site and int(each["token"].iloc[0]) <= token:
                guess = _predicted(found, each, gradients[b])
                rows.append({"source": a, "target": b, "predicted": guess, "removed": change[a, b]})
    frame = pd.DataFrame(rows, columns=["source", "target", "predicted", "removed"])
    shown = set(supernodes["supernode"].head(options.n_shown))
    limit = options.edge_share * abs(found.y)
    strong = np.zeros((len(members), len(members)), dtype=bool)
    big = frame[(frame["removed"].abs() >= limit) & frame["source"].isin(shown)]
    big = big[big["target"].isin(shown)]
    strong[big["source"], big["target"]] = True
    through = (strong.astype(int) @ strong.astype(int)) > 0
    drawn = strong & ~through
    frame["drawn"] = drawn[frame["source"].to_numpy(int), frame["target"].to_numpy(int)]
    return frame.loc[frame["removed"].abs().sort_values(ascending=False, kind="stable").index]


def _gradients(
    found: Traced, readings: Sequence[Reading]
) -> list[tuple[Site, Float[Tensor, "token d_model"]] | None]:
    """Of every supernode's strength: its gradient at the cut before its peak."""
    stream: Stream = {}

    def keep(site: Site, h: Tensor) -> Tensor:
        stream[site] = h.detach().requires_grad_() if site == found.cuts[0] else h.view_as(h)
        return stream[site]

    gradients: list[tuple[Site, Tensor] | None] = []
    with torch.enable_grad():
        edits = {site: (lambda h, site=site: keep(site, h)) for site in found.cuts}
        run_model(found.model, [found.ids], edits)
        for site, token, latents, weights in readings:
            place = found.cuts.index(site)
            if place == 0:
                gradients.append(None)
                continue
            pre = pre_activations(found.saes[site], stream[site][0, token], latents)
            before = found.cuts[place - 1]
            (g,) = torch.autograd.grad(pre @ weights, stream[before], retain_graph=True)
            gradients.append((before, g[0]))
    return gradients


def _predicted(found: Traced, members: pd.DataFrame, gradient: tuple[Site, Tensor] | None) -> float:
    if gradient is None:
        return float("nan")
    site, g = gradient
    here = members[members["cut"] == site.short]
    if here.empty:
        return float("nan")
    direction = found.saes[site].W_dec[here["latent"].tolist()]
    z = torch.tensor(here["z"].tolist())
    return float((z * (direction * g[here["token"].tolist()]).sum(-1)).sum())


def _share(nodes: pd.DataFrame, n: int) -> float:
    """How much of the groups' weight the first `n` hold."""
    weight = prediction(nodes).abs()
    return float(weight[weight.index < n].sum() / max(weight.sum(), 1e-12))
