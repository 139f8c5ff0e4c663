"""Which texts open a neuron of an MLP, what does it push towards, and do the two agree?

1. Neurons of `n_layers` layers are recorded on held-out contexts. For both signs, the 25 tokens
   with the largest activation are a neuron's triggers; ±v is what it writes.
2. Agreement@1: the token that ±v promotes most is the one that follows the top trigger.
   Agreement@10: share of all triggers whose next token is among the ten most promoted.
3. Composition: share of tokens whose most promoted token of the whole layer is that of none of the
   10 % strongest neurons there.
4. Null: values permuted among the neurons of a layer, which keeps the frequencies of both sides.
   Intervals over documents of the top triggers.

Cost: one forward pass over `n_tokens`, and one product of values and unembedding a layer. Source:
Geva et al. 2021, Transformer Feed-Forward Layers Are Key-Value Memories (arXiv 2012.14913); its
text was not read here: 3.5 % in the upper six of 16 layers, nothing below (from memory).
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from jaxtyping import Float, Int
from torch import Tensor
from typing_extensions import Doc

from featureflow.statistics import mean_over, named, ranged
from pipeline.findings import Finding
from pipeline.lenses.base import Sampled
from pipeline.lenses.parts.charts import lines
from pipeline.lenses.parts.held_out import choose_contexts
from pipeline.lenses.parts.layers import spread
from pipeline.lenses.parts.neurons import record_neurons, values
from pipeline.lenses.parts.read_out import Vocabulary, vocabulary_of
from pipeline.run import Run

TITLE = "what opens each neuron and what it promotes (key-value memories)"
NEEDS = ("collect",)
N_TRIGGERS, STRONGEST = 25, 0.1
SIGNS = ((1, "positive"), (-1, "negative"))


class Config(Sampled):
    """Which layers, on how much text."""

    n_layers: Annotated[int, Ge(1), Doc("layers, spread over the depth")] = 8
    n_tokens: Annotated[int, Ge(64), Doc("held-out tokens")] = 8192
    n_composed: Annotated[int, Ge(1), Doc("tokens on which composition is looked at")] = 200


def look(run: Run, config: Config) -> Finding:
    """Agreement and composition by layer, and every neuron's triggers and tokens."""
    contexts = choose_contexts(run, config, config.n_tokens)
    layers = spread(list(range(run.model.n_layers)), config.n_layers)
    recorded = record_neurons(run.model, contexts.ids, layers, progress=run.context.progress)
    following = torch.roll(contexts.ids, -1, 1)
    counted = contexts.counted
    document = contexts.documents[counted].numpy()
    vocabulary = vocabulary_of(run)
    rows, neurons = [], []
    for layer in layers:
        a = recorded.pop(layer)[counted]
        v = values(run.model, layer)
        next_id = following[counted].numpy()
        for sign, name in SIGNS:
            ten = vocabulary.promoted(sign * v)
            table, triggers = agreement(sign * a, ten, next_id)
            other, _ = agreement(sign * a, ten[permuted(len(ten), config.seed)], next_id)
            where: dict[str, Any] = {"layer": layer, "sign": name, "n": len(table)}
            for column in ("one", "ten"):
                found = mean_over(table[column], document[triggers[:, 0]], seed=config.seed)
                where |= named(f"agreement_{column}", found)
                where[f"null_{column}"] = float(other[column].mean())
            rows.append(where | {"composed": composed(a, v, vocabulary, config)})
            words = vocabulary.words(ten)
            neurons.append(
                pd.DataFrame(
                    {
                        "layer": layer,
                        "neuron": np.arange(len(v)),
                        "sign": name,
                        "promotes": words,
                        "agrees_one": table["one"],
                        "agrees_ten": table["ten"],
                    }
                )
            )
    layer_table = pd.DataFrame(rows)
    return Finding(
        tables={"layers": layer_table, "neurons": pd.concat(neurons, ignore_index=True)},
        figure=lambda: lines(
            layer_table,
            x="layer",
            line="sign",
            columns={"agreement_one": "agreement@1", "agreement_ten": "agreement@10"},
        ),
        text=_text(layer_table),
        headline={
            "agreement@1": round(float(layer_table["agreement_one"].mean()), 5),
            "permuted": round(float(layer_table["null_one"].mean()), 5),
            "composed": round(float(layer_table["composed"].mean()), 4),
        },
    )


def agreement(
    a: Float[Tensor, "token neuron"],
    ten: Int[np.ndarray, "neuron ten"],
    next_id: Int[np.ndarray, "token"],
) -> tuple[dict[str, np.ndarray], Int[np.ndarray, "neuron trigger"]]:
    """Per neuron whether its first token follows its top trigger, and the share of triggers that
    one of its ten follows; and the triggers."""
    triggers = a.topk(min(N_TRIGGERS, len(a)), 0).indices.T.numpy()
    after = next_id[triggers]
    one = (ten[:, 0] == after[:, 0]).astype(float)
    among = (after[:, :, None] == ten[:, None, :]).any(-1).mean(-1)
    return {"one": one, "ten": among}, triggers


def permuted(n: int, seed: int) -> Int[np.ndarray, "n"]:
    """A permutation in which nobody stays."""
    order = np.random.default_rng(seed).permutation(n)
    moved = np.empty(n, dtype=np.int64)
    moved[order] = np.roll(order, 1)
    return moved


def composed(
    a: Float[Tensor, "token neuron"],
    v: Float[Tensor, "neuron d_model"],
    vocabulary: Vocabulary,
    config: Config,
) -> float:
    """Share of tokens whose most promoted token of the layer is no strong neuron's own."""
    chosen = np.random.default_rng(config.seed).permutation(len(a))[: config.n_composed]
    part = a[torch.from_numpy(chosen)]
    whole = vocabulary.promoted(part @ v, 1)[:, 0]
    own = np.stack([vocabulary.promoted(sign * v, 1)[:, 0] for sign, _ in SIGNS])
    strength = part.abs() * v.norm(dim=-1)
    strong = strength.topk(max(1, int(STRONGEST * len(v))), 1).indices.numpy()
    sign = (part < 0).long().numpy()
    said = own[np.take_along_axis(sign, strong, 1), strong]
    return float((said != whole[:, None]).all(1).mean())


def _text(table: pd.DataFrame) -> str:
    said = [
        f"  L{row.layer}, {row.sign}: agreement@1 {ranged(row, 'agreement_one', '.2%')} (permuted "
        f"{row.null_one:.2%}), @10 {row.agreement_ten:.2%} (permuted {row.null_ten:.2%}); the "
        f"layer's token is no strong neuron's own on {row.composed:.0%} of tokens"
        for row in table.itertuples()
    ]
    return (
        "What the paper saw (from memory): no agreement in lower layers, 3.5 % in the upper six of "
        "16; 68 % or more of a layer's\npredictions are no memory's own.\n\n"
        "What this model shows, 95 % intervals over documents:\n" + "\n".join(said)
    )
