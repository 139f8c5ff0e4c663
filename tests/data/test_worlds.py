"""Worlds: what they say is true is true of their text, and of the models written for them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from data.model.language_model import LanguageModel
from data.model.spec import OfWorld
from data.worlds import NEVER, Compiled, Fsm, Maze, Superposed, Variable, World, check_names
from data.worlds.compiling import directions_of
from data.worlds.training import contexts_of, legal_share
from data.worlds.weights import save_weights, shipped_path, untrained
from featureflow.errors import UserError
from featureflow.sites import Site
from pipeline.stages.collect import Config


def truth_of(world: World, ids: np.ndarray) -> dict[str, Variable]:
    return {variable.name: variable for variable in world.truth(ids)}


@pytest.fixture(scope="module")
def compiled() -> LanguageModel:
    return LanguageModel.open(OfWorld(world=Compiled()), dtype="float32")


@pytest.mark.parametrize("world", [Compiled(), Fsm(), Fsm(surface="random"), Maze(), Superposed()])
def test_a_document_fills_a_context_and_comes_back_from_its_tokens(world: World) -> None:
    model = LanguageModel.open(OfWorld(world=world, weights="untrained"), dtype="float32")
    text = next(iter(world.documents(1, 0)))
    ids = model.tokenizer.encode(text)
    assert len(ids) == world.n_context - 1
    assert model.tokenizer.decode(ids).split() == text.split() == world.text_of(ids)
    assert list(world.documents(2, 0)) == list(world.documents(2, 0))


def test_the_truth_of_a_text_read_by_hand() -> None:
    world = Compiled()
    words = ["ant", "bee", "(", "ant", "(", "bee", ")", "ant"]
    ids = contexts_of(world, [" ".join(words)])
    found = {
        name: ["-" if v == NEVER else var.names[v] for v in var.value[0, 1:]]
        for name, var in truth_of(world, ids).items()
    }
    assert found["token"] == words
    assert found["previous"] == ["-", *words[:-1]]
    assert found["depth"] == ["0", "0", "1", "1", "2", "2", "1", "1"]
    assert found["induction"] == ["-", "-", "-", "bee", "ant", "(", "-", "("]
    assert found["first"] == ["-", "1", "-", "-", "-", "-", "-", "-"]  # ant is 0, bee is 1
    assert found["second"] == ["-", "1", "-", "-", "-", "-", "-", "-"]
    assert found["moved"] == ["-", "-", "1", "-", "-", "-", "-", "-"]


def test_compiled_activations_are_the_truth_at_every_layer(compiled: LanguageModel) -> None:
    world = Compiled()
    ids = contexts_of(world, list(world.documents(64, 3)))
    seen = compiled.activations(
        torch.from_numpy(ids), [Site(layer, "resid_post") for layer in range(6)]
    )
    for name, variable in truth_of(world, ids).items():
        directions = directions_of(world)[name]
        value = torch.from_numpy(variable.value)
        wanted = torch.nn.functional.one_hot(value.clamp(min=0), len(directions)).float()
        wanted[value == NEVER] = 0
        for site, x in seen.items():
            read = (x @ directions.T)[:, 1:]
            if variable.known_at(site.layer):
                assert torch.allclose(read, wanted[:, 1:], atol=1e-3), (name, site)
            else:
                assert not torch.allclose(read, wanted[:, 1:], atol=0.5), (name, site)


def test_the_compiled_model_says_what_followed_before(compiled: LanguageModel) -> None:
    world = Compiled()
    ids = contexts_of(world, list(world.documents(64, 4)))
    said = compiled.logits(torch.from_numpy(ids)).argmax(-1).numpy()
    truth = truth_of(world, ids)
    induction, depth = truth["induction"].value, truth["depth"].value
    known = induction != NEVER
    closing, opening = world.words.index(")"), world.words.index("(")
    illegal = ((induction == closing) & (depth == 0)) | (
        (induction == opening) & (depth == world.max_depth)
    )
    assert (said[known & ~illegal] - 1 == induction[known & ~illegal]).all()
    assert (said[known & illegal] - 1 != induction[known & illegal]).all()


@pytest.mark.parametrize("surface", ["digits", "random"])
def test_every_step_of_the_walk_is_one_that_its_truth_allows(surface: str) -> None:
    world = Fsm(surface=surface)
    ids = contexts_of(world, list(world.documents(20, 0)))
    truth = truth_of(world, ids)
    state, current, before = (truth[n].value for n in ("state", "current", "before"))
    for row in range(len(ids)):
        path = state[row, 2::2]
        assert (path != NEVER).all()
        for i, (one, other) in enumerate(pairwise(path)):
            ways = world.continuations("state", int(one), ids[row])
            assert len(ways) == len(set(ways)) == world.n_successors
            at = 2 * i + 4  # the second word of `other`
            assert tuple(world.text_of(ids[row, at - 1 : at + 1].tolist())) in ways
            assert before[row, at] == current[row, at - 1] == one
            assert state[row, at] == other
    assert (np.diff(np.unique(state[:, 2::2])) >= 1).all()
    assert (state[:, 1::2] == NEVER).all()


def test_every_path_of_a_maze_follows_its_edges_to_the_goal() -> None:
    world = Maze()
    texts = [text.split() for text in world.documents(30, 0)]
    ids = contexts_of(world, [" ".join(words) for words in texts])
    truth = truth_of(world, ids)
    edges = [variable.value[:, -1] for name, variable in truth.items() if name.startswith("edge")]
    assert len(edges) == 24, "2 n (n - 1) pairs of neighbours"
    assert (np.sum(edges, axis=0) == 15).all(), "a spanning tree"
    for row, words in enumerate(texts):
        at = words.index("path")
        joined = {frozenset(words[i : i + 3 : 2]) for i in range(0, words.index("from"), 4)}
        walk = words[at + 1 : words.index("end")]
        assert (walk[0], walk[-1]) == (words[at - 3], words[at - 1])
        assert all(frozenset(pair) in joined for pair in pairwise(walk))
        assert len(set(walk)) == len(walk)
        for place, (cell, after) in enumerate(zip(walk, [*walk[1:], "end"], strict=True), at + 2):
            position = int(truth["position"].value[row, place])
            nearest = int(truth["next"].value[row, place])
            assert world.words[position] == cell
            assert nearest == (NEVER if after == "end" else world.words.index(after))
            assert (after,) in world.continuations("position", position, ids[row, :place])


def test_no_word_of_the_random_surface_gives_a_state_away() -> None:
    world = Fsm(surface="random")
    first = {world.spelling(world.truth(np.zeros((1, 9), int))[1], s)[0] for s in range(100)}
    assert len(first) < 27  # a hundred states, so a first word has several


def test_superposed_activations_are_their_units_and_nothing_else() -> None:
    world = Superposed(noise=0.0)
    ids = world.ids(40)
    layers = world.activations(40)
    truth, directions = truth_of(world, ids), world.directions()
    fates = {
        "born late": [v for v in truth.values() if v.born > 0],
        "dies": [v for v in truth.values() if v.dies is not None],
        "heirs": [v for v in truth.values() if v.heirs],
    }
    assert all(fates.values())
    for layer, x in enumerate(layers):
        known = [name for name, v in truth.items() if v.known_at(layer)]
        assert set(known) == {name for name, by_layer in directions.items() if layer in by_layer}
        on = np.stack([truth[name].value.ravel() >= 0 for name in known], axis=1)
        rows = np.flatnonzero((on.sum(1) > 0) & (on.sum(1) <= 6))[:200]
        for row in rows:
            basis = np.stack([directions[name][layer] for name in np.array(known)[on[row]]])
            strength, _rest, *_ = np.linalg.lstsq(basis.T, x[row], rcond=None)
            assert np.abs(basis.T @ strength - x[row]).max() < 1e-4
            assert (strength > 0).all()
        silent = on.sum(1) == 0
        assert np.abs(x[silent]).max(initial=0) == 0


def test_more_contexts_begin_with_the_same_ones() -> None:
    world = Superposed()
    assert (world.ids(12)[:5] == world.ids(5)).all()
    whole, part = world.truth(world.ids(12)), world.truth(world.ids(12)[7:], start=7)
    for one, other in zip(whole, part, strict=True):
        assert (one.value[7:] == other.value).all()


@pytest.mark.parametrize(
    ("kind", "options", "told"),
    [
        ("fsm", {"n_states": 10, "n_successors": 10}, "any state could follow any other"),
        ("fsm", {"n_states": 101}, "cannot be spelt by two digits words: at most 100"),
        ("compiled", {"length": 49}, "less than or equal to 48"),
        ("superposed", {"n_features": 300}, "more than 4 x d_model"),
        ("superposed", {"n_features": 20}, "more than a quarter"),
    ],
)
def test_impossible_sizes_are_told(kind: str, options: dict, told: str) -> None:
    problems: list = []
    assert OfWorld.read({"world": {"kind": kind, **options}}, "model", problems) is None
    assert told in str(problems[0])


def test_unknown_variables_and_weights_by_hand_are_told(tmp_path: Path) -> None:
    world = Compiled()
    with pytest.raises(UserError, match="no such variable") as caught:
        check_names(["depth", "colour"], world.truth(np.zeros((1, 32), int)))
    assert caught.value.problems[0].found == "colour"
    with pytest.raises(UserError, match="written by hand"):
        LanguageModel.open(OfWorld(world=world, weights=str(tmp_path / "my.safetensors")))


def test_model_and_text_of_two_worlds_do_not_go_together() -> None:
    one, other = {"kind": "world", "world": "compiled"}, {"kind": "world", "world": "fsm"}
    told = _refused({"model": one, "corpus": other, "n_context": 32})
    assert "the model is of the world compiled, the corpus is not the same" in told
    assert "a context of 32 tokens: n_context is 64" in _refused(
        {"model": one, "corpus": one, "n_context": 64}
    )
    assert "no such kind" in _refused({"model": {"kind": "world", "world": "mazes"}})


def _refused(raw: dict) -> str:
    problems: list = []
    assert Config.read(raw, "collect", problems) is None
    return str(problems[0])


def test_weights_of_another_generator_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "fsm.safetensors"
    save_weights(untrained(Fsm()), Fsm(seed=1), path, note="a test")
    with pytest.raises(UserError, match="do not match the world fsm") as caught:
        LanguageModel.open(OfWorld(world=Fsm(), weights=str(path)))
    assert caught.value.problems[0].expected == Fsm().identity[:12]
    assert "featureflow world train fsm" in str(caught.value)
    save_weights(untrained(Compiled()), Fsm(), path, note="a test")
    with pytest.raises(UserError, match="do not match") as caught:
        LanguageModel.open(OfWorld(world=Fsm(), weights=str(path)))
    assert len(caught.value.problems) > 1, "all problems at once"
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match="cannot be read"):
        LanguageModel.open(OfWorld(world=Fsm(), weights=str(path)))


def test_the_shipped_weights_are_of_this_generator_and_walk_legally() -> None:
    world = Fsm()
    assert shipped_path(world).stat().st_size <= 1_000_000
    model = LanguageModel.open(OfWorld(world=world), dtype="float32")  # refuses another generator
    assert legal_share(model.hf, world, n_places=150) > 0.9
    assert legal_share(untrained(world).eval(), world, n_places=150) < 0.3
