"""Figures are saved as both kinds, always with the same bytes; files are whole or not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from featureflow.figures import COLOURS, KINDS, legend, panels, save
from featureflow.sites import IN_LAYER


def drawn():
    figure, (left, right) = panels(1, 2)
    left.plot([0, 1], [0.5, 0.25], label="residual stream")
    legend(left)
    legend(right)
    return figure


def test_a_figure_is_saved_as_both_kinds_with_the_same_bytes(tmp_path: Path) -> None:
    save(drawn(), tmp_path / "L0.mlp")
    assert {path.name for path in tmp_path.iterdir()} == {"L0.mlp.png", "L0.mlp.svg"}
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save(drawn(), tmp_path / "L0.mlp")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert b"residual stream" in first["L0.mlp.svg"] or b"<path" in first["L0.mlp.svg"]


@pytest.mark.parametrize("ending", [".png", ".svg", ".pdf"])
def test_an_ending_names_the_one_file(tmp_path: Path, ending: str) -> None:
    save(drawn(), tmp_path / f"flow{ending}")
    assert [path.name for path in tmp_path.iterdir()] == [f"flow{ending}"]


def test_panels_share_one_style_and_only_labelled_ones_have_a_legend() -> None:
    left, right = drawn().axes
    assert left.lines[0].get_color() == COLOURS[0]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["residual stream"]
    assert right.get_legend() is None
    assert not left.spines["top"].get_visible()
    assert set(KINDS) == set(IN_LAYER)
