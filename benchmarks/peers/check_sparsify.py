"""Dictionaries as sparsify saves them, with what sparsify computes. Runs in sparsify's environment.

    SPARSIFY_DISABLE_TRITON=1 python check_sparsify.py FOLDER
    SPARSIFY_DISABLE_TRITON=1 python check_sparsify.py FOLDER --read

Writes `<FOLDER>/<case>/cfg.json`, `sae.safetensors` and `case.npz` (x, latents, reconstruction).
With `--read` it opens every dictionary under FOLDER and reports, as one JSON line each, how far its
reconstruction is from that in case.npz.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

import numpy as np
import torch
from sparsify import SparseCoderConfig
from sparsify.sparse_coder import SparseCoder

D, N, K, TOKENS = 24, 96, 5, 200
CASES = {
    "sae": {},
    "sae_free_decoder": {"normalize_decoder": False},
    "transcoder": {"transcode": True},
    "skip_transcoder": {"transcode": True, "skip_connection": True},
}


def main(root: Path) -> None:
    torch.manual_seed(0)
    for name, options in CASES.items():
        coder = SparseCoder(D, SparseCoderConfig(num_latents=N, k=K, **options))
        with torch.no_grad():
            for parameter in coder.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4)
            if coder.cfg.normalize_decoder:
                coder.set_decoder_norm_to_unit_norm()
            coder.save_to_disk(root / name)
            x = torch.randn(TOKENS, D)
            values, indices, _ = coder.encode(x)
            latents = torch.zeros(TOKENS, N).scatter_(1, indices, values)
            reconstruction = coder(x).sae_out
        arrays = {"x": x, "latents": latents, "reconstruction": reconstruction}
        np.savez(root / name / "case.npz", **{key: value.numpy() for key, value in arrays.items()})


def read(root: Path) -> None:
    for folder in sorted(path.parent for path in root.glob("*/case.npz")):
        coder = SparseCoder.load_from_disk(folder, device="cpu")
        case = {
            name: torch.from_numpy(value) for name, value in np.load(folder / "case.npz").items()
        }
        with torch.no_grad():
            values, indices, _ = coder.encode(case["x"])
            found = coder(case["x"]).sae_out
        latents = torch.zeros_like(case["latents"]).scatter_(1, indices, values)
        record = {"case": folder.name, "active": int((latents != 0).sum())}
        record["same_active"] = bool(((latents != 0) == (case["latents"] != 0)).all())
        difference = (found - case["reconstruction"]).abs().max() / found.abs().max()
        print(json.dumps({**record, "reconstruction_difference": difference.item()}), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--read", action="store_true")
    arguments = parser.parse_args()
    read(arguments.folder) if arguments.read else main(arguments.folder)
