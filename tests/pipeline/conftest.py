"""Artifacts of a small random model, from text to a flow graph: what the steer stage and its tools
start from."""

from __future__ import annotations

import pytest

from data.model.spec import Random
from data.text.corpus import BundledText
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.stages import collect, link, steer, train
from sae.architectures import TopK
from tests.pipeline.small_run import small_run

__all__ = ["inputs", "small_run"]


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> steer.Inputs:
    root = tmp_path_factory.mktemp("artifacts")
    context = RunContext(n_threads=1)
    model = Random(n_layers=5, d_model=32, n_heads=4, d_mlp=64)
    collected = collect.run(
        collect.Config(
            model=model,
            corpus=BundledText(),
            n_context=32,
            n_tokens=8192,
            validation_fraction=0.2,
            shard_rows=4096,
        ),
        collect.Inputs(),
        root / "collect",
        context,
    )
    trained = train.run(
        train.Config(architecture=TopK(k=4), n_latents=64, steps=60, batch_size=256),
        train.Inputs(collect=collected),
        root / "train",
        context,
    )
    linked = link.run(
        link.Config(functional_tokens=1024, n_null=500),
        link.Inputs(collect=collected, train=trained),
        root / "link",
        context,
    )
    # it has no tables, so it names another graph: nothing takes labels from it
    with Artifact.create(
        root / "describe", kind="describe", schema=1, config={}, inputs={"link": "0" * 64}
    ) as draft:
        (draft.path / "nothing.txt").write_text("stand-in")
    described = Artifact.open(root / "describe", kind="describe", schema=1)
    return steer.Inputs(collect=collected, train=trained, link=linked, describe=described)
