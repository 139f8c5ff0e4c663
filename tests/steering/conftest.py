"""A small random model and dictionaries with random rows: steering's arithmetic needs no good
model."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from data.model.language_model import LanguageModel, Random
from featureflow.sites import FeatureId, Site
from pipeline.flow.queries import ChainStep
from pipeline.steering_run import Steering
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


@dataclass(frozen=True)
class Numbered:
    """A flow graph in which every feature goes on as the latent of its number, all alike in
    density. `cosines`: of the link into each site."""

    sites: tuple[Site, ...]
    cosines: tuple[float, ...]

    @property
    def nodes(self) -> pd.DataFrame:
        rows = [(site.short, latent) for site in self.sites for latent in range(N_LATENTS)]
        return pd.DataFrame(rows, columns=["site", "latent"]).assign(alive=True, density=0.1)

    def node(self, feature: FeatureId) -> pd.Series:
        return self.nodes.iloc[0]

    def chain(self, feature: FeatureId) -> list[ChainStep]:
        return [
            ChainStep(feature=FeatureId(site, feature.latent), cosine=cosine, q_value=0.0)
            for site, cosine in zip(self.sites, self.cosines, strict=True)
        ]


def steering_of(model, saes, cosines=(0.9, 0.9, 0.9, 0.9)) -> Steering:
    """A small model steered along chains of equal numbers; every site's median norm is 6."""
    store = SimpleNamespace(statistics=lambda site: SimpleNamespace(median_norm=6.0))
    graph = Numbered(sites=tuple(saes), cosines=tuple(cosines))
    return Steering(SimpleNamespace(graph=graph, store=store, saes=saes, model=model))
