"""Dictionaries that others trained take the place of training: found by pattern, checked, written
as ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data.store import ActivationStore
from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.saes import Saes
from pipeline.training.imported import (
    Imported,
    find_imported,
    identity_of_imported,
    import_dictionaries,
)

SITES = (Site(0, "resid_post"), Site(1, "resid_post"), Site(1, "mlp_out"))


class StandInStore:
    """What importing asks of a store: its sites and their widths."""

    sites = SITES

    def width(self, site: Site) -> int:
        return 6


def write_gemma_scope(path: Path, seed: int, width: int = 6) -> None:
    """A file of Gemma Scope's form: rows of the encoder are inputs, thresholds are compared with
    pre-activations."""
    rng = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    decoder = rng.normal(size=(8, width)).astype(np.float32)
    np.savez(
        path,
        W_enc=rng.normal(size=(width, 8)).astype(np.float32),
        W_dec=decoder / np.linalg.norm(decoder, axis=1, keepdims=True),
        b_enc=rng.normal(size=8).astype(np.float32),
        b_dec=rng.normal(size=width).astype(np.float32),
        threshold=np.full(8, 0.5, dtype=np.float32),
    )


@pytest.fixture
def choice(tmp_path: Path) -> Imported:
    for layer in (0, 1):
        write_gemma_scope(
            tmp_path
            / "scope"
            / f"layer_{layer}"
            / "width_8"
            / f"average_l0_{layer + 3}"
            / "params.npz",
            layer,
        )
    return Imported(
        paths={
            "resid_post": str(tmp_path / "scope" / "layer_{layer}" / "width_8" / "*" / "params.npz")
        }
    )


def store() -> ActivationStore:
    return StandInStore()  # type: ignore[return-value]


def test_imported_dictionaries_compute_what_their_files_say(
    choice: Imported, tmp_path: Path
) -> None:
    described = import_dictionaries(choice, store(), tmp_path / "dictionaries")
    assert set(described) == {SITES[0], SITES[1]}, "a kind without a pattern is left out"
    ours = Saes(tmp_path / "dictionaries")
    for site, path in find_imported(choice, SITES).items():
        file = np.load(path)
        x = np.random.default_rng(9).normal(size=(20, 6)).astype(np.float32)
        pre = x @ file["W_enc"] + file["b_enc"]
        expected = np.where(pre > file["threshold"], pre, 0) @ file["W_dec"] + file["b_dec"]
        np.testing.assert_allclose(ours[site](torch.from_numpy(x)).numpy(), expected, atol=1e-5)


def test_missing_and_ambiguous_files_are_all_named(choice: Imported, tmp_path: Path) -> None:
    write_gemma_scope(
        tmp_path / "scope" / "layer_0" / "width_8" / "average_l0_99" / "params.npz", 5
    )
    (tmp_path / "scope" / "layer_1" / "width_8" / "average_l0_4" / "params.npz").unlink()
    with pytest.raises(UserError) as caught:
        find_imported(choice, SITES)
    assert "L0: " in str(caught.value)
    assert "several dictionaries fit" in str(caught.value)
    assert "L1: " in str(caught.value)
    with pytest.raises(UserError, match=r"train\.imported\.paths\.attn_out"):
        find_imported(Imported(paths={**choice.paths, "attn_out": "x"}), SITES)


def test_only_the_sites_asked_for_are_imported(choice: Imported, tmp_path: Path) -> None:
    """A store may hold more layers than there are dictionaries."""
    (tmp_path / "scope" / "layer_1" / "width_8" / "average_l0_4" / "params.npz").unlink()
    assert set(
        import_dictionaries(choice, store(), tmp_path / "dictionaries", sites=SITES[:1])
    ) == {SITES[0]}


def test_a_dictionary_of_another_width_is_refused(choice: Imported, tmp_path: Path) -> None:
    write_gemma_scope(
        tmp_path / "scope" / "layer_1" / "width_8" / "average_l0_4" / "params.npz", 1, width=5
    )
    with pytest.raises(UserError, match="does not fit the site"):
        import_dictionaries(choice, store(), tmp_path / "dictionaries")


def test_the_identity_follows_the_bytes(choice: Imported, tmp_path: Path) -> None:
    before = identity_of_imported(choice)
    assert identity_of_imported(choice) == before
    write_gemma_scope(tmp_path / "scope" / "layer_1" / "width_8" / "average_l0_4" / "params.npz", 7)
    assert identity_of_imported(choice) != before
