"""`featureflow trace "PROMPT"`: why the model says what it says here, in its own features.

1. Run the prompt in float32 and score every active feature at every third layer by one gradient
   (pipeline/trace/stream.py). The gradient only finds candidates.
2. Group the strongest into supernodes: one flow on one token (pipeline/trace/supernodes.py).
3. Really remove each of the heaviest, all in one batch. Sizes shown are the real ones; the
   prediction stands beside them.
4. Edges between supernodes: how much of B's strength (its part of y) goes when A is removed, beside
   what the gradient from the cut before B predicts (pipeline/trace/edges.py).
5. Remove equally many random active features, and set those shown to half and to twice their value.
6. Say which attention heads write the supernodes shown (pipeline/trace/heads.py), and print the
   checks (pipeline/trace/checks.py) with every trace.

A trace does not claim to be the whole computation: what is kept at all cuts together does not bring
the answer back. It says what is necessary, how much, and what a supernode writes to later ones.
Cost: 2 forward passes, 1 backward pass, 2 rows of a forward pass a supernode, 2 more for those
shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import UserError
from featureflow.progress import Progress, silent
from featureflow.sites import Site, parse_site
from pipeline.trace.checks import checks_of
from pipeline.trace.edges import edges_between
from pipeline.trace.heads import heads_of
from pipeline.trace.stream import Edited, Reading, Target, Traced, edited, traced
from pipeline.trace.supernodes import grouped, peak_cut, prediction, random_like, strongest
from sae import Sae

_TOP, _BROKEN, _SMALLEST = 5, 0.2, 0.2
DOSES = (0.5, 2.0)
"""Factors that the supernodes shown are set to, beside 0 and 1."""


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """`share` of Σ|score| kept per cut, how many supernodes are removed and how many are shown, and
    from what share of |y| on an edge is shown. `through` names the dictionaries: the SAEs of the
    stream, or the transcoders of every layer's MLP."""

    through: Literal["saes", "transcoders"] = "saes"
    share: float = 0.8
    n_removed: int = 24
    n_shown: int = 12
    edge_share: float = 0.15
    seed: int = 0


DEFAULT = TraceOptions()


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """What was found. `supernodes` and `edges` are ordered by their real effect; `checks` has what
    was demanded and measured, `heads` what writes the supernodes shown. `nodes` has the features
    kept, with the number of their supernode in `group`."""

    traced: Traced
    options: TraceOptions
    nodes: pd.DataFrame
    supernodes: pd.DataFrame
    edges: pd.DataFrame
    heads: pd.DataFrame
    checks: pd.DataFrame
    n_groups: int
    share_removed: float

    def members(self, supernode: int) -> pd.DataFrame:
        """The nodes of a supernode."""
        return self.nodes[self.nodes["group"] == supernode]


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
    progress: Progress = silent,
) -> Trace:
    """Trace one prompt of token ids (the start token first)."""
    *_, last = iter_trace(
        model, saes, ids, target=target, cuts=cuts, flows=flows, options=options, progress=progress
    )
    return last


def iter_trace(
    model: Any,
    saes: Mapping[Site, Sae],
    ids: Sequence[int],
    *,
    target: Target,
    cuts: Sequence[Site],
    flows: Mapping[str, int],
    options: TraceOptions = DEFAULT,
    progress: Progress = silent,
) -> Iterator[Trace]:
    """The trace as it grows: with predictions alone, with removals and edges, whole. What is not
    measured yet is NaN or empty."""
    found = traced(model, saes, ids, cuts, target)
    nodes = grouped(strongest(found.nodes, options.share), flows)
    if nodes.empty:
        raise UserError("no feature moves this number", expected="a target after an active feature")
    members = [each for _, each in nodes.groupby("group")][: options.n_removed]
    nothing = pd.DataFrame()
    trace = Trace(
        traced=found,
        options=options,
        nodes=nodes,
        supernodes=_supernodes(found, members),
        edges=nothing,
        heads=nothing,
        checks=nothing,
        n_groups=int(nodes["group"].max()) + 1,
        share_removed=_share(nodes, options.n_removed),
    )
    yield trace
    none, readings = found.nodes.iloc[:0], [_reading(found, each) for each in members]
    gone = edited(found, [none, *members], readings=readings, progress=progress)
    supernodes = _removed(found, trace.supernodes, gone)
    shown = supernodes["supernode"].head(options.n_shown).tolist()
    limit = options.edge_share * abs(found.y)
    edges = edges_between(found, members, readings, gone, shown=shown, limit=limit)
    trace = replace(trace, supernodes=supernodes, edges=edges)
    yield trace
    generator = np.random.default_rng(options.seed)
    controls = [random_like(each, found.nodes, generator) for each in members]
    doses = [members[n].assign(to=a * members[n]["z"]) for n in shown for a in DOSES]
    more = edited(found, [*controls, *doses], progress=progress)
    supernodes = _with_controls(supernodes, shown, gone, more)
    yield replace(
        trace,
        supernodes=supernodes,
        heads=heads_of(found, [readings[n] for n in shown], shown),
        checks=checks_of(found, supernodes, gone, seed=options.seed, progress=progress),
    )


def _reading(found: Traced, members: pd.DataFrame) -> Reading:
    """A supernode's strength: its part of y at its peak cut, as a sum of pre-activations."""
    site = parse_site(peak_cut(members))
    here = members[members["cut"] == site.short]
    latents, token = here["latent"].tolist(), int(here["token"].iloc[0])
    return site, token, latents, found.saes[site].W_dec[latents] @ found.gradient[site][0, token]


def _supernodes(found: Traced, members: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """One row a supernode, heaviest first: where it is, and the change of y that is predicted."""
    predicted = prediction(pd.concat(members))
    rows = []
    for number, each in enumerate(members):
        layers = [parse_site(cut).layer for cut in each["cut"]]
        rows.append(
            {
                "supernode": number,
                "flow": int(each["flow"].iloc[0]),
                "token": int(each["token"].iloc[0]),
                "first_layer": min(layers),
                "last_layer": max(layers),
                "peak": peak_cut(each),
                "features": " ".join(each["feature"]),
                "predicted": float(predicted[each["group"].iloc[0]]),
                "removed": float("nan"),
            }
        )
    return pd.DataFrame(rows)


def _removed(found: Traced, supernodes: pd.DataFrame, gone: Edited) -> pd.DataFrame:
    """With the real change of y and what the model says without each, largest change first."""
    before, rows = gone.logits[0].log_softmax(-1), []
    for number, predicted in enumerate(supernodes["predicted"]):
        after = gone.logits[1 + number].log_softmax(-1)
        real = float(gone.y[0] - gone.y[1 + number])
        value, token = after.exp().topk(min(_TOP, len(after)))
        rows.append(
            {
                "removed": real,
                "kl": float((before.exp() * (before - after)).sum()),
                "top_tokens": token.tolist(),
                "top_probabilities": value.tolist(),
                "differs": abs(predicted - real) > 0.5 * max(abs(real), _SMALLEST),
                "breaks": _breaks(found.target, after),
            }
        )
    frame = supernodes.drop(columns="removed").join(pd.DataFrame(rows))
    return frame.loc[frame["removed"].abs().sort_values(ascending=False, kind="stable").index]


def _with_controls(
    supernodes: pd.DataFrame, shown: Sequence[int], gone: Edited, more: Edited
) -> pd.DataFrame:
    """With the effect of equally many random features, and y at every dose for those shown."""
    n, whole = len(supernodes), float(gone.y[0])
    control = {number: whole - float(more.y[number]) for number in range(n)}
    at_doses = iter(more.y[n:].tolist())
    curves = {
        number: sorted(
            [
                (0.0, float(gone.y[1 + number])),
                (1.0, whole),
                *((dose, next(at_doses)) for dose in DOSES),
            ]
        )
        for number in shown
    }
    return supernodes.assign(
        control=supernodes["supernode"].map(control),
        doses=[curves.get(number, []) for number in supernodes["supernode"]],
    )


def _breaks(target: Target, log_probs: Float[Tensor, "vocab"]) -> bool:
    """Whether neither answer nor foil is likely any more: the removal broke the text."""
    if target.feature is not None:
        return False
    return float(log_probs[[target.answer, target.foil]].exp().sum()) < _BROKEN


def _share(nodes: pd.DataFrame, n: int) -> float:
    """How much of the groups' weight the first `n` hold."""
    weight = prediction(nodes).abs()
    return float(weight[weight.index < n].sum() / max(weight.sum(), 1e-12))
