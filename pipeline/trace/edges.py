"""What writes into what: real and predicted edges of one traced prompt.

`edges_between`: supernode A → supernode B where A begins before B's peak on the same or an earlier
token. `removed` is the change of B's strength when A is removed (it comes with the removals);
`predicted` is that by the gradient of B's strength at the cut before (NaN where A has no member
there); through transcoders it is the direct effect alone, past all MLPs between. `drawn` are the
strong ones that no third supernode explains.

`node_edges`: feature → feature from one cut to the next, E(i→j) = z_i d_i · ∂pre_j/∂h, with nothing
frozen. Cost: one backward pass through the layers between the two cuts a target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.sites import Site, parse_site
from pipeline.trace.stream import (
    EMBEDDING,
    FEATURE,
    Edited,
    Reading,
    Traced,
    input_of,
    kept_stream,
    pre_activations,
    run_model,
)

Gradients = dict[Site, Float[Tensor, "token d_model"]]
Written = dict[Site, tuple[list[int], Float[Tensor, "feature d_model"]]]


def edges_between(
    found: Traced,
    members: Sequence[pd.DataFrame],
    readings: Sequence[Reading],
    gone: Edited,
    *,
    shown: Sequence[int],
    limit: float,
) -> pd.DataFrame:
    """Strongest first: `source, target, predicted, removed, drawn`. Row 0 of `gone` is the prompt
    as it is, row 1 + A without A. Drawn are edges of `shown` supernodes of at least `limit`."""
    change = (gone.read[0] - gone.read[1 : 1 + len(members)]).numpy()
    gradients = list(gradients_of(found, readings))
    written, at = [_written(found, each) for each in members], [reading[1] for reading in readings]
    rows = []
    for b, (site, *_) in enumerate(readings):
        for a, by_cut in enumerate(written):
            if a != b and min(by_cut) < site and at[a] <= at[b]:
                guess = _predicted(by_cut, gradients[b])
                rows.append({"source": a, "target": b, "predicted": guess, "removed": change[a, b]})
    frame = pd.DataFrame(rows, columns=["source", "target", "predicted", "removed"])
    strong = np.zeros((len(members), len(members)), dtype=bool)
    big = frame[(frame["removed"].abs() >= limit) & frame["source"].isin(shown)]
    big = big[big["target"].isin(shown)]
    strong[big["source"], big["target"]] = True
    drawn = strong & ~((strong.astype(int) @ strong.astype(int)) > 0)
    frame["drawn"] = drawn[frame["source"].to_numpy(int), frame["target"].to_numpy(int)]
    return frame.loc[frame["removed"].abs().sort_values(ascending=False, kind="stable").index]


def node_edges(found: Traced, targets: pd.DataFrame) -> pd.DataFrame:
    """Every feature of the cut before → each target (rows of `found.nodes`): `source`, `target`
    (indices of `found.nodes`), `predicted` (the change of the target's pre-activation when the
    source is removed)."""
    readings: list[Reading] = [
        (parse_site(row.cut), int(row.token), [int(row.latent)], torch.ones(1))
        for row in targets.itertuples()
    ]
    parts = []
    for target, gradient in zip(targets.index, gradients_of(found, readings), strict=True):
        for site in found.cuts:
            if site in gradient:
                here = (found.nodes["cut"] == site.short) & (found.nodes["kind"] == FEATURE)
                nodes = found.nodes[here]
                for tokens, vectors in _written(found, nodes).values():
                    effect = (vectors * gradient[site][tokens]).sum(-1).cpu().numpy()
                    ends = {"source": nodes.index, "target": target, "predicted": effect}
                    parts.append(pd.DataFrame(ends))
    columns = ["source", "target", "predicted"]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=columns)


def gradients_of(found: Traced, readings: Sequence[Reading | None]) -> Iterator[Gradients]:
    """Of every reading (None: of y) its gradient at the cut before it; through transcoders at every
    cut before it and at the embedding, by paths past the MLPs between."""
    with kept_stream(found.model, found.saes, found.cuts, features=False) as (stream, edits):
        logits = run_model(found.model, [found.ids], edits)
        for reading in readings:
            if reading is None:
                value, before = found.target.value(logits, stream, found.saes)[0], found.cuts
            else:
                site, token, latents, weights = reading
                source = input_of(found.saes[site], site)
                pre = pre_activations(found.saes[site], stream[source][0, token], latents)
                value, before = pre @ weights.to(pre), tuple(c for c in found.cuts if c < source)
            at = [EMBEDDING, *before] if found.is_linear else before[-1:]
            given = [stream[cut] for cut in at]
            gradients = torch.autograd.grad(value, given, retain_graph=True) if at else ()
            yield {cut: g[0] for cut, g in zip(at, gradients, strict=True)}


def _written(found: Traced, nodes: pd.DataFrame) -> Written:
    """What features add to the stream, by cut: their tokens, and `z_i d_i`."""
    written: Written = {}
    for cut, here in nodes.groupby("cut", sort=False):
        site = parse_site(str(cut))
        z = torch.tensor(here["z"].tolist(), device=found.logits.device)[:, None]
        written[site] = here["token"].tolist(), z * found.saes[site].W_dec[here["latent"].tolist()]
    return written


def _predicted(written: Written, gradients: Gradients) -> float:
    parts = [
        float((vectors * gradients[cut][tokens]).sum())
        for cut, (tokens, vectors) in written.items()
        if cut in gradients
    ]
    return sum(parts) if parts else float("nan")
