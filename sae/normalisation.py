"""The space a dictionary is trained in, and the way back to raw activations.

Training sees x' = (x − mean) / scale, with `mean` the site's mean activation and `scale` such that
the mean square of x' is 1 per channel: learning rates and penalties then mean the same at every
site, and centring prevents latents that are dead from the start (arXiv 2605.31518). Folding gives
the same function of raw activations, with unit decoder rows: a latent z = scale · z' adds z times
its row. For an encoder that subtracts b' (a tied b_dec), decoder rows of length n:

    W = n · W'            b_enc = scale · n · b'_enc          b_in = mean + scale · b'
    W_dec = W'_dec / n    b_dec = mean_out + scale · b'_dec   θ = scale · n · θ', gate offset
    likewise

(With another output site: W gets scale_out / scale_in, and W_skip is folded into b_dec and itself.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from featureflow.errors import Command, UserError
from sae.activations import Activation, Gated, Threshold
from sae.dictionary import Sae


@dataclass(frozen=True, kw_only=True, eq=False)
class Normalisation:
    """Mean activation of a site and its scale: root mean square deviation per channel."""

    mean: Float[Tensor, "d"]
    scale: float

    def __post_init__(self) -> None:
        if not (self.scale > 0 and bool(torch.isfinite(self.mean).all())):
            raise UserError(
                "these activations cannot be normalised",
                expected="a finite mean and a variance above 0",
                found=f"scale {self.scale:g}",
                fix=Command("store", "info", note="the site is constant or holds NaN"),
            )

    def apply(self, x: Float[Tensor, "*token d"]) -> Float[Tensor, "*token d"]:
        return (x - self.mean) * (1.0 / self.scale)

    def to(self, device: str | torch.device) -> Normalisation:
        return Normalisation(mean=self.mean.to(device), scale=self.scale)


def normalisation_of(mean: Float[Tensor, "d"], variance: Float[Tensor, "d"]) -> Normalisation:
    """From per-channel statistics of the training activations."""
    return Normalisation(mean=mean.float(), scale=float(variance.double().mean().sqrt()))


def normalisation_of_rows(x: Float[Tensor, "token d"]) -> Normalisation:
    """From the activations themselves."""
    return normalisation_of(x.double().mean(0), x.double().var(0, correction=0))


def fold(
    weights: dict[str, Tensor],
    activation: Activation,
    source: Normalisation,
    target: Normalisation | None,
    metadata: dict[str, Any],
) -> Sae:
    """Trained weights as a dictionary over raw activations. `target` is the output site's, for a
    transcoder."""
    out = target or source
    length = weights["W_dec"].norm(dim=1)
    skip = None if "W_skip" not in weights else weights["W_skip"] * (out.scale / source.scale)
    b_dec = out.mean + out.scale * weights["b_dec"]
    gain = length * out.scale
    return Sae(
        W_enc=weights["W_enc"] * (length * (out.scale / source.scale))[:, None],
        b_enc=weights["b_enc"] * gain,
        W_dec=weights["W_dec"] / length[:, None],
        b_dec=b_dec if skip is None else b_dec - skip @ source.mean,
        b_in=b_dec.clone() if target is None else source.mean.clone(),
        activation=activation.scaled(gain),
        W_skip=skip,
        metadata=metadata,
    )


def unfold(
    sae: Sae, source: Normalisation, target: Normalisation | None = None
) -> dict[str, Tensor]:
    """The weights that `fold` would turn into `sae`: what a neighbouring site's training starts
    from."""
    out = target or source
    weights = {
        "W_enc": sae.W_enc * (source.scale / out.scale),
        "b_enc": sae.b_enc / out.scale,
        "W_dec": sae.W_dec.clone(),
        "b_dec": (sae.b_dec - out.mean) / out.scale,
    }
    if sae.W_skip is not None:
        weights["W_skip"] = sae.W_skip * (source.scale / out.scale)
        weights["b_dec"] = (sae.b_dec + sae.W_skip @ source.mean - out.mean) / out.scale
    if isinstance(sae.activation, Threshold):
        weights["theta"] = sae.activation.theta / out.scale
    if isinstance(sae.activation, Gated):
        weights["log_gain"] = sae.activation.gain.log()
        weights["magnitude_bias"] = sae.activation.offset / out.scale
    return weights
