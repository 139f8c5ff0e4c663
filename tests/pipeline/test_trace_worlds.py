"""A trace of the compiled world names the variables that decide, on the tokens where they stand."""

from __future__ import annotations

import torch

from data.model.language_model import LanguageModel
from data.model.spec import OfWorld
from data.worlds import Compiled
from data.worlds.compiling import directions_of
from featureflow.sites import Site
from pipeline.trace.stream import Target
from pipeline.trace.trace import TraceOptions, trace_of
from sae import Sae
from sae.activations import Threshold

NOT_HELD = "second"  # has the directions of `previous`


def true_features(world: Compiled) -> tuple[list[str], Sae]:
    """Every value of every variable is a latent: its name, and the dictionary."""
    names, rows = [], []
    for variable, directions in directions_of(world).items():
        if variable != NOT_HELD:
            values = world.words if len(directions) == len(world.words) else range(len(directions))
            names += [f"{variable}={value}" for value in values]
            rows.append(directions.float())
    W = torch.cat(rows)
    zero = torch.zeros(W.shape[1])
    theta = torch.full((len(W),), 0.5)
    sae = Sae(
        W_enc=W,
        b_enc=torch.zeros(len(W)),
        W_dec=W,
        b_dec=zero,
        b_in=zero,
        activation=Threshold(theta=theta),
    )
    return names, sae


def test_induction_is_traced_to_the_match_to_what_followed_and_to_the_present_token():
    """cat bee ( dog ant cat → bee: after block 0 the present token, and on the token after the
    earlier cat what it is and what stands before it; from block 1 on the variable `induction`. The
    attention is saturated: the match has a gradient of 0, and only its removal finds it."""
    world = Compiled()
    model = LanguageModel.open(OfWorld(world=world), dtype="float32")
    names, sae = true_features(world)
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode("cat bee ( dog ant cat")]
    assert len(ids) == 7
    logits = model.logits(torch.tensor([ids]))[0, -1]
    (bee,), (hen,) = (model.tokenizer.encode(word) for word in (" bee", " hen"))
    assert int(logits.argmax()) == bee
    cuts = [Site(layer, "resid_post") for layer in range(6)]
    found = trace_of(
        model,
        dict.fromkeys(cuts, sae),
        ids,
        target=Target(answer=bee, foil=hen),
        cuts=cuts,
        flows={},
        options=TraceOptions(share=1.0, n_removed=400, n_shown=6),
    )
    effect = {
        (row.first_layer, names[int(row.features.split("/")[1])], row.token): row.removed
        / found.traced.y
        for row in found.supernodes.itertuples()
    }
    causes = {
        (0, "token=cat", 6),
        (0, "token=bee", 2),
        (0, "previous=cat", 2),
        *((layer, "induction=bee", 6) for layer in range(1, 6)),
    }
    strong = {node for node, share in effect.items() if abs(share) > 0.5}
    assert strong == causes, sorted(effect.items(), key=lambda each: -abs(each[1]))[:14]
    assert all(abs(share) < 0.1 for node, share in effect.items() if node not in causes)
    differs = found.supernodes.set_index(["first_layer", "features", "token"])["differs"]
    assert differs[0, f"L0/{names.index('previous=cat')}", 2]
    number = {
        (row.first_layer, names[int(row.features.split("/")[1])], row.token): row.supernode
        for row in found.supernodes.itertuples()
    }
    edges = {(e.source, e.target): e.removed for e in found.edges.itertuples()}
    written = number[1, "induction=bee", 6]
    strength = edges[number[0, "previous=cat", 2], written]
    assert strength > 0.5 * found.traced.y
    assert edges[number[0, "token=cat", 6], written] > 0.5 * found.traced.y
    assert edges[number[0, "token=bee", 2], written] > 0.5 * found.traced.y
