"""Dictionaries as sparsify saves them, with what sparsify computes. Runs in sparsify's environment.

    SPARSIFY_DISABLE_TRITON=1 python check_sparsify.py FOLDER

Writes `<FOLDER>/<case>/cfg.json`, `sae.safetensors` and `case.npz` (x, latents, reconstruction).
"""

from __future__ import annotations

import argparse
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
