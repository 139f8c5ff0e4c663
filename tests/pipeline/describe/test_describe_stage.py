"""The describe stage on a small real run: it resumes, refuses what does not belong together, and
two runs are compared."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pandas as pd
import pytest

from featureflow.errors import UserError
from featureflow.sites import parse_site
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.describe.features import Features, diff_features
from pipeline.describe.jobs import corpus_for
from pipeline.run import Run
from pipeline.stages import describe as stage
from pipeline.stages.describe import prepare
from sae import load_sae, save_sae
from tests.pipeline.small_run import DESCRIBE, random_dictionary

SITES = ("L0", "L1.mlp", "L1", "L2")


def inputs_of(small_run, **changed) -> stage.Inputs:
    given = {name: getattr(small_run, name) for name in ("collect", "train", "link")}
    return stage.Inputs(**given | changed)


class _Killed(Exception):
    pass


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(small_run, tmp_path):
    def kill(label: str, done: int, total: int) -> None:
        if (label, done) == ("survey", 2):
            raise _Killed

    out, context = tmp_path / "describe", RunContext(n_threads=1)
    with pytest.raises(_Killed):
        stage.run(DESCRIBE, inputs_of(small_run), out, replace(context, progress=kill))
    assert not out.exists()
    again = stage.run(DESCRIBE, inputs_of(small_run), out, context)
    made = {
        name: entry["sha256"]
        for name, entry in again.files.items()
        if name.startswith(("tables/", "sites/"))
    }
    assert len(made) > 10
    assert made == {name: small_run.describe.files[name]["sha256"] for name in made}


def test_store_and_dictionaries_that_do_not_belong_together_are_refused(small_run, tmp_path):
    train = shutil.copytree(small_run.train.path, tmp_path / "train")
    wrong = random_dictionary(0)
    narrow = wrong.replace(
        W_enc=wrong.W_enc[:, :8],
        W_dec=wrong.W_dec[:, :8],
        b_dec=wrong.b_dec[:8],
        b_in=wrong.b_in[:8],
    )
    save_sae(narrow, train / "dictionaries" / "L2")
    fake = Artifact(**{**small_run.train.__dict__, "path": train})
    inputs = inputs_of(small_run, train=fake)
    with pytest.raises(UserError, match="do not belong together at L2"):
        stage.run(stage.Config(), inputs, tmp_path / "describe", RunContext(n_threads=1))


def test_a_graph_of_other_dictionaries_is_refused(small_run, tmp_path):
    train = shutil.copytree(small_run.train.path, tmp_path / "train")
    shutil.rmtree(train / "dictionaries" / "L1.mlp")
    fake = Artifact(**{**small_run.train.__dict__, "path": train})
    inputs = inputs_of(small_run, train=fake)
    with pytest.raises(UserError, match="made from other dictionaries") as raised:
        stage.run(DESCRIBE, inputs, tmp_path / "describe", RunContext(n_threads=1))
    assert "L1.mlp: 48" in str(raised.value.problems[0].found)


def test_a_process_forgets_a_corpus_when_the_store_was_made_again_in_its_place(small_run, tmp_path):
    """Paths alone would give a worker that outlives a run the old text."""
    job = stage.job_of(DESCRIBE, inputs_of(small_run), tmp_path / "work")
    prepare(job, Run.open(small_run.root).model)
    assert corpus_for(job) is corpus_for(job)
    assert corpus_for(replace(job, made_from=("new",))) is not corpus_for(job)


def test_the_text_of_a_run_is_read_back_as_it_was_described(small_run, tmp_path):
    job = stage.job_of(DESCRIBE, inputs_of(small_run), tmp_path / "work")
    prepare(job, Run.open(small_run.root).model)
    before, after = corpus_for(job), Features.open(small_run.describe.path).corpus
    for name in ("token", "document", "position", "kept", "part", "document_source"):
        assert (getattr(before, name) == getattr(after, name)).all()
    assert (before.document_label == after.document_label).all()
    for name in ("titles", "sources", "labels"):
        assert getattr(before, name) == getattr(after, name)
    assert before.vocabulary.tokens == after.vocabulary.tokens
    assert before.vocabulary.special == after.vocabulary.special


def test_tables_of_an_earlier_version_are_read_with_the_names_of_today(small_run, tmp_path):
    old = tmp_path / "describe"
    shutil.copytree(small_run.describe.path, old)
    path = old / "tables" / "features.parquet"
    table = pd.read_parquet(path).rename(columns={"n_active": "n_firings"})
    table.to_parquet(path, index=False)
    features = Features(old)
    assert features.table["n_active"].tolist() == table["n_firings"].tolist()
    assert features.at("L1")["n_active"].sum() == table[table["site"] == "L1"]["n_firings"].sum()


def test_two_runs_of_the_same_dictionaries_match_feature_by_feature(small_run):
    features = Features.open(small_run.describe.path)
    saes = {parse_site(s): load_sae(small_run.train.path / "dictionaries" / s) for s in SITES}
    same = diff_features(features, features, saes, saes)
    assert set(same["status"]) == {"match"}
    assert (same["feature_before"] == same["feature_after"]).all()
    shuffled = {s: sae.replace(W_dec=sae.W_dec.roll(1, dims=0)) for s, sae in saes.items()}
    moved = diff_features(features, features, saes, shuffled)
    pair = moved[moved["feature_before"] == "L2/5"].iloc[0]
    assert (pair["status"], pair["feature_after"]) == ("match", "L2/6")
