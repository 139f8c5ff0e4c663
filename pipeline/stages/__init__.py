"""The stages, in the order in which text becomes steering. Listing this folder tells the whole
program.

Every stage module has `KIND`, `SCHEMA`, `Config`, `Inputs` and `run(config, inputs, out, context)
-> Artifact`; `Inputs` is a dataclass whose fields are named after the stages they come from; one
with a default may be left out. A stage whose result also depends on something outside its config
and its input artifacts (the bytes of a text file, the weights of a model) has
`outside_digests(config) -> dict`, one that reads other files of the run `digests_beside(root,
available) -> dict`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

STAGES = ("collect", "train", "link", "describe", "lenses", "steer", "atlas")
ALSO = ("evaluate",)
"""Names of parts of a stage: `evaluate` is `lenses` with the evaluation lenses only."""

TITLES = {
    "collect": "run the model over text and store its activations",
    "train": "train one dictionary (sparse autoencoder) per site",
    "evaluate": "measure the dictionaries on held-out documents (the evaluation lenses)",
    "link": "match features across layers into a flow graph",
    "describe": "describe every feature: statistics, examples, labels",
    "lenses": "look at the run through the lenses of the recipe",
    "steer": "steer the model along features' flows and measure it",
    "atlas": "render all that was found as pages to browse",
}

_OF_ATLAS = ("profile", "filters", "holdout", "choice", "min_f1", "cofiring_rows", "precision")
MOVED = {
    **{f"atlas.{field}": f"describe.{field}" for field in (*_OF_ATLAS, "seed")},
    "atlas.min_firings": "describe.min_active",
    "describe.min_firings": "describe.min_active",
    "evaluate.n_tokens": "lenses.reconstruction.n_tokens",
    "evaluate.n_pca_tokens": "lenses.reconstruction.n_pca_tokens",
    "evaluate.n_resamples": "lenses.reconstruction.n_resamples",
    "evaluate.ce_tokens": "lenses.loss-recovered.n_tokens",
    "evaluate.ce_sites": "lenses.loss-recovered.sites",
    "evaluate.n_ce_sites": "lenses.loss-recovered.n_sites",
    **{f"evaluate.{field}": f"lenses.<lens>.{field}" for field in ("filters", "others", "seed")},
}
"""Settings of earlier recipes, and what they are called now."""


@dataclass(frozen=True)
class StageName:
    """A stage by name; `module` imports it, which loads torch, so it is put off until the stage is
    needed."""

    name: str

    @property
    def module(self) -> ModuleType:
        return import_module(f"pipeline.stages.{self.name}")


def section_of(stage: str) -> str:
    """The section of a recipe that a stage reads."""
    return "lenses" if stage == "evaluate" else stage
