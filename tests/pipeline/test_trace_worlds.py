"""A trace of a world names the variables that decide, on the tokens where they stand."""

from __future__ import annotations

import torch

from data.model.language_model import LanguageModel
from data.model.spec import OfWorld
from data.worlds import Compiled, Fsm
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


def fitted(world: Fsm, model: LanguageModel) -> tuple[list[str], dict[Site, Sae]]:
    """Digits (at the embedding) and states (after the first two blocks) as latents of a trained
    model: directions by least squares of the stream on what is true, readings by linear regression,
    so that a latent is about 1 where its value is true and about 0 elsewhere."""
    ids = torch.tensor(
        [[model.tokenizer.bos_id, *model.tokenizer.encode(d)] for d in world.documents(200, 7)]
    )
    names, columns = [], []
    for variable in world.truth(ids.numpy())[:2]:
        names += [f"{variable.name}={name}" for name in variable.names]
        columns += [torch.tensor(variable.value == k)[:, 1:] for k in range(len(variable.names))]
    whole, n_words = torch.stack(columns, -1).flatten(0, 1).double(), len(world.words)
    cuts = [Site(0, "resid_pre"), Site(0, "resid_post"), Site(1, "resid_post")]
    with torch.no_grad():
        seen = model.activations(ids, cuts)
    saes = {}
    for cut in cuts:
        h = seen[cut][:, 1:].flatten(0, 1).double()
        true = whole[:, :n_words] if cut.kind == "resid_pre" else whole
        mean, share = h.mean(0), true.mean(0)
        *rows, bias = torch.linalg.lstsq(
            torch.cat([true, torch.ones(len(true), 1).double()], 1), h
        ).solution
        spread = (h - mean).T @ (h - mean) / len(h) + 1e-4 * torch.eye(h.shape[1])
        read = torch.linalg.solve(spread, (h - mean).T @ (true - share) / len(h)).T
        pre = (h - mean) @ read.T
        low = (pre * (1 - true)).sum(0) / (1 - true).sum(0)
        scale = 1 / ((pre * true).sum(0) / true.sum(0) - low)
        saes[cut] = Sae(
            W_enc=(read * scale[:, None]).float(),
            b_enc=(-low * scale).float(),
            W_dec=torch.stack(rows).float(),
            b_dec=bias.float(),
            b_in=mean.float(),
            activation=Threshold(theta=torch.full((true.shape[1],), 0.5)),
        )
    return names, saes


def test_a_walk_is_traced_to_its_state_and_the_state_to_its_two_digits():
    """After the second digit of a state what follows hangs on the state: its latent on the last
    token is the strongest after both blocks, and before them the digits are, each where it is
    written (both of them in at least three of four prompts)."""
    world = Fsm()
    model = LanguageModel.open(OfWorld(world=world), dtype="float32")
    names, saes = fitted(world, model)
    both = []
    for text in world.documents(4, 99):
        words = text.split()[:8]
        ids = [model.tokenizer.bos_id, *model.tokenizer.encode(" ".join(words))]
        order = model.logits(torch.tensor([ids]))[0, -1].argsort(descending=True).tolist()
        found = trace_of(
            model,
            saes,
            ids,
            target=Target(answer=order[0], foil=order[-1]),
            cuts=list(saes),
            flows={},
            options=TraceOptions(share=1.0, n_removed=30, n_shown=2),
        )
        best = {
            cut: [
                (names[int(row.features.split("/")[1])], row.token)
                for row in here.head(2).itertuples()
            ]
            for cut, here in found.supernodes.groupby("peak")
        }
        state = f"state={words[6]}-{words[7]}"
        assert best["L0"][0] == best["L1"][0] == (state, 8), best
        digits = {(f"word={words[6]}", 7), (f"word={words[7]}", 8)}
        assert set(best["L0.pre"]) & digits, best
        both.append(set(best["L0.pre"]) == digits)
    assert sum(both) >= 3, both
