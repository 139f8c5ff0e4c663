"""Reach by worked numbers; short contexts token by token; a context that is whole keeps all."""

from __future__ import annotations

import numpy as np
import pytest

from data.tokens import RowFilters
from featureflow.errors import UserError
from pipeline.lenses import context
from pipeline.run import Run


def test_reach_is_the_length_from_which_enough_is_kept() -> None:
    shares = np.array([[0.9, 0.9, 1.0], [0.1, 0.85, 0.9], [0.9, 0.2, 0.9], [0.0, 0.1, 0.2]])
    found = context.reach_of(shares, (1, 4, 16), 0.8)
    np.testing.assert_array_equal(found["reach"], [1, 4, 16, np.nan])
    assert found["reads"] == ["one token", "phrase", "sentence", "document"]
    mixed = context.reach_of(shares[:, [2, 0, 1]], (16, 1, 4), 0.8)
    np.testing.assert_array_equal(mixed["reach"], found["reach"])


def test_short_contexts_end_in_the_rows_token(run: Run) -> None:
    config = context.Config(n_rows=40, lengths=(1, 4))
    rows = context.deep_rows(run, config)
    tokens = run.tokens
    own = context.contexts(run, rows, 4, "own").numpy()
    foreign = context.contexts(run, rows, 4, "foreign").numpy()
    for row, mine, others in zip(rows, own, foreign, strict=True):
        start = row - tokens.position[row]
        assert mine.tolist() == [tokens.id[start], *tokens.id[row - 3 : row + 1]]
        assert (others[0], others[-1]) == (mine[0], mine[-1])
    assert (own[:, 1:-1] != foreign[:, 1:-1]).any(1).mean() > 0.9


def test_a_whole_context_keeps_every_activation_and_one_token_does_not(run: Run) -> None:
    at = RowFilters(min_position=9, max_position=9)
    config = context.Config(n_rows=60, lengths=(1, 9), few=3, filters=at, seed=1)
    deep = context.deep_rows(run, context.Config(n_rows=60, lengths=(8,), filters=at))
    assert (run.tokens.position[deep] == 9).all()
    with pytest.raises(UserError, match="no held-out row has so much context"):
        context.look(run, config)
    config = config.replace(lengths=(1, 8))
    before = context.contexts
    try:  # 9 tokens in place of 8: exactly what the full pass read
        context.contexts = lambda run, rows, k, kind: before(run, rows, 9 if k == 8 else k, kind)
        table = context.look(run, config).tables["features"]
    finally:
        context.contexts = before
    assert table["keep_8"].mean() > 0.98, "all but what rounding in the store decides"
    assert table["keep_1"].mean() < 0.95
