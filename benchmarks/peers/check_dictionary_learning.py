"""Dictionaries as dictionary_learning saves them, with what it computes. Runs in its environment.

    python check_dictionary_learning.py FOLDER

Writes `<FOLDER>/<class>/ae.pt`, `config.json` and `case.npz` (x, latents, reconstruction).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK

D, N, K, TOKENS = 24, 96, 5, 200


def dictionaries() -> list[torch.nn.Module]:
    return [
        AutoEncoder(D, N),
        AutoEncoderNew(D, N),
        GatedAutoEncoder(D, N),
        JumpReluAutoEncoder(D, N),
        AutoEncoderTopK(D, N, K),
        BatchTopKSAE(D, N, K),
        MatryoshkaBatchTopKSAE(D, N, K, group_sizes=[32, 64]),
    ]


def main(root: Path) -> None:
    torch.manual_seed(0)
    for dictionary in dictionaries():
        name = type(dictionary).__name__
        with torch.no_grad():
            for parameter in dictionary.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4)
            if hasattr(dictionary, "threshold"):
                dictionary.threshold.abs_()
            x = torch.randn(TOKENS, D)
            latents = dictionary.encode(x)
            reconstruction = dictionary.decode(latents)
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(dictionary.state_dict(), folder / "ae.pt")
        trainer = {
            "dict_class": name,
            "layer": 3,
            "submodule_name": "resid_post_layer_3",
            "activation_dim": D,
        }
        (folder / "config.json").write_text(
            json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}})
        )
        arrays = {"x": x, "latents": latents, "reconstruction": reconstruction}
        np.savez(folder / "case.npz", **{key: value.numpy() for key, value in arrays.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
