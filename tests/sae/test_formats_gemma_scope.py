"""Published Gemma Scope files, where someone has them: FEATUREFLOW_GEMMA_SCOPE names a folder with
them."""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

import pytest
import torch

from sae import Threshold
from sae.formats import find, read

pytestmark = pytest.mark.gemma_scope


def test_published_dictionaries_have_unit_rows_thresholds_and_a_site():
    root = os.environ.get("FEATUREFLOW_GEMMA_SCOPE")
    if root is None:
        pytest.skip("FEATUREFLOW_GEMMA_SCOPE names no folder of Gemma Scope files")
    found = list(islice(find(Path(root)), 4))
    assert found, f"no params.npz or params.safetensors under {root}"
    for path, name in found:
        sae = read(path)
        assert name in ("gemma_scope", "gemma_scope_2")
        assert isinstance(sae.activation, Threshold)
        torch.testing.assert_close(
            sae.W_dec.norm(dim=1), torch.ones(sae.n_latents), rtol=1e-3, atol=1e-3
        )
        x = torch.randn(4, sae.d_in)
        pre, z = sae.pre_activations(x), sae.encode(x)
        assert ((z != 0) == (pre > sae.activation.theta)).all()
        assert torch.isfinite(sae(x)).all()
