"""Masks and spans by hand, ranks by loops, scores of unfamiliar rows on planted SAEs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sparse
import torch
from sklearn.metrics import roc_auc_score

from data.tokens import DocumentRow, TokenTable
from featureflow.errors import UserError
from pipeline.lenses import dissect, dynamics, ranks
from pipeline.lenses.parts.read_out import ranked
from pipeline.run import Run
from sae import Sae
from sae.activations import Relu


def planted() -> tuple[np.ndarray, np.ndarray]:
    """Latent 0 marks half of the concept's tokens; 1, 2 and 3 a third each; 4 … 19 noise."""
    rng = np.random.default_rng(0)
    label = np.zeros(3000, dtype=bool)
    label[rng.permutation(3000)[:300]] = True
    active = rng.random((3000, 20)) < 0.05
    active[:, :4] = False
    own = np.flatnonzero(label)
    active[own[:150], 0] = True
    for latent in (1, 2, 3):
        active[own[latent - 1 :: 3], latent] = True
    return active, label


def test_overlap_and_detectors_are_those_planted() -> None:
    active, label = planted()
    config = dissect.Config(n_rolls=20)
    table = dissect.dissected(sparse.csr_matrix(active), label[:, None], ["own"], config)
    table = table.set_index("latent")
    assert table.loc[0, "iou"] == pytest.approx(0.5)
    assert (table.loc[0, "precision"], table.loc[0, "recall"]) == (1.0, 0.5)
    assert table.loc[1, "iou"] == pytest.approx(1 / 3)
    assert table.index[table["detector"]].tolist() == [0, 1, 2, 3]


def test_a_concept_in_three_latents_takes_three() -> None:
    active, label = planted()
    codes = sparse.csr_matrix(active[:, 1:].astype(np.float32))
    found = dissect.set_iou(codes, label, np.arange(3000) // 30, 0)
    assert found["set_iou"] > 0.9
    assert found["f80"] == 4, "three, by sizes 1, 2, 4"


def test_spans_are_characters_of_the_documents_text() -> None:
    pieces = {1: b"<s>", 2: "né".encode(), 3: b" in", 4: b" May", 5: b"!"}
    tokens = TokenTable(
        id=np.array([1, 2, 3, 1, 4, 5, 2], dtype=np.uint32),
        document=np.array([0, 0, 0, 0, 0, 0, 1], dtype=np.uint32),
        position=np.array([0, 1, 2, 0, 1, 2, 3], dtype=np.uint32),
        flags=np.array([1, 0, 0, 1, 0, 0, 0], dtype=np.uint8),
        documents=(DocumentRow(title="a"), DocumentRow(title="b")),
    )
    spans = [(0, 6, 9, "month"), (0, 0, 1, "start"), (1, 1, 2, "start")]
    rows = np.array([1, 2, 4, 5, 6])
    masks = dissect.masks_of(spans, tokens, rows, pieces.__getitem__)
    assert masks["month"].tolist() == [False, False, True, False, False]
    assert masks["start"].tolist() == [True, False, False, False, True]


def test_every_wrong_line_is_named(run: Run, tmp_path: Path) -> None:
    good = {"document": 0, "start": 0, "end": 400, "label": "start"}
    lines = [
        json.dumps(good),
        "{",
        json.dumps({"document": 0}),
        json.dumps(good | {"document": "no such title"}),
        json.dumps(good | {"start": 5, "end": 5}),
        json.dumps(good | {"label": ""}),
        json.dumps(good | {"document": 10**6}),
    ]
    path = tmp_path / "spans.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError) as caught:
        dissect.look(run, dissect.Config(spans=str(path)))
    where = [problem.where for problem in caught.value.problems]
    assert where == [f"{path}, line {number}" for number in range(2, 8)]
    assert "lacks start, end, label" in str(caught.value)
    with pytest.raises(UserError, match="there is no such file"):
        dissect.look(run, dissect.Config(spans=str(tmp_path / "none.jsonl")))
    before = dissect.outside_digests(dissect.Config(spans=str(path)))
    path.write_text(json.dumps(good))
    assert dissect.outside_digests(dissect.Config(spans=str(path))) != before


def test_onset_is_the_layer_from_which_the_rank_stays() -> None:
    rank = np.array([[9, 1, 1], [1, 4, 1], [3, 1, 1], [1, 1, 1]])
    np.testing.assert_allclose(ranks.onset(rank, 1), [1, 2 / 3, 0])
    np.testing.assert_allclose(ranks.onset(rank, 5), [1 / 3, 0, 0])


def test_the_last_layer_says_the_answer_and_another_rows_answer_ranks_low(run: Run) -> None:
    x = torch.randn(6, run.model.d_model, generator=torch.Generator().manual_seed(0))
    top, _ = ranked(run, x, torch.zeros(6, dtype=torch.int64))
    again, (rank, log_p) = ranked(run, x, torch.from_numpy(top))
    assert (rank == 1).all()
    assert (again == top).all()
    assert (log_p < 0).all()


def test_area_under_the_curve_is_scikits_with_ties() -> None:
    rng = np.random.default_rng(0)
    unit = np.repeat(np.arange(5), 20)
    own, changed = rng.integers(0, 6, 100).astype(float), rng.integers(2, 9, 100).astype(float)
    found = dynamics.auroc(own, changed, unit, 0)
    truth = np.r_[np.zeros(100), np.ones(100)]
    assert found.mean == pytest.approx(roc_auc_score(truth, np.r_[own, changed]))
    assert found.low < found.mean < found.high


def test_what_an_orthonormal_sae_knows_is_a_fixed_point() -> None:
    """Rows in the span of the dictionary stay; what is outside it is the one-step error."""
    eye = torch.eye(6)
    sae = Sae(
        W_enc=eye[:3],
        b_enc=torch.zeros(3),
        W_dec=eye[:3],
        b_dec=torch.zeros(6),
        b_in=torch.zeros(6),
        activation=Relu(),
    )
    inside = torch.rand(10, 6) * torch.tensor([1.0, 1, 1, 0, 0, 0])
    outside = inside + torch.tensor([0.0, 0, 0, 2, 0, 0])
    zero, one = torch.zeros(6), torch.ones(6)
    found, steps = dynamics.scored(sae, inside, zero, one, 3)
    np.testing.assert_allclose(found["one step"], 0, atol=1e-6)
    assert steps == pytest.approx([0, 0, 0], abs=1e-6)
    found, steps = dynamics.scored(sae, outside, zero, one, 3)
    np.testing.assert_allclose(found["one step"], 2 / outside.norm(dim=-1), rtol=1e-5)
    assert steps[1:] == pytest.approx([0, 0], abs=1e-6), "one step leads into the span"
