"""A random start whose reconstruction is not longer than what it reconstructs.

With many active latents for the width (k near d), a tied random dictionary adds up to far more than
its input and the first steps are spent shrinking. The encoder is scaled down by the least-squares
factor ⟨x, x̂⟩ / ‖x̂‖² on Gaussian rows of unit mean square, which is what normalised activations
look like to random directions. It never scales up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.kernels.codes import decode
from sae.kernels.select import PerRow, encode

_ROWS = 256


@torch.no_grad()
def length_matched(weights: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """The weights with a scaled encoder. A transcoder's start is left as it is."""
    W_enc, W_dec = weights["W_enc"], weights["W_dec"]
    if W_enc.shape != W_dec.shape:
        return weights
    x = torch.randn(_ROWS, W_enc.shape[1], generator=torch.Generator().manual_seed(0)).to(
        W_enc.device
    )
    out = decode(encode(x, W_enc, weights["b_enc"], PerRow(k=min(k, len(W_enc))), "float32"), W_dec)
    factor = float((x * out).sum() / out.square().sum())
    return weights | {"W_enc": W_enc * min(1.0, factor)}
