"""Settings of `compiled` → the weights of its transformer.

1. Signals: one orthonormal direction for each value of each variable (`slots_of`, `basis_of`).
2. A block is written in terms of signals (`_Writer`): a head by what its queries, keys and values
   read, the MLP as units relu(reads · signals + bias) that write signals.
3. Attention that must be exact has scores of 1000 for a match, so softmax gives it everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from data.worlds.compiled import CLOSE, EPSILON, HEAD, LETTERS, N_HEADS, N_SUMS, OPEN, Compiled

_HARD = 1000.0
_RECENT = 12.0
"""What a token's score gains over the one before it, where the latest match is wanted."""


@torch.no_grad()
def write_weights(model: PreTrainedModel, world: Compiled) -> None:
    """Write the program of data/worlds/compiled.py into a GPT-2 of the world's shape."""
    for name, weight in model.named_parameters():
        weight.fill_(EPSILON**0.5 if ".ln_" in name and name.endswith("weight") else 0.0)
    basis, slots = basis_of(world), slots_of(world)
    stack: Any = model.base_model
    blocks = [_Writer(block, world, basis) for block in stack.h]
    eye = torch.eye(basis.shape[1])
    stack.wte.weight[1 : len(world.words) + 1] = basis[:, slots["token"]].T
    stack.wpe.weight[:] = basis[:, slots["position"]].T
    _write_before(blocks[0], "token", eye[slots["previous"]])
    _write_mean(blocks[0], world, eye[slots["mean"]])
    _write_induction(blocks[1], world, eye[slots["induction"]])
    _write_depth(blocks[1], world, eye[slots["depth"]])
    letters = slice(1, 1 + len(LETTERS))
    _write_sum(blocks[1], "token", "previous", eye[slots["first"]], letters)
    _erase(blocks[3], "previous")
    _write_sum(blocks[3], "first", "depth", eye[slots["previous"]], slice(None))
    _write_before(blocks[4], "previous", eye[slots["moved"]])
    _erase(blocks[4], "first")
    head: Any = model.get_output_embeddings()
    head.weight[:] = _unembedding(world, slots) @ basis.T


def directions_of(world: Compiled) -> Mapping[str, Float[Tensor, "value d_model"]]:
    """The direction of every value of every variable; `second` has those of `previous`."""
    basis, slots = basis_of(world), slots_of(world)
    named = {name: basis[:, at].T for name, at in slots.items() if name != "mean"}
    return named | {"second": named["previous"][:N_SUMS]}


def slots_of(world: Compiled) -> dict[str, slice]:
    """Which signals of the stream belong to which variable."""
    n_words = len(world.words)
    widths = {
        "position": world.length,
        "token": n_words,
        "previous": n_words,
        "mean": 1,
        "depth": world.max_depth + 1,
        "first": N_SUMS,
        "induction": n_words,
        "moved": N_SUMS,
    }
    ends = np.cumsum(list(widths.values()))
    return {
        name: slice(int(end) - width, int(end))
        for (name, width), end in zip(widths.items(), ends, strict=True)
    }


def basis_of(world: Compiled) -> Float[Tensor, "d_model signal"]:
    """Orthonormal directions, orthogonal to (1, …, 1)."""
    d_model, n = HEAD * N_HEADS, slots_of(world)["moved"].stop
    drawn = torch.randn(
        d_model, n, generator=torch.Generator().manual_seed(world.seed), dtype=torch.float64
    )
    return torch.linalg.qr(drawn - drawn.mean(0)).Q.float()


class _Writer:
    """Writes one block in terms of signals: heads, then units of the MLP."""

    def __init__(self, block: Any, world: Compiled, basis: Tensor) -> None:
        self._block, self._basis, self._slots = block, basis, slots_of(world)
        self._n_units = self._n_heads = 0
        self.n_signals = basis.shape[1]

    def reading(self, name: str) -> Float[Tensor, "value signal"]:
        """Rows that read the values of a variable."""
        return torch.eye(self.n_signals)[self._slots[name]]

    def head(self, query: Tensor, key: Tensor, value: Tensor, to: Tensor) -> None:
        """Scores are `query · key`, both [part signal]; what `value` [part signal] reads at the
        attended token is added to the signals `to` [part signal]."""
        attention, d_model = self._block.attn, self._basis.shape[0]
        at = slice(self._n_heads * HEAD, self._n_heads * HEAD + len(query))
        scale = HEAD**0.5
        columns = attention.c_attn.weight
        columns[:, at] = self._basis @ query.T * scale
        columns[:, d_model + at.start : d_model + at.start + len(key)] = self._basis @ key.T
        start = 2 * d_model + at.start
        columns[:, start : start + len(value)] = self._basis @ value.T
        attention.c_proj.weight[at.start : at.start + len(to)] = to @ self._basis.T
        self._n_heads += 1

    def units(self, reads: Tensor, bias: Tensor, writes: Tensor) -> None:
        """MLP units relu(reads · signals + bias) that add `writes` [unit signal]."""
        at = slice(self._n_units, self._n_units + len(reads))
        mlp = self._block.mlp
        mlp.c_fc.weight[:, at] = self._basis @ reads.T
        mlp.c_fc.bias[at] = bias
        mlp.c_proj.weight[at] = writes @ self._basis.T
        self._n_units = at.stop


def _write_before(block: _Writer, source: str, to: Float[Tensor, "value signal"]) -> None:
    """Copy a variable's first values from the token before, which is found by its position."""
    position = block.reading("position")
    query = torch.zeros_like(position)
    query[:-1] = position[1:] * _HARD
    block.head(query, position, block.reading(source)[: len(to)], to)


def _write_mean(block: _Writer, world: Compiled, to: Float[Tensor, "value signal"]) -> None:
    """The mean over all tokens so far of +1 for an opening and −1 for a closing bracket."""
    tokens = block.reading("token")
    value = tokens[world.words.index(OPEN)] - tokens[world.words.index(CLOSE)]
    nothing = torch.zeros(1, block.n_signals)
    block.head(nothing, nothing, value[None], to)


def _write_induction(block: _Writer, world: Compiled, to: Float[Tensor, "value signal"]) -> None:
    """Attend to tokens whose `previous` is this token, the latest of them; to the first token of
    the context where there is none."""
    everywhere = block.reading("position").sum(0)
    places = torch.arange(world.length, dtype=torch.float32) @ block.reading("position")
    first = block.reading("position")[0]
    query = torch.cat([block.reading("token"), everywhere[None]])
    recency = places * _RECENT + first * 0.7 * _HARD
    key = torch.cat([block.reading("previous") * _HARD, recency[None]])
    block.head(query, key, block.reading("token"), to)


def _write_depth(block: _Writer, world: Compiled, to: Float[Tensor, "value signal"]) -> None:
    """At position p the mean times p + 1 is the depth; hats of relu make it one-hot. The units of
    the other positions are kept off."""
    mean, positions = block.reading("mean")[0], block.reading("position")
    far = 100.0
    for place in range(1, world.length):
        edges = torch.arange(-1, world.max_depth + 2, dtype=torch.float32)
        reads = (mean * (place + 1) + far * positions[place]).repeat(len(edges), 1)
        writes = torch.zeros(len(edges), block.n_signals)
        for depth in range(world.max_depth + 1):
            hat = to[depth]
            for edge, height in zip(range(depth, depth + 3), (1.0, -2.0, 1.0), strict=True):
                writes[edge] += height * hat
        block.units(reads, -edges - far, writes)
    signs = torch.stack([mean, -mean])
    block.units(signs, torch.zeros(2), -signs)  # the mean is not needed any more


def _write_sum(
    block: _Writer, one: str, other: str, to: Float[Tensor, "sum signal"], which: slice
) -> None:
    """One unit for each pair of values: on where both are there, it writes their sum mod 4."""
    left, right = block.reading(one)[which], block.reading(other)[which]
    pairs = [(i, j) for i in range(len(left)) for j in range(len(right))]
    reads = torch.stack([left[i] + right[j] for i, j in pairs])
    writes = torch.stack([to[(i + j) % N_SUMS] for i, j in pairs])
    block.units(reads, torch.full((len(pairs),), -1.0), writes)


def _erase(block: _Writer, name: str) -> None:
    values = block.reading(name)
    block.units(values, torch.zeros(len(values)), -values)


def _unembedding(world: Compiled, slots: Mapping[str, slice]) -> Float[Tensor, "token signal"]:
    n_words = len(world.words)
    rows = torch.zeros(n_words + 2, slots["moved"].stop)
    rows[:, slots["position"]] = -40.0  # the start and the unknown word are never said
    rows[1 : n_words + 1, slots["position"]] = 0.0
    rows[1, slots["position"]] = -4.0
    for word in range(n_words):
        rows[1 + word, slots["induction"].start + word] = 12.0
    rows[1 + world.words.index(CLOSE), slots["depth"].start] = -30.0
    rows[1 + world.words.index(OPEN), slots["depth"].stop - 1] = -30.0
    return rows
