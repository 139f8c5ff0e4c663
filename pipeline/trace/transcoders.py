"""The graph of direct effects of one prompt through transcoders, and its scores.

1. Nodes: the strongest features, the transcoders' errors on every layer and token, the tokens'
   embeddings, and y. A feature is its vector z_i d_i in the MLP's output.
2. A[t, s] is the direct effect of s on t: the source's vector times the gradient of the target's
   pre-activation (or of y): attention patterns, norm scales and MLPs are held, skip maps pass.
3. Influence on y is summed over all paths, each step |A[t, s]| / Σ_s |A[t, s]|.
4. Replacement score: the part of the influence of tokens in that of tokens and errors.
   Completeness score: the share of a node's inputs that are no errors, averaged by influence.

As in circuit-tracer 0.5 (Ameisen et al. 2025), which also leaves out what the start token's MLPs
write. Cost: one backward pass a feature.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.sites import parse_site
from pipeline.trace.edges import gradients_of
from pipeline.trace.stream import EMBEDDING, FEATURE, Reading, Traced, input_of, sinks

_MOST = 128


@dataclass(frozen=True, kw_only=True, eq=False)
class Direct:
    """`effects[target, source]`: targets are the rows of `features` (of `Traced.nodes`) and y;
    sources are these features, `n_errors` errors (by layer, then token), and the tokens."""

    features: pd.DataFrame
    effects: Float[Tensor, "target source"]
    n_errors: int
    replacement: float
    completeness: float


def direct_effects(found: Traced, *, most: int = _MOST) -> Direct:
    """The graph of the `most` features of the largest score."""
    features = found.nodes[found.nodes["kind"] == FEATURE]
    features = features.loc[features["score"].abs().nlargest(most).index].sort_index()
    readings: list[Reading | None] = [
        (parse_site(row.cut), int(row.token), [int(row.latent)], torch.ones(1))
        for row in features.itertuples()
    ]
    by_cut = dict(list(features.groupby("cut", sort=False)))
    errors = _errors(found)
    rows = []
    for gradients in gradients_of(found, [*readings, None]):
        row_features = pd.Series(0.0, index=features.index)
        row_errors = torch.zeros(len(found.cuts), len(found.ids))
        for place, cut in enumerate(found.cuts):
            g = gradients.get(cut)
            if g is not None and (here := by_cut.get(cut.short)) is not None:
                z = torch.tensor(here["z"].to_numpy(), dtype=g.dtype)
                vectors = found.saes[cut].W_dec[here["latent"].tolist()] * z[:, None]
                row_features[here.index] = (vectors * g[here["token"].tolist()]).sum(-1).numpy()
            if g is not None:
                row_errors[place] = (errors[place] * g).sum(-1)
        embedding = (found.stream[EMBEDDING][0] * gradients[EMBEDDING]).sum(-1)
        values = torch.tensor(row_features.to_numpy(), dtype=torch.float32)
        rows.append(torch.cat([values, row_errors.flatten(), embedding]))
    effects, n_errors = torch.stack(rows), errors.shape[0] * errors.shape[1]
    replacement, completeness = scores_of(effects, n_errors)
    return Direct(
        features=features,
        effects=effects,
        n_errors=n_errors,
        replacement=replacement,
        completeness=completeness,
    )


def scores_of(effects: Float[Tensor, "target source"], n_errors: int) -> tuple[float, float]:
    """Replacement and completeness score of a graph whose last target is y."""
    n = len(effects) - 1
    shares = effects.abs() / effects.abs().sum(1, keepdim=True).clamp(min=1e-10)
    influence = step = shares[-1]
    while step[:n].any():
        step = step[:n] @ shares[:n]
        influence = influence + step
    of_errors, of_tokens = influence[n : n + n_errors].sum(), influence[n + n_errors :].sum()
    known = 1 - shares[:, n : n + n_errors].sum(1)
    weight = torch.cat([influence[:n], torch.ones(1)])
    # nodes without inputs (tokens, errors) count as wholly known
    inputs = (known * weight).sum() + of_errors + of_tokens
    return (
        float(of_tokens / (of_tokens + of_errors)),
        float(inputs / (weight.sum() + of_errors + of_tokens)),
    )


@torch.no_grad()
def _errors(found: Traced) -> Float[Tensor, "cut token d_model"]:
    """What the transcoders do not explain; 0 on sinks."""
    errors = []
    for cut in found.cuts:
        sae = found.saes[cut]
        x, out = found.stream[input_of(sae, cut)][0], found.stream[cut][0]
        error = out - sae(x)
        errors.append(error.masked_fill(sinks(x)[:, None], 0))
    return torch.stack(errors)
