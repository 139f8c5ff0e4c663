"""State-space and recurrent language models, with random weights, run through collect, train and
link: their activations are those that transformers gives, and removing a link's source is tried in
the model itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, MambaConfig, RwkvConfig

from data.model.language_model import LanguageModel
from data.model.spec import Folder, Random
from data.store import ActivationStore
from data.text.corpus import BundledText
from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.context import RunContext
from pipeline.flow.validation import Validation
from pipeline.run import STORE
from pipeline.stages import collect, link, train
from sae.architectures import TopK

CONFIGS = {
    "mamba": (MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=3), ("resid_post",)),
    "rwkv": (
        RwkvConfig(hidden_size=32, num_hidden_layers=3, context_length=64),
        ("resid_post", "attn_out", "mlp_out"),
    ),
}


@pytest.fixture(scope="module", params=list(CONFIGS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as its makers save one, with a tokenizer."""
    place = tmp_path_factory.mktemp(kind)
    tokenizer = LanguageModel.open(Random(n_layers=1, d_model=16, n_heads=2, d_mlp=16)).tokenizer
    config = CONFIGS[kind][0]
    config.vocab_size = tokenizer.n_tokens
    config.rescale_every = 0
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(place)
    tokenizer.hf.save_pretrained(place)
    return place


def test_collect_train_and_link(kind: str, folder: Path, tmp_path: Path) -> None:
    here = RunContext(n_threads=1)
    collected = collect.run(
        collect.Config(
            model=Folder(path=folder),
            corpus=BundledText(),
            sites=CONFIGS[kind][1],
            n_context=32,
            n_tokens=2048,
            validation_fraction=0.25,
            shard_rows=1024,
            chunk_rows=256,
            model_dtype="float32",
            dtype="float32",
        ),
        collect.Inputs(),
        tmp_path / "collect",
        here,
    )
    store = ActivationStore.open(collected.path / STORE)
    check_against_transformers(store, folder)
    trained = train.run(
        train.Config(architecture=TopK(k=4), n_latents=64, steps=40, batch_size=256),
        train.Inputs(collect=collected),
        tmp_path / "train",
        here,
    )
    linked = link.run(
        link.Config(
            n_null=300, functional_tokens=512, validation=Validation(n_targets=8, n_exhaustive=4)
        ),
        link.Inputs(collect=collected, train=trained),
        tmp_path / "link",
        here,
    )
    assert linked.summary["n_features_alive"] > 60
    assert (linked.path / "causal_summary.parquet").is_file()


def check_against_transformers(store: ActivationStore, folder: Path) -> None:
    """Every stored residual vector is what `output_hidden_states` says, by its own count of
    layers."""
    hf = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(store.tokens().id[:64].astype(np.int64).reshape(2, 32))
    seen: list[torch.Tensor] = []
    last = hf.get_submodule(f"{next(n for n, _ in hf.named_modules() if n.endswith('.2'))}")
    with torch.no_grad():
        handle = last.register_forward_hook(
            lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        hf(input_ids=ids)
        handle.remove()
    expected = seen[0].reshape(64, -1)
    np.testing.assert_allclose(store.read("blocks.2.hook_resid_post", 0, 64), expected, atol=1e-5)


def test_sites_that_such_a_model_has_not_are_named(folder: Path, kind: str) -> None:
    model = LanguageModel.open(Folder(path=folder), dtype="float32")
    kinds = {site.kind for site in model.sites()}
    assert {"resid_pre", "resid_post"} <= kinds
    assert ("attn_out" in kinds) == ("attn_out" in CONFIGS[kind][1])
    with pytest.raises(UserError, match="resid_pre"):
        model.check_sites([Site(0, "mlp_normalized")])
