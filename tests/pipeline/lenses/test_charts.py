"""Charts of what has no interval."""

from __future__ import annotations

import pandas as pd

from pipeline.lenses.parts.charts import lines


def test_a_single_document_draws_lines_without_bands() -> None:
    """One held-out document gives no interval: None in a table, which is no number to draw."""
    rows = [
        {
            "layer": layer,
            "kind": "resid_post",
            "fvu": 0.1 * layer,
            "fvu_low": None,
            "fvu_high": None,
        }
        for layer in (1, 2, 3)
    ]
    figure = lines(pd.DataFrame(rows), x="layer", line="kind", columns={"fvu": "FVU"})
    (line,) = figure.axes[0].lines
    assert line.get_xdata().tolist() == [1, 2, 3]
