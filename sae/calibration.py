"""The threshold that gives a requested L0: set after training, on activations that were not trained
on; or in place of a TopK, for tools that apply thresholds only (`with_threshold`).

    BatchTopK and its kin    one threshold θ for all latents: the (target × tokens)-th largest
    pre-activation
    JumpReLU, Gated, ReLU    every latent keeps its own edge; all are moved by one shift, chosen
    from pre − edge alike

Both are exact on the held-out rows they use, up to ties. One encoder pass, in float32.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import UserError
from sae.activations import Threshold, TopKActivation
from sae.architectures.base import Architecture
from sae.dictionary import Sae
from sae.kernels.select import WholeBatch, encode
from sae.step import Weights

_MOST_ENTRIES = 2**25


@torch.no_grad()
def calibrated_threshold(
    architecture: Architecture, weights: Weights, x: Float[Tensor, "token d_in"], *, tied: bool
) -> tuple[Weights, float]:
    """Weights and threshold that give `architecture.target_l0` on the normalised rows `x`;
    threshold 0 where the rows have fewer positive pre-activations than asked for."""
    centred = x - weights["b_dec"] if tied else x
    if (edges := architecture.edges(weights)) is not None:
        rows = centred[:: 1 + len(centred) * len(edges) // _MOST_ENTRIES]
        return architecture.raised(
            weights, _shift(architecture.target_l0, weights, edges, rows)
        ), 0.0
    selection = WholeBatch(k=architecture.target_l0)
    codes = encode(centred, weights["W_enc"], weights["b_enc"], selection, "float32")
    if len(codes.value) < selection.count(len(x)):
        return weights, 0.0
    return weights, _just_below(float(codes.value.min()))


@torch.no_grad()
def with_threshold(sae: Sae, x: Float[Tensor, "token d_in"]) -> Sae:
    """A TopK dictionary as one of thresholds: a latent is active above the value that leaves k
    active ones a token, on average over the rows `x`. Single tokens have more or fewer."""
    if not isinstance(sae.activation, TopKActivation):
        raise UserError("no TopK", found=sae.activation.kind, expected="topk")
    n = sae.activation.k * len(x)
    best = torch.zeros(0)
    for rows in x.split(max(1, _MOST_ENTRIES // sae.n_latents)):
        pre = sae.pre_activations(rows).flatten().cpu()
        best = torch.cat([best, pre]).topk(min(n, len(best) + len(pre)), sorted=False).values
    theta = max(0.0, _just_below(float(best.min())))
    note = f"TopK, k = {sae.activation.k}, turned into thresholds on {len(x)} rows"
    notes = [*sae.metadata.get("notes", ()), note]
    activation = Threshold(theta=torch.full((sae.n_latents,), theta))
    return sae.replace(activation=activation, metadata={**sae.metadata, "notes": notes})


def _shift(
    target_l0: float, weights: Weights, edges: Tensor, centred: Float[Tensor, "token d_in"]
) -> float:
    excess = (F.linear(centred, weights["W_enc"], weights["b_enc"]) - edges).flatten().cpu().numpy()
    rank = min(excess.size, max(1, round(target_l0 * len(centred))))
    return _just_below(float(np.partition(excess, excess.size - rank)[excess.size - rank]))


def _just_below(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(-np.inf)))
