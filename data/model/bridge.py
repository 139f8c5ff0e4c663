"""A LanguageModel as a TransformerBridge: the same weights, for tools that use TransformerLens."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer

from data.model.language_model import LanguageModel
from data.model.loading import quiet_transformers


def boot_bridge(model: LanguageModel) -> TransformerBridge:
    """The same weights as a TransformerBridge, from a copy: booting one swaps modules inside the
    model it is given. The tokenizer goes through a folder, because booting reads it again from
    where it lies."""
    with quiet_transformers(), tempfile.TemporaryDirectory() as folder:
        model.tokenizer.save(Path(folder))
        hf = copy.deepcopy(model.hf)
        hf.config.architectures = [type(hf).__name__]
        return TransformerBridge.boot_transformers(
            model.name,
            hf_model=hf,
            tokenizer=AutoTokenizer.from_pretrained(folder, local_files_only=True),
            dtype=model.dtype,
            device=model.device,
        )
