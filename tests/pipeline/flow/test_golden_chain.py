"""The paper's worked example: from Gemma Scope's published files the chain of 24/res/14548 comes
out, scores included.

FEATUREFLOW_GEMMA_SCOPE names a folder that holds `gemma-scope-2b-pt-res` and
`gemma-scope-2b-pt-mlp` as published; skipped without it. The same reading and linking runs on small
files of that exact form, where the chain is planted.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.flow.directions import Directions, directions_of
from pipeline.flow.match import match
from sae.formats import read

RESIDUAL, MLP = "gemma-scope-2b-pt-res", "gemma-scope-2b-pt-mlp"
L0 = (
    102,
    108,
    141,
    59,
    125,
    68,
    70,
    69,
    71,
    73,
    77,
    80,
    82,
    83,
    83,
    78,
    78,
    77,
    74,
    73,
    71,
    70,
    72,
    75,
    73,
    116,
)
"""Mean L0 of each layer's residual dictionary (SAE Match, arXiv 2410.07656, Table 1); folders have
about that name."""
CHAIN = (
    14403,
    13755,
    12939,
    16138,
    11935,
    14558,
    2452,
    16335,
    9666,
    8318,
    13754,
    7614,
    2812,
    4955,
    5262,
    9388,
    10649,
    8130,
    11987,
    15694,
    12523,
    14511,
    11460,
    9592,
    14548,
    1646,
)
"""Feature Flow (arXiv 2502.03032), Fig. 2 and Table 5: the residual feature of each layer."""
START = 24
MLPS = {7: (6110, 0.82), 17: (8454, 0.79)}
"""Layer: its best MLP feature and s(M)."""
SCORES = {7: 0.30, 17: 0.48}
"""Layer: s(R) to the residual feature before it."""


def file_of(root: Path, part: str, layer: int, width: str) -> Path:
    """The one dictionary of a layer; of several the one nearest to the paper's L0."""
    found = sorted(
        glob.glob(
            str(root / part / f"layer_{layer}" / f"width_{width}" / "average_l0_*" / "params.npz")
        )
    )
    assert found, f"no dictionary of {part} at layer {layer}"
    return Path(
        min(
            found,
            key=lambda path: abs(
                int(Path(path).parent.name.removeprefix("average_l0_")) - L0[layer]
            ),
        )
    )


def directions(root: Path, part: str, layer: int, width: str) -> Directions:
    return directions_of(read(file_of(root, part, layer, width)).W_dec, name=f"{part} {layer}")


def walk(
    root: Path, start: int, latent: int, n_layers: int, width: str = "16k"
) -> Mapping[int, int]:
    """The chain through a latent: best predecessors down to layer 0, best successors up to the last
    layer."""
    chain = {start: latent}
    here = above = directions(root, RESIDUAL, start, width)
    for layer in range(start - 1, -1, -1):
        below = directions(root, RESIDUAL, layer, width)
        chain[layer] = int(match(below, here, k=1).predecessors.index[chain[layer + 1], 0])
        here = below
    for layer in range(start + 1, n_layers):
        after = directions(root, RESIDUAL, layer, width)
        chain[layer] = int(match(above, after, k=1).successors.index[chain[layer - 1], 0])
        above = after
    return chain


def score(
    root: Path, part: str, source_layer: int, target_layer: int, latent: int, width: str
) -> tuple[int, float]:
    """The best latent of a dictionary for one residual latent, and its cosine."""
    found = match(
        directions(root, part, source_layer, width),
        directions(root, RESIDUAL, target_layer, width),
        k=1,
    )
    return int(found.predecessors.index[latent, 0]), float(found.predecessors.cosine[latent, 0])


@pytest.mark.gemma_scope
def test_the_papers_chain_and_scores_come_out_of_the_published_files() -> None:
    name = os.environ.get("FEATUREFLOW_GEMMA_SCOPE")
    if name is None:
        pytest.skip("FEATUREFLOW_GEMMA_SCOPE names no folder of Gemma Scope files")
    root = Path(name)
    chain = walk(root, START, CHAIN[START], len(CHAIN))
    assert tuple(chain[layer] for layer in range(len(CHAIN))) == CHAIN
    for layer, expected in SCORES.items():
        latent, cosine = score(root, RESIDUAL, layer - 1, layer, CHAIN[layer], "16k")
        assert (latent, round(cosine, 2)) == (CHAIN[layer - 1], expected)
    for layer, (best, expected) in MLPS.items():
        latent, cosine = score(root, MLP, layer, layer, CHAIN[layer], "16k")
        assert (latent, round(cosine, 2)) == (best, expected)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """Four layers of 40 latents in 24 dimensions: each layer is the one below, permuted and
    disturbed."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 24))
    for layer in range(4):
        write(tmp_path, RESIDUAL, layer, L0[layer], rows)
        write(tmp_path, RESIDUAL, layer, 400, rng.normal(size=(40, 24)))
        write(tmp_path, MLP, layer, 9, np.roll(rows, 3, axis=0))
        rows = np.roll(rows, 5, axis=0) + 0.1 * rng.normal(size=rows.shape)
    return tmp_path


def write(root: Path, part: str, layer: int, l0: int, rows: np.ndarray) -> None:
    """`params.npz` as published: names, shapes, dtype, decoder rows of norm one, a positive
    threshold a latent."""
    folder = root / part / f"layer_{layer}" / "width_16k" / f"average_l0_{l0}"
    folder.mkdir(parents=True)
    decoder = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    n, d = decoder.shape
    np.savez(
        folder / "params.npz",
        W_enc=decoder.T.copy(),
        W_dec=decoder,
        b_enc=np.zeros(n, np.float32),
        b_dec=np.zeros(d, np.float32),
        threshold=np.full(n, 0.7, np.float32),
    )


def test_files_of_that_form_give_the_planted_chain(published: Path) -> None:
    chain = walk(published, 2, 7, 4)
    assert chain == {0: 7 - 10 + 40, 1: 2, 2: 7, 3: 12}
    assert score(published, RESIDUAL, 1, 2, 7, "16k")[0] == 2
    latent, cosine = score(published, MLP, 2, 2, 7, "16k")
    assert (latent, cosine) == (10, pytest.approx(1.0, abs=1e-5))
    assert (
        read(file_of(published, RESIDUAL, 3, "16k")).metadata["site"] == "blocks.3.hook_resid_post"
    )
    rows = read(file_of(published, RESIDUAL, 1, "16k")).W_dec
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(40), rtol=1e-5, atol=1e-5)
