"""A small atlas made by the real stages: a random model over the bundled text, planted
dictionaries, links, features, the atlas."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from data.model.spec import Random
from data.store import ActivationStore
from data.text.corpus import BundledText
from featureflow.sites import parse_site
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.stages import atlas, collect, describe, link
from sae import Sae, save_sae
from sae.activations import TopKActivation

N_LATENTS, D_MODEL, K = 48, 16, 4
DESCRIBE = describe.Config(precision="float32", min_f1=0.3)


@dataclass(frozen=True)
class SmallRun:
    """The artifacts of a small run."""

    collect: Artifact
    train: Artifact
    link: Artifact
    describe: Artifact
    atlas: Artifact

    @property
    def root(self) -> Path:
        return self.atlas.path.parent


def random_dictionary(seed: int, *, mean: torch.Tensor | None = None) -> Sae:
    """A tied TopK dictionary with random unit directions; its last latent never fires."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(N_LATENTS, D_MODEL, generator=generator), dim=1)
    b_enc = torch.zeros(N_LATENTS)
    b_enc[-1] = -1e6
    zero = torch.zeros(D_MODEL)
    return Sae(
        W_enc=W,
        b_enc=b_enc,
        W_dec=W,
        b_dec=zero,
        b_in=zero if mean is None else mean,
        activation=TopKActivation(k=K),
    )


def train_artifact(out: Path, collected: Artifact) -> Artifact:
    """Dictionaries of the same directions at every site, so that links exist, in the layout of the
    train stage."""
    store = ActivationStore.open(collected.path / "store.zarr")
    with Artifact.create(
        out, kind="train", schema=1, config={}, inputs={"collect": collected.digest}
    ) as draft:
        for site in store.sites:
            mean = torch.from_numpy(store.read(site, 0, store.n_rows)).mean(dim=0)
            save_sae(
                random_dictionary(0, mean=mean),
                draft.path / "dictionaries" / parse_site(str(site)).short,
            )
    return Artifact.open(out, kind="train", schema=1)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    """All artifacts; about three seconds, once a session."""
    folder = tmp_path_factory.mktemp("small_run")
    context = RunContext(n_threads=1)
    config = collect.Config(
        model=Random(n_layers=3, d_model=D_MODEL, n_heads=2, d_mlp=32),
        corpus=BundledText(),
        sites=("resid_post", "mlp_out:1"),
        n_context=32,
        n_tokens=4096,
        shard_rows=1024,
        chunk_rows=128,
        validation_fraction=0.2,
    )
    collected = collect.run(config, collect.Inputs(), folder / "collect", context)
    trained = train_artifact(folder / "train", collected)
    links = link.run(
        link.Config(n_null=200, functional_tokens=256),
        link.Inputs(collect=collected, train=trained),
        folder / "link",
        context,
    )
    described = describe.run(
        DESCRIBE,
        describe.Inputs(collect=collected, train=trained, link=links),
        folder / "describe",
        context,
    )
    inputs = atlas.Inputs(train=trained, link=links, describe=described)
    made = atlas.run(atlas.Config(), inputs, folder / "atlas", context)
    return SmallRun(collect=collected, train=trained, link=links, describe=described, atlas=made)
