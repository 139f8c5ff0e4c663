"""What tests of foreign formats share: a small dictionary's numbers, its activation written out,
and the comparison with what `read` makes of a file."""

from __future__ import annotations

import json

import torch
from safetensors.torch import save_file

from sae.formats import read
from sae.formats.normalised import NormalisedSae

D, N, K, TOKENS = 6, 11, 3, 64


def numbers(*shape, seed, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def topk(pre, k=K):
    value, index = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter_(-1, index, value.relu())


def agrees(path, z, reconstruction, x, *, format="auto"):
    """Read both ways: with the peer's latent sizes, and with unit decoder rows."""
    raw = read(path, format=format, unit_decoder=False)
    torch.testing.assert_close(raw.encode(x), z, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(raw(x), reconstruction, rtol=1e-4, atol=1e-4)
    unit = read(path, format=format)
    torch.testing.assert_close(unit(x), reconstruction, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(unit.encode(x) > 0, z > 0)
    if unit.metadata["unit_decoder"]:
        torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(N))
        scale = raw.W_dec.norm(dim=1)
        if isinstance(unit, NormalisedSae):  # latents of what is added to the raw activation
            scale = scale * unit.scale_of(x)
        torch.testing.assert_close(unit.encode(x), z * scale, rtol=1e-4, atol=1e-5)
    return unit


def write_folder(folder, tensors, config, *, weights, description):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / weights)
    (folder / description).write_text(json.dumps(config))
    return folder
