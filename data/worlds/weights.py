"""The models and the tokenizer of worlds: GPT-2 of a few small sizes, words as tokens.

Trained weights lie beside this file as float32 safetensors. Their metadata names the world they
were trained for, so weights of another generator are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from data.worlds.base import World
from data.worlds.compiled import Compiled
from data.worlds.compiling import write_weights
from featureflow.errors import Command, Problem, UserError
from featureflow.files import written_atomically

START, UNKNOWN = "<|start|>", "<|unknown|>"
SHIPPED, UNTRAINED = "shipped", "untrained"
_SPACE = "▁"


def model_of(world: World, weights: str) -> PreTrainedModel:
    """The world's model with the weights named: shipped ones (or those written by hand), untrained
    ones, or a file of one's own. Raises UserError for weights of another world."""
    model = untrained(world)
    if weights == UNTRAINED:
        return model
    if world.TRAINED:
        _read_weights(model, world, shipped_path(world) if weights == SHIPPED else Path(weights))
    elif weights != SHIPPED:
        raise UserError(
            f"the weights of the world {world.kind} are written by hand",
            found=f"weights = {weights!r}",
            expected=f"{SHIPPED} or {UNTRAINED}",
        )
    elif isinstance(world, Compiled):
        write_weights(model, world)
    return model


def untrained(world: World) -> PreTrainedModel:
    """A GPT-2 of the world's shape without dropout, with the words, the start of a context and the
    unknown word. Every weight is drawn in the order of its name from a generator of its own."""
    shape = world.shape()
    config = transformers.GPT2Config(
        vocab_size=len(world.words) + 2,
        n_positions=shape.pop("n_context"),
        n_embd=shape.pop("d_model"),
        n_layer=shape.pop("n_layers"),
        n_head=shape.pop("n_heads"),
        n_inner=shape.pop("d_mlp"),
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        **shape,
    )
    return _drawn(transformers.GPT2LMHeadModel(config), seed=0)


def _drawn(model: PreTrainedModel, *, seed: int) -> PreTrainedModel:
    """GPT-2's own start; a norm whose epsilon is huge keeps the length of what it reads."""
    generator = torch.Generator().manual_seed(seed)
    gain = max(1.0, float(model.config.layer_norm_epsilon) ** 0.5)
    scale = 0.02 if gain == 1.0 else 0.06
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.ndim == 1:
                weight.fill_(gain if ".ln_" in name and name.endswith("weight") else 0.0)
            else:
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
    return model


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A token a word: 0 starts a context, word i is i + 1, the last id is any other word."""
    names = [START, *(f"{_SPACE}{word}" for word in words), UNKNOWN]
    backend = RustTokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=UNKNOWN)
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement=_SPACE)]
    )
    backend.decoder = decoders.Metaspace(replacement=_SPACE)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=START, eos_token=START, unk_token=UNKNOWN
    )


def shipped_path(world: World) -> Path:
    """Where the trained weights of a world lie in this package."""
    return Path(__file__).parent / f"{world.kind}.safetensors"


def save_weights(model: PreTrainedModel, world: World, path: Path, *, note: str) -> None:
    """Write trained weights beside and rename. `note` says how they were made."""
    tensors = {name: weight.detach().contiguous() for name, weight in model.named_parameters()}
    with written_atomically(path) as beside:
        save_file(tensors, beside, metadata={"world": world.identity, "made_by": note})


def _read_weights(model: PreTrainedModel, world: World, path: Path) -> None:
    wanted = dict(model.named_parameters())
    fix = Command("world", "train", world.kind)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"the weights of the world {world.kind} cannot be read",
            where=str(path),
            found=str(error),
            fix=fix,
        ) from error
    problems = [
        Problem(what="missing weight" if name not in found else "shape", where=name)
        for name, weight in wanted.items()
        if name not in found or found[name].shape != weight.shape
    ]
    if metadata.get("world") != world.identity:
        what = "made for another generator"
        seen = metadata.get("world", "nothing")[:12]
        problems.insert(0, Problem(what=what, expected=world.identity[:12], found=seen))
    if problems:
        raise UserError(
            f"these weights do not match the world {world.kind}",
            where=str(path),
            problems=tuple(problems),
            fix=fix,
        )
    with torch.no_grad():
        for name, weight in wanted.items():
            weight.copy_(found[name])
