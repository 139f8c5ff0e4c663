"""Matching finds exactly what sorting the whole cosine matrix finds, whatever the tile, and never a
NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from featureflow.errors import UserError
from pipeline.flow.directions import directions_of
from pipeline.flow.edges import edges_of
from pipeline.flow.match import best_cosines, full_precision, match


def random_directions(n: int, d: int, seed: int):
    return directions_of(
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), name=f"seed {seed}"
    )


@settings(max_examples=40, deadline=None)
@given(
    n_source=st.integers(1, 300),
    n_target=st.integers(1, 300),
    d=st.integers(2, 24),
    k=st.integers(1, 6),
    tile=st.sampled_from([32, 64, 224, 512]),
    seed=st.integers(0, 10_000),
)
def test_top_k_equals_sorting_the_whole_matrix(n_source, n_target, d, k, tile, seed):
    source, target = random_directions(n_source, d, seed), random_directions(n_target, d, seed + 1)
    found = match(source, target, k=k, tile=tile)
    cosines = target.unit.double().numpy() @ source.unit.double().numpy().T
    for nearest, matrix in ((found.predecessors, cosines), (found.successors, cosines.T)):
        ranked = np.sort(matrix, axis=1)[:, ::-1][:, :k].clip(min=0)
        ranked = np.pad(ranked, ((0, 0), (0, k - ranked.shape[1])))
        np.testing.assert_allclose(nearest.cosine.numpy(), ranked, atol=2e-6)
        row, place = np.nonzero(nearest.index.numpy() >= 0)
        partner = nearest.index.numpy()[row, place]
        np.testing.assert_allclose(
            matrix[row, partner], nearest.cosine.numpy()[row, place], atol=2e-6
        )
        assert all(len(set(i[i >= 0])) == (i >= 0).sum() for i in nearest.index.numpy()), (
            "a partner was listed twice"
        )


def test_only_positive_cosines_are_partners():
    source = directions_of(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), name="s")
    target = directions_of(torch.tensor([[-1.0, -1.0], [0.6, -0.8]]), name="t")
    found = match(source, target, k=2)
    assert found.predecessors.index.tolist() == [[-1, -1], [0, -1]]
    assert found.predecessors.cosine[1].tolist() == pytest.approx([0.6, 0.0])
    assert found.successors.index.tolist() == [[1, -1], [-1, -1]]


def test_rows_without_a_direction_take_part_in_nothing_and_are_reported():
    rows = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    rows[1], rows[2, 0], rows[4] = 0.0, float("nan"), rows[3] * 5
    side = directions_of(rows, name="L3")
    assert side.usable.tolist() == [True, False, False, True, True, True]
    assert side.n_duplicates == 1
    assert any("2 of 6" in warning for warning in side.warnings)
    assert any("repeat" in warning for warning in side.warnings)
    found = match(side, side, k=3)
    assert torch.isfinite(found.predecessors.cosine).all()
    assert not {1, 2} & set(found.predecessors.index.flatten().tolist())
    assert found.predecessors.index[[1, 2]].eq(-1).all()


def test_a_common_mean_direction_is_reported():
    rows = torch.randn(200, 32, generator=torch.Generator().manual_seed(0)) + 2.0
    side = directions_of(rows, name="L1.mlp")
    assert side.mean_share > 0.5
    assert any("common direction" in warning for warning in side.warnings)
    assert directions_of(rows - 2.0, name="x").warnings == ()


def test_projection_reaches_the_residual_stream_and_wrong_widths_are_refused():
    before = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    w_o = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    side = directions_of(before, name="L0.attn", projection=w_o)
    expected = torch.nn.functional.normalize(before @ w_o, dim=1)
    torch.testing.assert_close(side.unit, expected)
    with pytest.raises(UserError, match="projection does not fit"):
        directions_of(before, name="L0.attn", projection=w_o.T)
    with pytest.raises(UserError, match="different spaces"):
        match(directions_of(before, name="L0.attn"), side)
    with pytest.raises(UserError, match="not a dictionary"):
        directions_of(torch.zeros(0, 4), name="L0")


def test_matching_never_uses_reduced_precision_and_leaves_the_setting_alone():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_edges_list_both_directions_with_rank_margin_and_mutuality():
    # cosines [target, source]: target 0 prefers source 0 (1.0 over 0.6), target 1 prefers source 0
    # (0.8 over 0.0)
    source = directions_of(torch.tensor([[1.0, 0.0], [0.6, 0.8]]), name="s")
    target = directions_of(torch.tensor([[1.0, 0.0], [0.8, -0.6]]), name="t")
    columns = edges_of(match(source, target, k=2), top_k=1)
    rows = {
        (int(s), int(t)): (int(r), int(f), round(float(c), 3), round(float(m), 3), bool(u))
        for s, t, r, f, c, m, u in zip(
            columns.source,
            columns.target,
            columns.rank,
            columns.forward_rank,
            columns.cosine,
            columns.margin,
            columns.mutual,
            strict=True,
        )
    }
    assert rows == {
        (0, 0): (0, 0, 1.0, 0.4, True),
        (0, 1): (0, -1, 0.8, 0.8, False),
        (1, 0): (
            -1,
            0,
            0.6,
            -0.4,
            False,
        ),  # the best successor of source 1, though target 0 prefers another
    }


def test_best_cosines_are_the_row_maxima():
    source, target = random_directions(100, 8, 0), random_directions(70, 8, 1)
    expected = (target.unit @ source.unit.T).amax(1).clamp_min(0)
    torch.testing.assert_close(best_cosines(target.unit, source, tile=32), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_finds_what_the_cpu_finds():
    rows, others = torch.randn(700, 64), torch.randn(900, 64)
    here = match(directions_of(rows, name="a"), directions_of(others, name="b"), k=3)
    there = match(
        directions_of(rows, name="a", device="cuda"),
        directions_of(others, name="b", device="cuda"),
        k=3,
    )
    torch.testing.assert_close(
        there.predecessors.cosine.cpu(), here.predecessors.cosine, atol=1e-5, rtol=0
    )
