"""Files both ways with SAELens itself. Runs in SAELens' environment, imports nothing of
featureflow.

python check_saelens.py write FOLDER    SAELens makes one dictionary of each architecture and saves
it, with inputs,
                                        latents and reconstructions as SAELens computes them
                                        (case.npz)
python check_saelens.py read FOLDER     SAELens opens every dictionary under FOLDER and reports, as
one JSON line
                                        each, how far its latents and reconstructions are from those
                                        in case.npz
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE, __version__
from sae_lens.registry import get_sae_class, get_sae_training_class

D_IN, D_SAE, D_OUT, K, TOKENS = 24, 96, 20, 5, 200
ARCHITECTURES = {
    "standard": {},
    "standard_no_input_bias": {"architecture": "standard", "apply_b_dec_to_input": False},
    "standard_layer_norm": {"architecture": "standard", "normalize_activations": "layer_norm"},
    "standard_constant_norm": {
        "architecture": "standard",
        "normalize_activations": "constant_norm_rescale",
    },
    "topk": {"k": K},
    "topk_by_norm": {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {},
    "gated": {},
    "transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
    "skip_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
    "jumprelu_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
    "jumprelu_skip_transcoder": {"d_out": D_OUT, "apply_b_dec_to_input": False},
}


def write(root: Path) -> None:
    torch.manual_seed(0)
    for name, options in ARCHITECTURES.items():
        settings = {"architecture": name, "d_in": D_IN, "d_sae": D_SAE} | options
        sae_class, config_class = get_sae_class(settings["architecture"])
        sae = sae_class(
            config_class.from_dict(settings | {"metadata": {"sae_lens_version": __version__}})
        )
        with torch.no_grad():
            for parameter_name, parameter in sae.named_parameters():
                scale = 0.5 if parameter.ndim == 1 else 0.3
                parameter.copy_(torch.randn_like(parameter) * scale)
                if parameter_name == "threshold":
                    parameter.abs_()
        sae.save_model(root / name)
        x = torch.randn(TOKENS, D_IN) + torch.randn(D_IN)
        save_case(sae, x, root / name)
    for name in ("batchtopk", "matryoshka_batchtopk"):
        write_checkpoint(name, root / f"{name}_checkpoint")


def write_checkpoint(architecture: str, folder: Path) -> None:
    """A training checkpoint, and what SAELens' own export of it for inference computes."""
    settings = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "k": float(K)}
    if architecture == "matryoshka_batchtopk":
        settings["matryoshka_widths"] = [16, 48, D_SAE]
    sae_class, config_class = get_sae_training_class(architecture)
    sae = sae_class(config_class.from_dict(settings))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        sae.topk_threshold.fill_(1.5)
    sae.save_model(folder)
    with tempfile.TemporaryDirectory() as exported:
        sae.save_inference_model(exported)
        save_case(SAE.load_from_disk(exported), torch.randn(TOKENS, D_IN), folder)


def save_case(sae: SAE, x: torch.Tensor, folder: Path) -> None:
    with torch.no_grad():
        latents, reconstruction = sae.encode(x), sae(x)
    np.savez(
        folder / "case.npz",
        x=x.numpy(),
        latents=latents.numpy(),
        reconstruction=reconstruction.numpy(),
    )


def read(root: Path) -> None:
    for folder in sorted(path.parent for path in root.glob("*/case.npz")):
        sae = SAE.load_from_disk(folder)
        case = {
            name: torch.from_numpy(value) for name, value in np.load(folder / "case.npz").items()
        }
        with torch.no_grad():
            latents, reconstruction = sae.encode(case["x"]), sae(case["x"])
        record = {
            "case": folder.name,
            "architecture": sae.cfg.architecture(),
            "sae_lens": __version__,
            "active": int((latents != 0).sum()),
            "same_active": bool(((latents != 0) == (case["latents"] != 0)).all()),
            "latents_difference": relative_difference(latents, case["latents"]),
            "reconstruction_difference": relative_difference(
                reconstruction, case["reconstruction"]
            ),
        }
        print(json.dumps(record), flush=True)


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("direction", choices=("write", "read"))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    (write if arguments.direction == "write" else read)(arguments.folder)
