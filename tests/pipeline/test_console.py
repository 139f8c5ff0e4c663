"""Tables keep what they are given, whole where nobody reads them on a terminal."""

from __future__ import annotations

from pipeline.console import table


def test_columns_are_aligned_and_nothing_is_cut_or_taken_for_markup() -> None:
    long = "a label that is longer than any terminal is wide, " * 10
    rows = [("L0/1", "0.5", "[bold] :smile: " + long), ("L12.mlp/402", "12", "")]
    assert table(rows) == ["L0/1         0.5  [bold] :smile: " + long.rstrip(), "L12.mlp/402  12"]
    assert table([("a", "b")], header=("first", "x")) == ["first  x", "a      b"]
    assert table([]) == []
