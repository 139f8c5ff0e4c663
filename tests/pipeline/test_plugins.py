"""What other packages add is one file and an entry point, used through the command line.

The package lies outside the repository, in a temporary folder on the path, as pip would leave it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from sae import load_sae

ARCHITECTURE = '''
"""ReLU with a soft threshold: z = max(W x + b - theta, 0)."""
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from typing_extensions import Doc

from sae.activations import Activation
from sae.architectures import ReluL1


@dataclass(frozen=True, kw_only=True, eq=False)
class Shrunk(Activation):
    theta: Tensor
    kind: Literal["shrunk"] = "shrunk"

    def __call__(self, pre):
        return (pre - self.theta).relu()

    def scaled(self, gain):
        return replace(self, theta=self.theta * gain)


class SoftThreshold(ReluL1):
    """Every pre-activation is made smaller by theta; what stays positive is a latent."""

    theta: Annotated[float, Ge(0), Doc("taken from each pre-activation")] = 0.25
    kind: Literal["soft_threshold"] = "soft_threshold"

    def gradients(self, weights, x, y, now):
        return super().gradients(weights | {"b_enc": weights["b_enc"] - self.theta}, x, y, now)

    def activation(self, weights, threshold):
        return Shrunk(theta=torch.full_like(weights["b_enc"], self.theta))

    def edges(self, weights):
        return torch.full_like(weights["b_enc"], self.theta)
'''

MATCHER = '''
"""Latent 0 comes from the last one, latent 1 from the one before, latent 2 from nobody."""
import numpy as np


def mirror(pair):
    chosen = pair.source.n_latents - 1 - np.arange(pair.target.n_latents)
    chosen[2] = -1
    return chosen
'''

EXPORT = '''
"""How many links are kept, as a text file."""


def lengths(run, out, *, feature, site):
    out.write_text(f"{len(run.graph.links)} links, {len(run.saes)} sites, {site}")
    return [out]
'''


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder with a package of others, installed."""
    folder = tmp_path / "site-packages"
    about = folder / "mine-1.0.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[featureflow.architectures]\nsoft = mine_soft:SoftThreshold\n"
        "[featureflow.matchers]\nmirror = mine_mirror:mirror\n"
        "[featureflow.exports]\nlengths = mine_lengths:lengths\n"
    )
    (folder / "mine_soft.py").write_text(ARCHITECTURE)
    (folder / "mine_mirror.py").write_text(MATCHER)
    (folder / "mine_lengths.py").write_text(EXPORT)
    return folder


def featureflow(package: Path, *words: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(package), str(root)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline", *words]
    return subprocess.run(
        command, cwd=package.parent, env=environment, capture_output=True, text=True
    )


def test_an_architecture_with_an_activation_a_matcher_and_an_export_are_used(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture = '{kind = "soft_threshold", theta = 0.5, target_l0 = 6}'
    words = ("--to", "link", "-q", "--train.architecture", architecture, "--link.matcher", "mirror")
    found = featureflow(package, "run", "--recipe", "tiny", *words)
    assert found.returncode == 0, found.stderr
    monkeypatch.syspath_prepend(str(package))
    sae = load_sae(package.parent / "artifacts" / "tiny" / "train" / "dictionaries" / "L1")
    assert sae.activation.kind == "shrunk"
    x = torch.randn(20, sae.d_in, generator=torch.Generator().manual_seed(0)) * 3
    pre = (x - sae.b_in) @ sae.W_enc.T + sae.b_enc
    theta = sae.activation.theta  # type: ignore[attr-defined]
    assert (theta > 0).all()
    torch.testing.assert_close(sae.encode(x), (pre - theta).clamp_min(0))
    torch.testing.assert_close(sae.encode_sparse(x).dense(), sae.encode(x))
    _check_mirrored(package.parent / "artifacts" / "tiny")
    words = ("atlas", "export", "links.txt", "-r", "tiny", "--site", "L1", "--to")
    found = featureflow(package, *words, "lengths")
    assert found.returncode == 0, found.stderr
    edges = pd.read_parquet(package.parent / "artifacts" / "tiny" / "link" / "edges.parquet")
    written = (package.parent / "links.txt").read_text()
    assert written == f"{edges['kept'].sum()} links, 8 sites, L1"
    found = featureflow(package, *words, "length")
    assert found.returncode == 2
    assert "graphml, embedding-atlas, lengths" in found.stderr


def _check_mirrored(run: Path) -> None:
    """Living latents have their mirror image as first predecessor, with the cosine of the two."""
    edges = pd.read_parquet(run / "link" / "edges.parquet")
    between = edges[(edges["source_site"] == "L1") & (edges["target_site"] == "L2")]
    first = between[between["rank"] == 0].set_index("target_latent")
    source, target = (load_sae(run / "train" / "dictionaries" / f"L{i}").W_dec for i in (1, 2))
    mirrored = first[first["source_latent"] == 63 - first.index]
    assert len(mirrored) > 0.5 * len(first) > 0
    assert 2 not in mirrored.index
    for latent, row in mirrored.iterrows():
        cosine = float(source[row["source_latent"]] @ target[int(str(latent))])
        assert row["cosine"] == pytest.approx(cosine, abs=1e-5)


def test_its_fields_are_explained_and_checked(package: Path) -> None:
    found = featureflow(package, "train", "--help")
    assert "--train.architecture(soft_threshold).theta" in found.stdout, found.stderr
    wrong = '{kind = "soft_threshold", theta = -1}'
    found = featureflow(package, "train", "-r", "tiny", "--train.architecture", wrong)
    assert found.returncode == 2
    assert "train.architecture.theta" in found.stderr
    assert "float ≥ 0" in found.stderr


def test_a_package_that_cannot_be_used_is_named(package: Path) -> None:
    (package / "mine_soft.py").write_text("import a_module_that_is_not_there")
    found = featureflow(package, "train", "-r", "tiny")
    assert found.returncode == 2
    for expected in ("mine: soft = mine_soft:SoftThreshold", "a_module_that_is_not_there"):
        assert expected in found.stderr


def test_an_unknown_matcher_is_refused_with_those_there_are(package: Path) -> None:
    found = featureflow(package, "run", "-r", "tiny", "-q", "--to", "link", "--link.matcher", "x")
    assert found.returncode == 2
    assert "link.matcher: there is no matcher 'x'" in found.stderr
    assert not (package.parent / "artifacts").exists(), "seen before anything runs"
    assert "permutation" in found.stderr
    assert "mirror" in found.stderr
