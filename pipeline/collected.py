"""The language model that a collect artifact was made with, opened again and held against its
fingerprint."""

from __future__ import annotations

from pydantic import TypeAdapter

from data.model.language_model import LanguageModel
from data.model.spec import ModelSpec
from data.store import ActivationStore
from featureflow.errors import UserError
from pipeline.artifact import Artifact
from pipeline.run import RunContext


def open_collected_model(
    collect: Artifact, store: ActivationStore, context: RunContext
) -> LanguageModel:
    """The model that the activations were collected from. Raises UserError if its weights are
    others now."""
    if "model" not in collect.config:
        raise UserError(
            "the activations do not say which model they are from",
            where=str(collect.path),
            fix="set evaluate.ce_tokens to 0",
        )
    spec: ModelSpec = TypeAdapter(ModelSpec).validate_python(collect.config["model"])
    model = LanguageModel.open(
        spec,
        dtype=collect.config.get("model_dtype", "bfloat16"),
        device=context.device,
        progress=context.progress,
    )
    expected = store.provenance.get("model_fingerprint")
    if expected is not None and expected != model.fingerprint:
        raise UserError(
            f"{model.name} is not the model that the activations were collected from",
            where=store.url,
            expected=f"fingerprint {expected[:12]}",
            found=f"fingerprint {model.fingerprint[:12]}",
            fix="featureflow collect --force, then the stages after it with --force",
        )
    return model
