"""Features that read what one block writes: removing that block matters more than removing another,
and the lens says so only when the graph names the right one."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from featureflow.sites import Site
from pipeline.context import RunContext
from pipeline.flow.causal import record_clean
from pipeline.lenses import births
from pipeline.lenses.parts.layers import contexts_of
from pipeline.run import Run
from sae import Sae
from sae.activations import Relu

TOP = Site(3, "resid_post")
EACH = 8
CONFIG = births.Config(n_pairs=1, n_targets=80, n_contexts=8)


def read_block(run: Run, layer: int) -> torch.Tensor:
    """The main directions of what a block writes on held-out text."""
    contexts = contexts_of(run, 8)
    sites = (Site(layer - 1, "resid_post"), Site(layer, "resid_post"))
    before, after = record_clean(run.model, contexts, sites).values()
    write = (after - before)[torch.from_numpy(contexts.usable)]
    return torch.linalg.svd(write - write.mean(0), full_matrices=False).Vh[:EACH]


@pytest.fixture
def planted(artifacts: Path) -> Run:
    """Half of the SAE's latents at L3 read what block 1 writes, half what block 2 writes."""
    run = Run.open(artifacts / "tiny", context=RunContext(n_threads=1))
    rows = torch.cat([read_block(run, 1), read_block(run, 2)])
    stream = record_clean(run.model, contexts_of(run, 8), (TOP,))[TOP].flatten(0, 1)
    zeros = torch.zeros(rows.shape[1])
    sae = Sae(
        W_enc=rows,
        b_enc=-(stream @ rows.T).quantile(0.7, dim=0),
        W_dec=rows,
        b_dec=zeros,
        b_in=zeros,
        activation=Relu(),
    )
    run.__dict__["saes"] = {Site(0, "resid_post"): run.saes[Site(0, "resid_post")], TOP: sae}
    return run


def found(run: Run, first: int, second: int) -> pd.DataFrame:
    """What the lens says when the graph has these births for the two halves."""
    nodes = pd.DataFrame({"site": TOP.short, "latent": range(2 * EACH), "alive": True})
    run.graph.nodes = nodes.assign(birth_layer=[first] * EACH + [second] * EACH)
    return births.look(run, CONFIG).tables["summary"].set_index("arm")


def test_the_right_births_are_told_from_the_wrong_ones(planted: Run) -> None:
    right, wrong = found(planted, 1, 2), found(planted, 2, 1)
    assert right.loc["own − other", "change_low"] > 0.05
    assert wrong.loc["own − other", "change_high"] < -0.05
    assert right.loc["own", "change"] > right.loc["other", "change"]


def test_the_arm_without_the_model_takes_the_write_from_the_stream(planted: Run) -> None:
    found(planted, 1, 2)
    trials = births.look(planted, CONFIG).tables["trials"]
    contexts = contexts_of(planted, 8)
    sites = [Site(layer, "resid_post") for layer in range(4)]
    clean = record_clean(planted.model, contexts, sites)
    usable = torch.from_numpy(contexts.usable)
    for row in trials[trials["arm"] == "own"].head(10).itertuples():
        layer = int(row.removed_layer)
        write = clean[sites[layer]] - clean[sites[layer - 1]]
        x = clean[TOP][row.context, row.position] - write[row.context, row.position]
        z = planted.saes[TOP].encode(x + write[usable].mean(0))[row.target_latent]
        expected = min(max(1 - float(z) / row.before, -1), 1)
        assert row.change_no_model == pytest.approx(expected, abs=1e-3)
