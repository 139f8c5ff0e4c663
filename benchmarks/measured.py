"""The evaluation lenses on SAEs of a benchmark: one row an SAE."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.lenses import loss_recovered, reconstruction
from pipeline.lenses.base import run_lens
from pipeline.run import Run


def measured(
    collected: Artifact,
    trained: Artifact,
    out: Path,
    *,
    n_tokens: int,
    others: tuple[str, ...] = (),
    ce_tokens: int = 0,
    ce_sites: tuple[str, ...] = (),
    context: RunContext | None = None,
) -> pd.DataFrame:
    """Reconstruction, and where `ce_tokens` are given the loss recovered; findings go to
    `out/lenses`."""
    run = Run.of({"collect": collected, "train": trained}, context=context)
    run.root = out
    options = reconstruction.Config(n_tokens=n_tokens, others=others)
    run_lens("reconstruction", run, options)
    rows = run.lens("reconstruction").tables["metrics"]
    if not ce_tokens:
        return rows
    losses = loss_recovered.Config(n_tokens=ce_tokens, sites=ce_sites, others=others)
    run_lens("loss-recovered", run, losses)
    table = run.lens("loss-recovered").tables["losses"]
    return rows.merge(table, on=list(rows.columns.intersection(table.columns)), how="left")
