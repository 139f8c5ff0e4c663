"""A TopK dictionary that decides by a threshold: only the steered columns are computed.

TopK keeps the k largest pre-activations of a token, so it must compute all of them to know whether
one latent is on. `with_threshold_gate` replaces that rule by one threshold, the mean k-th largest
pre-activation on sample text; `agreement` says how often both rules switch a latent alike, so that
the shortcut can be judged before it is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import UserError
from sae import Sae, Threshold, TopKActivation


@dataclass(frozen=True, kw_only=True)
class GateAgreement:
    """Of the (token, latent) pairs that TopK switches on: the share that the threshold also does;
    and the converse."""

    recall: float
    precision: float


def with_threshold_gate(sae: Sae, x: Float[Tensor, "token d_in"]) -> Sae:
    """The same dictionary with a threshold in place of TopK, set on activations `x` of ordinary
    tokens."""
    if not isinstance(sae.activation, TopKActivation):
        raise UserError(
            "only a TopK dictionary needs another gate", found=type(sae.activation).__name__
        )
    if not len(x):
        raise UserError("a threshold needs activations", expected="at least one token")
    smallest_kept = sae.pre_activations(x).topk(sae.activation.k, dim=-1).values[:, -1]
    theta = float(smallest_kept.mean().clamp(min=0))
    return sae.replace(
        activation=Threshold(
            theta=torch.full((sae.n_latents,), theta, device=sae.device, dtype=sae.dtype)
        )
    )


def agreement(exact: Sae, gated: Sae, x: Float[Tensor, "token d_in"]) -> GateAgreement:
    """How alike the two gates switch on held-out activations."""
    on, also = exact.encode(x) > 0, gated.encode(x) > 0
    both = (on & also).sum()
    return GateAgreement(
        recall=float(both / on.sum().clamp(min=1)), precision=float(both / also.sum().clamp(min=1))
    )
