"""OpenAI's sparse_autoencoder checkpoints (v5 and earlier): one `.pt` file.

Tensors: `pre_bias [d]`, `latent_bias [latent]`, `encoder.weight [latent, d]`, `decoder.weight [d,
latent]`; beside them `activation` ("TopK" or "ReLU") and `activation_state_dict` ({"k": …,
"postact_fn": "ReLU"}).

    x̃ = layer_norm(x) for TopK, x for ReLU;  z = activation(encoder(x̃ − pre_bias) + latent_bias);
    x̂ = undo(decoder(z) + pre_bias)

Layer norm as in their code: mean over dimensions, standard deviation with n − 1, epsilon 1e-5 added
to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featureflow.errors import UserError
from sae.activations import Activation, Relu, TopKActivation
from sae.formats.base import Format, described, has
from sae.formats.folding import Foreign
from sae.formats.normalised import LayerNorm
from sae.formats.tensors import checked, read_pt


def read_openai(file: Path, variant: str | None = None) -> Foreign:
    state = read_pt(file)
    activation = _activation(state, file)
    found = checked(
        state,
        {
            "encoder.weight": ("latent", "d_in"),
            "decoder.weight": ("d_in", "latent"),
            "pre_bias": ("d_in",),
            "latent_bias": ("latent",),
        },
        where=file,
    )
    return Foreign(
        W_enc=found["encoder.weight"],
        b_enc=found["latent_bias"],
        W_dec=found["decoder.weight"].T.contiguous(),
        b_dec=found["pre_bias"],
        b_in=found["pre_bias"],
        activation=activation,
        normalisation=LayerNorm() if isinstance(activation, TopKActivation) else None,
        metadata=described("openai", file),
    )


def _activation(state: Mapping[str, Any], where: Path) -> Activation:
    name, details = state.get("activation", "ReLU"), state.get("activation_state_dict", {})
    if name == "ReLU":
        return Relu()
    details = details if isinstance(details, Mapping) else {}
    k, after = details.get("k"), details.get("postact_fn", "ReLU")
    if name != "TopK" or not isinstance(k, int) or k < 1 or after != "ReLU":
        raise UserError(
            "unknown activation",
            where=f"{where}: activation",
            expected="ReLU, or TopK with a positive k and postact_fn ReLU",
            found=f"{name}, k={k}, postact_fn={after}",
        )
    return TopKActivation(k=k)


FORMATS = {
    "openai": Format(read=read_openai, lone=("*.pt", "*.pth"), fits=has("pre_bias", "latent_bias"))
}
