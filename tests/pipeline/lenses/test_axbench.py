"""AxBench's detection on planted states, and its files against its own formulas and columns."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from data.concepts.topics import read_topics
from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.lenses import axbench
from pipeline.lenses.axbench import Config, export, look, texts_of, token_states
from pipeline.training.reading import read_rows
from sae.activations import Gated
from sae.calibration import with_threshold
from tests.steering.linear_net import sae_with

TRAIN = ["input", "output", "output_concept", "concept_genre", "category", "dataset_category"]
SITE = Site(2, "resid_post")
TOPICS = list(read_topics())


def planted(run, sites, texts):
    """Coordinate k is high on one token of texts of topic k, low on every token of all."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for text in texts:
        h = 0.1 * torch.rand(6, 20, generator=generator)
        h[3, TOPICS.index(text.topic)] = 2.0
        found.append(h)
    return dict.fromkeys(sites, found)


def test_a_planted_concept_is_detected_by_its_latent_and_not_by_a_random_one(monkeypatch):
    monkeypatch.setattr(axbench, "token_states", planted)
    sae = sae_with(torch.eye(20))
    run = SimpleNamespace(
        steering=SimpleNamespace(saes={SITE: sae}),
        saes={SITE: sae},
        context=SimpleNamespace(progress=lambda *_: None),
    )
    found = look(run, Config(n_fit=6, n_report=6))
    auroc = found.tables["by_topic"].groupby("detector")["auroc"].min()
    assert auroc["SAE latent"] == auroc["difference of means"] == auroc["probe"] == 1.0
    assert found.headline["random_latent"] < 0.8
    assert found.headline["layer"] == 2


@pytest.fixture
def out(tmp_path):
    return tmp_path / "axbench"


def test_the_exported_latents_are_the_runs_own_by_axbenchs_formula(run, out):
    site = list(run.steering.saes)[-1]
    paths = export(run, site, out, model_id="tiny", config=Config(n_fit=4, n_report=3))
    assert all(path.is_file() for path in paths)
    with pytest.raises(UserError, match="in the way"):
        export(run, site, out, model_id="tiny", config=Config(n_fit=4, n_report=3))
    metadata = [json.loads(line) for line in (out / "generate/metadata.jsonl").open()]
    assert [each["concept"] for each in metadata] == TOPICS
    assert [each["concept_id"] for each in metadata] == list(range(len(TOPICS)))
    assert all(each["concept_genres_map"] == {each["concept"]: ["text"]} for each in metadata)
    latents = [int(each["ref"].rsplit("/", 1)[1]) for each in metadata]

    saved = torch.load(out / "train/GemmaScopeSAE.pt", weights_only=True)
    texts = texts_of("discover", 4)
    states = token_states(run, [site], texts)[site]
    h = torch.cat(states)
    pre = h @ saved["W_enc"] + saved["b_enc"]
    acts = (pre > saved["threshold"]) * torch.relu(pre)
    rows = read_rows(run.store, site, run.store.kept_rows("train")[:8192])
    sae = with_threshold(run.saes[site], rows)
    codes = sae.encode(h)
    torch.testing.assert_close(acts, codes[:, latents], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(saved["W_dec"], run.saes[site].W_dec[latents])

    means = np.stack([sae.encode(x).mean(0).numpy() for x in states])
    own = np.array([text.topic == TOPICS[3] for text in texts])
    assert latents[3] == (means[own].mean(0) - means[~own].mean(0)).argmax()
    model, source, _ = metadata[0]["ref"].split("/")[-3:]
    largest = json.loads((out / f"data/{model}_{source}_max_activations.json").read_text())
    assert largest[str(latents[0])] == pytest.approx(float(codes[:, latents[0]].max()), abs=1e-3)
    assert json.loads((out / "train/config.json").read_text())["layer"] == site.layer


def test_the_data_have_axbenchs_columns_and_both_kinds_of_texts(run, out):
    site = next(iter(run.steering.saes))
    export(run, site, out, model_id="tiny", config=Config(n_fit=4, n_report=3))
    train = pd.read_parquet(out / "generate/train_data.parquet")
    told = pd.read_parquet(out / "inference/latent_eval_data.parquet")
    assert list(train) == [*TRAIN, "concept_id"]
    assert list(told) == [*TRAIN, "concept_id", "sae_link", "sae_id"]
    assert set(train[train["concept_id"] == -1]["output_concept"]) == {"EEEEE"}
    assert (told["sae_link"].str.rsplit("/", n=1).str[1].astype(int) == told["sae_id"]).all()
    by_kind = told.groupby(["concept_id", "category"]).size()
    assert (by_kind == 3).all()
    own = {(text.input, text.output): text.topic for text in texts_of("test", 3)}
    for row in told.itertuples():
        is_own = own[row.input, row.output] == row.output_concept
        assert is_own == (row.category == "positive")


def test_a_gated_sae_is_refused(run, tmp_path):
    site = next(iter(run.steering.saes))
    gate = Gated(gain=torch.ones(1), offset=torch.zeros(1))
    other = SimpleNamespace(activation=gate)
    stand_in = SimpleNamespace(saes={site: other}, steering=run.steering, model=run.model)
    with pytest.raises(UserError, match="thresholds"):
        export(stand_in, site, tmp_path / "out", model_id="tiny", config=Config())
    assert not (tmp_path / "out").exists()
