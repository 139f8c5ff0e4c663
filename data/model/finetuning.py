"""A short fine-tune of a model's last blocks on a text: the second model of a comparison.

1. The corpus is packed as `collect` packs it, with a seed of its own.
2. Blocks below run without gradients; the last `n_blocks` learn by AdamW on next-token prediction.
3. `save_model` leaves a folder that `collect.model = {kind = "folder"}` opens.

Cost: a forward pass of all blocks and a backward pass of the last ones, in float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from data.model.language_model import LanguageModel
from data.text.corpus import CorpusSpec
from data.text.packing import pack_corpus
from featureflow.files import remove_folder, replace_folder
from featureflow.progress import Progress, silent

_LOSSES = 5


def finetune(
    model: LanguageModel,
    corpus: CorpusSpec,
    *,
    n_blocks: int,
    steps: int,
    learning_rate: float,
    n_context: int = 128,
    batch_contexts: int = 4,
    seed: int = 1,
    progress: Progress = silent,
) -> tuple[float, float]:
    """Change the weights of the last blocks in place; returns the mean loss of the first and of the
    last steps. The model must be in float32."""
    packed = pack_corpus(
        corpus,
        model.tokenizer,
        n_context=n_context,
        n_tokens=steps * batch_contexts * n_context,
        seed=seed,
    )
    contexts = torch.from_numpy(packed.contexts())
    learning = [p for at in model.blocks[-n_blocks:] for p in at.block.parameters()]
    model.hf.requires_grad_(False)
    for parameter in learning:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(learning, lr=learning_rate, weight_decay=0.0)
    losses = []
    for step, ids in enumerate(contexts.split(batch_contexts)):
        with torch.enable_grad():
            logits = model.hf(ids, use_cache=False).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())
            loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * (1 - step / steps)
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress(f"fine-tune (loss {losses[-1]:.3f})", step + 1, steps)
    model.hf.requires_grad_(False)
    first, last = losses[:_LOSSES], losses[-_LOSSES:]
    return sum(first) / len(first), sum(last) / len(last)


def save_model(model: LanguageModel, folder: Path) -> None:
    """Weights, config and tokenizer, as `collect.model = {kind = "folder"}` reads them; all of
    them or nothing."""
    beside = folder.with_name(f"{folder.name}.partial")
    remove_folder(beside)
    model.hf.save_pretrained(beside)
    model.tokenizer.save(beside)
    replace_folder(beside, folder)
