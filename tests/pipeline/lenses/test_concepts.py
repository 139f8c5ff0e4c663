"""Probes, depths and ranks on planted texts."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from pipeline.lenses import concept_depth, concept_states, sparse_probe
from pipeline.lenses.base import run_lens
from pipeline.lenses.parts.probes import best_columns, scores
from pipeline.lenses.parts.read_out import ranked
from pipeline.run import Run


def planted(n: int = 240, seed: int = 0) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """512 features in 64 coordinates; the concept is feature 7, alone."""
    rng = np.random.default_rng(seed)
    z = rng.random((n, 512)) * (rng.random((n, 512)) < 0.03)
    y = np.arange(n) % 2
    z[:, 7] = y * (1 + rng.random(n))
    directions = rng.standard_normal((512, 64))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    half = np.arange(n) < n // 2
    split = np.where(half, concept_states.FIT, concept_states.REPORT)
    texts = pd.DataFrame({"topic": np.where(y == 1, "own", "other"), "split": split})
    return z.astype(np.float32), (z @ directions).astype(np.float32), texts


def test_one_latent_tells_a_concept_that_takes_many_coordinates() -> None:
    z, x, texts = planted()
    bases = {"latents": z, "coordinates": x, "permuted labels": z}
    config = sparse_probe.Config(sizes=(1, 16))
    table = pd.DataFrame([*sparse_probe.probed(bases, texts, "own", config, site="L0")])
    f1 = table.set_index(["basis", "k"])["f1"]
    assert f1["latents", 1] > 0.97
    assert f1["coordinates", 1] < 0.9
    assert f1["coordinates", 16] > f1["coordinates", 1]
    assert f1["permuted labels", 1] < 0.8
    y = (texts["topic"] == "own").to_numpy().astype(int)
    assert best_columns(z, y, 1).tolist() == [7]
    best = next(iter(sparse_probe._named(z, texts, "own", "L0", 1)))
    assert best["feature"] == "L0/7"


def test_a_probe_is_judged_on_texts_it_was_not_fitted_on() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((40, 200)), rng.integers(0, 2, 40)
    assert (scores(x, y, x).argmax(1) == y).mean() == 1.0, "it can learn forty texts by heart"
    fresh = rng.standard_normal((400, 200))
    assert abs(np.corrcoef(scores(x, y, fresh)[:, 1], rng.integers(0, 2, 400))[0, 1]) < 0.2


def test_separation_grows_with_the_distance_and_not_with_a_rotation() -> None:
    rng = np.random.default_rng(1)
    y = np.repeat([0, 1], 100)
    noise = rng.standard_normal((200, 5))
    found = []
    for distance in (0.0, 2.0, 6.0):
        x = noise + distance * y[:, None] * np.eye(5)[0]
        found.append(concept_depth.separation(x, y))
        turn, _ = np.linalg.qr(rng.standard_normal((5, 5)))
        turned = concept_depth.separation(3 * x @ turn, y)
        assert turned["silhouette"] == pytest.approx(found[-1]["silhouette"], abs=1e-6)
        assert turned["xie_beni"] == pytest.approx(found[-1]["xie_beni"], rel=1e-6)
    assert [f["silhouette"] for f in found] == sorted(f["silhouette"] for f in found)
    assert [f["xie_beni"] for f in found] == sorted((f["xie_beni"] for f in found), reverse=True)


def test_depths_by_worked_numbers() -> None:
    accuracy = np.array([0.5, 0.6, 0.9, 0.91, 0.8])
    found = concept_depth.depths(accuracy, np.arange(5), accuracy + 0.02)
    assert found == {"jump": 0.5, "converge": 0.75, "onset": 2.0}
    flat = concept_depth.depths(np.array([0.5, 0.7]), np.arange(2), np.array([0.5, 0.7]))
    assert np.isnan(flat["converge"])
    assert flat["jump"] == 1.0


def test_states_are_those_of_each_text_alone(run: Run) -> None:
    run_lens("concept-states", run, concept_states.Config(n_texts=2))
    finding = run.lens("concept-states")
    texts, model = finding.tables["texts"], run.model
    [(place, row)] = [*texts.iloc[[5]].iterrows()]
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(row["text"])]
    site = next(iter(run.store.sites))
    x = model.activations(torch.tensor([ids]), [site])[site][0].float()
    np.testing.assert_allclose(finding.arrays["L0.mean"][place], x[1:].mean(0), atol=2e-3)
    np.testing.assert_allclose(finding.arrays["L0.last"][place], x[-1], atol=2e-3)
    z = run.saes[site].encode(x[1:]).mean(0)
    np.testing.assert_allclose(finding.arrays["L0.latents"][place], z, atol=2e-3)
    assert set(texts["split"]) == {concept_states.FIT, concept_states.REPORT}


def test_ranks_count_the_tokens_that_are_likelier(run: Run) -> None:
    x = torch.randn(3, run.model.d_model, generator=torch.Generator().manual_seed(0))
    target, other = torch.tensor([4, 5, 6]), torch.tensor([1, 2, 3])
    _, (own, _), (null, _) = ranked(run, x, target, other)
    W_U, gain = run.model.unembedding()
    scale = x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
    logits = (x * scale * gain) @ W_U.T
    for i in range(3):
        order = logits[i].argsort(descending=True).tolist()
        assert own[i] == order.index(int(target[i])) + 1
        assert null[i] == order.index(int(other[i])) + 1
