"""The frontier of sparsity and error: which dictionaries of a site no other one beats on both L0
and FVU.

A dictionary is on the frontier when no other of its site has an L0 that is no larger and an FVU
that is no larger, one of them smaller. A transcoder is compared with transcoders of the same input
only: it solves another task.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

_COLUMNS = [
    "site",
    "reads",
    "source",
    "architecture",
    "n_latents",
    "l0",
    "fvu",
    "fvu_low",
    "fvu_high",
]


def frontier_of(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of sites with several dictionaries, by site and L0, each with `on_frontier`."""
    task = rows["site"] + "<" + rows["reads"].fillna("")
    shared = rows[task.duplicated(keep=False)]
    parts = [_marked(part) for _, part in shared.groupby(task[shared.index], sort=False)]
    columns = [*_COLUMNS, "on_frontier"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def write_frontier(rows: pd.DataFrame, path: Path) -> None:
    """One Parquet file."""
    frontier_of(rows).to_parquet(path, index=False)


def _marked(part: pd.DataFrame) -> pd.DataFrame:
    mine, others = part[["l0", "fvu"]].to_numpy()[:, None], part[["l0", "fvu"]].to_numpy()[None]
    beaten = (others <= mine).all(2) & (others < mine).any(2)
    return part.assign(on_frontier=~beaten.any(1)).sort_values("l0", kind="stable")
