"""Train the model of a world from its own documents: next-token prediction, AdamW, one thread.

1. Documents from a seed of their own, every one used once; every context begins with the start.
2. `steps` batches; the rate warms up for a twentieth of them and falls to 0 like a cosine.
3. The share of legal moves is measured on documents with another seed (`legal_share`).

The result depends on the settings and the seed alone, up to the rounding of the machine's products.
Cost (`fsm`, 1,500 steps of 128 contexts): about six minutes of one core.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Int64
from transformers import PreTrainedModel

from data.worlds.base import World
from data.worlds.weights import untrained
from featureflow.progress import Progress, silent

SEED, TEST_SEED = 1_000_003, 1_000_033


def train(
    world: World,
    *,
    steps: int = 1500,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    progress: Progress = silent,
) -> PreTrainedModel:
    """The trained model, in evaluation mode."""
    model: Any = untrained(world)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warmup = max(1, steps // 20)
    documents = world.documents(steps * batch_size, SEED)
    for step in range(steps):
        ids = torch.from_numpy(contexts_of(world, list(islice(documents, batch_size))))
        rate = min(1.0, (step + 1) / warmup) * 0.5 * (1 + np.cos(np.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        progress(f"train {world.kind} (loss {loss.item():.3f})", step + 1, steps)
    return model.eval()


def contexts_of(world: World, documents: list[str]) -> Int64[np.ndarray, "context position"]:
    """The ids of documents, each with the start before it."""
    number = {word: i + 1 for i, word in enumerate(world.words)}
    return np.array([[0, *(number[word] for word in text.split())] for text in documents])


@torch.no_grad()
def legal_share(model: PreTrainedModel, world: World, *, n_places: int = 400) -> float:
    """How often the likeliest continuation of a token where a steered variable is known is one that
    the world allows, at places drawn from other documents."""
    ids = contexts_of(world, list(world.documents(64, TEST_SEED)))
    rng = np.random.default_rng(0)
    legal = total = 0
    for variable in world.truth(ids):
        if variable.name not in world.STEERED:
            continue
        places = np.argwhere(variable.value >= 0)
        for context, position in places[rng.permutation(len(places))[:n_places]]:
            prefix = ids[context, : position + 1]
            value = int(variable.value[context, position])
            allowed = world.continuations(variable.name, value, prefix)
            if allowed and position + len(allowed[0]) < world.n_context:
                written = _greedy(model, prefix, len(allowed[0]))
                legal += tuple(world.text_of(written)) in allowed
                total += 1
    return legal / max(total, 1)


def _greedy(model: Any, prefix: Int64[np.ndarray, "position"], n: int) -> list[int]:
    ids = prefix.tolist()
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[-n:]
