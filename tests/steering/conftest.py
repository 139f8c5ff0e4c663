"""A small random model and dictionaries with random rows: steering's arithmetic needs no good
model."""

from __future__ import annotations

import pytest
import torch

from data.model.language_model import LanguageModel, Random
from featureflow.sites import Site
from sae import Relu, Sae

N_LATENTS = 24


def make_dictionary(d_model: int, seed: int, n_latents: int = N_LATENTS) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_latents, d_model, generator=generator)
    rows = rows / rows.norm(dim=-1, keepdim=True)
    return Sae(
        W_enc=rows.clone(),
        b_enc=torch.zeros(n_latents),
        W_dec=rows,
        b_dec=torch.zeros(d_model),
        b_in=torch.zeros(d_model),
        activation=Relu(),
    )


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def model() -> LanguageModel:
    made = LanguageModel.open(
        Random(n_layers=4, d_model=32, n_heads=2, d_mlp=64, seed=3), dtype="float32"
    )
    made.tokenizer.hf.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(scope="session")
def saes(model: LanguageModel) -> dict[Site, Sae]:
    sites = [Site(layer, "resid_post") for layer in range(model.n_layers)]
    return {site: make_dictionary(model.d_model, 10 + site.layer) for site in sites}
