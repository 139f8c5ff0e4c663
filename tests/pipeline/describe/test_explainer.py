"""The adapter to a chat model, against a stand-in server on this machine; and the sentence scores
by hand."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from data.store import ActivationStore
from featureflow.errors import UserError
from featureflow.sites import parse_site
from pipeline.cli import run_command
from pipeline.context import RunContext
from pipeline.describe.chat import ChatModel
from pipeline.describe.corpus import HELD_OUT, PARTS
from pipeline.describe.explain import (
    REACH,
    Evidence,
    Windows,
    read_opinions,
    sentence_scores,
    write_opinions,
)
from pipeline.describe.explainer import Detection, detect, explain, fuzz, marked
from pipeline.describe.features import Features
from pipeline.describe.sentences import SentenceModel, embedding_score, example_embedding_score
from pipeline.describe.vocabulary import Vocabulary
from pipeline.run import Run
from pipeline.site.shards import read_shard
from pipeline.stages import atlas as stage
from sae import load_sae


class _Stub(BaseHTTPRequestHandler):
    answer = staticmethod(lambda question: "days of the week")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = type(self).answer(body["messages"][0]["content"])
        content = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def chat(request):
    handler = type(
        "Stub", (_Stub,), {"answer": staticmethod(getattr(request, "param", _Stub.answer))}
    )
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield ChatModel(url=f"http://127.0.0.1:{server.server_address[1]}/v1", model="stub")
    server.shutdown()
    server.server_close()


def says_yes_to_monday(question: str) -> str:
    lines = re.findall(r"^\d+\. (.*)$", question, flags=re.MULTILINE)
    return json.dumps([int("Monday" in line) for line in lines])


@pytest.mark.parametrize(
    "chat",
    [_Stub.answer, lambda q: "<think>Let me\nsee.</think>\n\ndays of the week"],
    indirect=True,
)
def test_an_explanation_is_one_short_line(chat):
    assert explain(chat, ["on <<Monday>>"]) == "days of the week"


@pytest.mark.parametrize(
    "chat",
    [
        lambda q: "",
        lambda q: "Let me think.\nStep 1",
        lambda q: "word " * 100,
        lambda q: "the <<token>>",
        lambda q: None,
        lambda q: "<think>the days of the week",
    ],
    indirect=True,
)
def test_scratch_text_does_not_become_a_label(chat):
    assert explain(chat, ["on <<Monday>>"]) is None


@pytest.mark.parametrize(
    "chat",
    [
        says_yes_to_monday,
        lambda q: f"<think>first I say [1, 0]</think>\n{says_yes_to_monday(q)}",
        lambda q: f"So {says_yes_to_monday(q)}, that is {says_yes_to_monday(q)}.",
    ],
    indirect=True,
)
def test_detection_is_balanced_accuracy_over_windows(chat):
    active = ["see you Monday"] * 6 + ["see you Tuesday"] * 2
    other = ["no day here"] * 11 + ["Monday by mistake"]
    found = detect(chat, "Mondays", active, other)
    assert found.score == pytest.approx((6 / 8 + 11 / 12) / 2, abs=1e-4)
    assert (found.n, found.n_asked) == (20, 20)
    assert found.low < found.score < found.high


@pytest.mark.parametrize(
    "chat",
    [
        lambda q: json.dumps(
            [int("<<Monday>>" in line) for line in re.findall(r"^\d+\. (.*)$", q, re.MULTILINE)]
        )
    ],
    indirect=True,
)
def test_fuzzing_asks_whether_the_marks_fit(chat):
    right, wrong = (
        ["see you <<Monday>>"] * 6,
        ["see <<you>> Monday"] * 5 + ["see you <<Monday>> by mistake"],
    )
    assert fuzz(chat, "Mondays", right, wrong).score == pytest.approx((1 + 5 / 6) / 2, abs=1e-4)


@pytest.mark.parametrize(
    "chat",
    [
        lambda q: "I cannot tell.",
        lambda q: None,
        lambda q: "<think>perhaps [1, 0]",
        lambda q: "a list such as [1, 0], so: [0, 1]",
        lambda q: "[1, 2]",
        lambda q: "[10]",
        lambda q: "[1, 0, 1]",
    ],
    indirect=True,
)
def test_unreadable_answers_give_no_score(chat):
    assert detect(chat, "x", ["a"], ["b"]) == Detection(n=0, n_asked=2)


def answers_every_other_question() -> Callable[[str], str]:
    asked = itertools.count()
    return lambda question: says_yes_to_monday(question) if next(asked) % 2 == 0 else "[1, 0]"


@pytest.mark.parametrize("chat", [answers_every_other_question()], indirect=True)
def test_windows_of_unreadable_answers_count_as_asked_only(chat):
    found = detect(chat, "Mondays", ["see you Monday"] * 10, ["no day here"] * 10)
    assert (found.n, found.n_asked, found.score) == (10, 20, 1.0)


def test_no_server_is_said_so():
    with pytest.raises(UserError, match="did not answer"):
        explain(ChatModel(url="http://127.0.0.1:9/v1", model="none", timeout_s=2), ["a"])
    with pytest.raises(UserError, match="not an http address"):
        explain(ChatModel(url="file:///etc", model="none"), ["a"])


def test_a_character_of_several_tokens_is_shown_whole_and_marked_once():
    third, rest = "⅓".encode(), "é".encode()
    tokens = [b"a ", third[:1], third[1:2], third[2:] + rest[:1], rest[1:], b" cup", b"\xff", b"z"]
    vocabulary = Vocabulary(tokens=tokens, special=frozenset())
    pieces = vocabulary.whole(range(len(tokens)))
    assert pieces == [("a ", 1), ("⅓é", 4), (" cup", 1), ("\ufffd", 1), ("z", 1)]
    assert vocabulary.whole([1, 2]) == [("\ufffd", 2)]
    assert vocabulary.whole([]) == []


def test_marks_surround_the_active_tokens():
    assert marked(["on", " Monday", "."], [0, 2.5, 0]) == "on<< Monday>>."


def test_the_embedding_score_is_the_area_under_the_curve():
    rng = np.random.default_rng(0)
    active, other, label = (
        rng.standard_normal((9, 5)),
        rng.standard_normal((7, 5)),
        rng.standard_normal(5),
    )
    expected = roc_auc_score([1] * 9 + [0] * 7, np.concatenate([active @ label, other @ label]))
    assert embedding_score(label, active, other) == pytest.approx(expected)


def test_the_example_embedding_score_tells_a_tight_group_from_noise():
    rng = np.random.default_rng(0)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    noise = unit(rng.standard_normal((40, 64)))
    group = unit(rng.standard_normal((1, 64)) * 2 + rng.standard_normal((40, 64)) * 0.5)
    assert example_embedding_score(group, noise) > 0.95
    scores = [
        example_embedding_score(unit(rng.standard_normal((20, 64))), noise) for _ in range(20)
    ]
    assert np.mean(scores) == pytest.approx(0.5, abs=0.12)


@pytest.mark.slow
def test_the_packaged_sentence_model_knows_kittens():
    pytest.importorskip("transformers")
    try:
        model = SentenceModel.packaged()
    except UserError:
        pytest.skip("no sentence model installed")
    cat, kitten, stock = model.encode(["a cat", "a kitten", "the stock market"])
    assert cat @ kitten > cat @ stock + 0.3


def evidence_of(root: Path) -> Evidence:
    run = Run.open(root)
    return Evidence(run.features, run.store, run.saes)


def busiest(described: Features) -> str:
    features = described.at("L2")
    return str(features.loc[features["n_documents"].idxmax(), "feature"])


def test_windows_with_a_feature_fire_and_those_without_are_silent_and_both_are_held_out(small_run):
    """Against a dense pass over the whole store."""
    root = small_run.root
    evidence = evidence_of(root)
    feature = busiest(evidence.features)
    latent = int(feature.split("/")[1])
    store = ActivationStore.open(root / "collect" / "store.zarr")
    x = torch.from_numpy(store.read(parse_site("L2"), 0, store.n_rows))
    tokens = evidence.features.tokens
    is_active = (
        load_sae(root / "train" / "dictionaries" / "L2").encode(x)[:, latent] > 0
    ).numpy() & tokens["kept"]
    held = (tokens["part"] == PARTS[HELD_OUT]).to_numpy()
    with_it, without_it = set(), set()
    for row in np.flatnonzero(held & tokens["kept"]):
        near = [
            r
            for r in range(max(0, row - REACH), min(len(tokens), row + REACH + 1))
            if tokens["document"][r] == tokens["document"][row]
            and tokens["position"][r] - tokens["position"][row] == r - row
        ]
        text = evidence.features.vocabulary.join(
            [
                int(t)
                for t in tokens["token"][near]
                if int(t) not in evidence.features.vocabulary.special
            ]
        ).strip()
        (with_it if is_active[near].any() else without_it).add(text)
    windows = evidence.windows(feature)
    assert windows.active
    assert windows.silent
    assert windows.shown
    assert all("<<" in text for text in windows.shown)
    assert set(windows.active) <= with_it
    assert set(windows.silent) <= without_it
    assert set(windows.near) <= without_it


def test_wrong_marks_stand_on_as_many_tokens_of_the_same_text_none_of_them_active(small_run):
    evidence = evidence_of(small_run.root)
    windows = [evidence.windows(f"L2/{latent}") for latent in range(12)]
    pairs = [pair for window in windows for pair in zip(window.right, window.wrong, strict=True)]
    assert len(pairs) > 20
    for right, wrong in pairs:
        assert right.replace("<<", "").replace(">>", "") == wrong.replace("<<", "").replace(
            ">>", ""
        )
        assert right.count("<<") == wrong.count("<<") > 0
        assert not marked_places(right) & marked_places(wrong)


def marked_places(text: str) -> set[int]:
    """Places of the plain text that lie between marks."""
    plain, inside, out = 0, False, set()
    for part in re.split("(<<|>>)", text):
        if part in ("<<", ">>"):
            inside = part == "<<"
            continue
        out |= set(range(plain, plain + len(part))) if inside else set()
        plain += len(part)
    return out


def test_windows_show_characters_of_several_tokens_whole(small_run, monkeypatch):
    """The most frequent pair of tokens becomes the two halves of a character."""
    evidence = evidence_of(small_run.root)
    features = evidence.features
    ids = features.tokens["token"].tolist()
    pairs = Counter(pair for pair in itertools.pairwise(ids) if pair[0] != pair[1])
    (first, second), _ = pairs.most_common(1)[0]
    tokens = list(features.vocabulary.tokens)
    tokens[first], tokens[second] = b"x\xc3", b"\xa9y"
    vocabulary = Vocabulary(tokens=tokens, special=features.vocabulary.special)
    monkeypatch.setitem(vars(features), "vocabulary", vocabulary)
    found = [evidence.windows(f"L2/{latent}") for latent in range(24)]
    texts = [text for w in found for text in (*w.shown, *w.right, *w.wrong)]
    assert any("xéy" in text for text in texts)
    assert not [text for text in texts if re.search("x\ufffd(<<|>>)*\ufffdy", text)]


def test_near_misses_are_among_the_windows_without_the_feature(small_run):
    evidence = evidence_of(small_run.root)
    assert any(evidence.windows(f"L2/{latent}").near for latent in range(24))


def says_yes_to_all(question: str) -> str:
    return (
        "rare words"
        if "have in common" in question
        else says_yes_to_monday(question).replace("0", "1")
    )


@pytest.mark.parametrize("chat", [says_yes_to_all], indirect=True)
def test_the_command_asks_the_endpoint_and_the_atlas_shows_the_answer(small_run, chat, tmp_path):
    root = shutil.copytree(small_run.root, tmp_path / "run")
    digest, feature = small_run.train.digest, busiest(Features.open(root / "describe"))
    where = ["--artifacts", str(tmp_path), "--recipe", "run"]
    words = ["atlas", "explain", feature, *where]
    assert run_command([*words, "--endpoint", chat.url, "--model", "stub"]) == 0
    label = read_opinions(root, digest)[feature]["labels"][0]
    assert (label["text"], label["model"], label["score"]) == ("rare words", "stub", 0.5)
    assert label["fuzz"]["score"] == 0.5  # it says yes to right and to wrong marks
    assert label["fuzz"]["n"] == label["fuzz"]["n_asked"] > 0
    write_opinions(root, digest, {feature: {"examples_score": 0.9}})
    assert read_opinions(root, digest)[feature] == {"labels": [label], "examples_score": 0.9}
    inputs = stage.Inputs(train=small_run.train, link=small_run.link, describe=small_run.describe)
    assert stage.digests_beside(root, vars(inputs)) != stage.digests_beside(
        small_run.root, vars(inputs)
    )
    made = stage.run(stage.Config(), inputs, root / "atlas", RunContext(n_threads=1))
    shown = read_shard(root / "atlas" / "site", "attached/scores").json["features"]
    assert shown == read_opinions(root, digest)
    made.verify()
    assert run_command(words) == 2  # nobody to ask


def test_opinions_of_other_dictionaries_are_not_shown_and_damaged_ones_are_named(tmp_path):
    write_opinions(tmp_path, "one", {"L2/3": {"examples_score": 0.9}})
    assert read_opinions(tmp_path, "two") == read_opinions(tmp_path / "nowhere", "one") == {}
    write_opinions(tmp_path, "two", {"L2/4": {"examples_score": 0.1}})
    assert read_opinions(tmp_path, "two") == {"L2/4": {"examples_score": 0.1}}
    (tmp_path / "opinions.json").write_text("{")
    with pytest.raises(UserError, match=r"opinions\.json"):
        read_opinions(tmp_path, "two")


def test_a_sentence_model_tells_texts_that_belong_together():
    try:
        model = SentenceModel.packaged()
    except UserError:
        pytest.skip("no sentence model is installed")
    food = (
        "Add the butter and stir until golden.",
        "Bake the cake for an hour.",
        "Season the soup with salt.",
    )
    rest = (
        "The court rejected the appeal.",
        "Stars fuse hydrogen in their cores.",
        "The king died without an heir.",
    )
    found = sentence_scores(
        model, Windows(shown=(), active=food, silent=rest), "instructions in recipes"
    )
    assert found["examples_score"] > 0.9
    assert found["label_score"] > 0.9
    assert (
        sentence_scores(model, Windows(shown=(), active=food[:1], silent=rest), None)[
            "examples_score"
        ]
        is None
    )
