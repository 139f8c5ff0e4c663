"""The adapter to a chat model, against a stand-in server on this machine; and the sentence scores by hand."""

from __future__ import annotations

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from pipeline.atlas.explainer import ChatModel, detect, explain, marked
from pipeline.atlas.sentences import SentenceModel, embedding_score, example_embedding_score
from sae.errors import UserError


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
    handler = type("Stub", (_Stub,), {"answer": staticmethod(getattr(request, "param", _Stub.answer))})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield ChatModel(url=f"http://127.0.0.1:{server.server_address[1]}/v1", model="stub")
    server.shutdown()
    server.server_close()


def says_yes_to_monday(question: str) -> str:
    lines = re.findall(r"^\d+\. (.*)$", question, flags=re.MULTILINE)
    return json.dumps([int("Monday" in line) for line in lines])


def test_an_explanation_is_one_short_line(chat):
    assert explain(chat, ["on <<Monday>>"]) == "days of the week"


@pytest.mark.parametrize(
    "chat",
    [lambda q: "", lambda q: "Let me think.\nStep 1", lambda q: "word " * 100, lambda q: "the <<token>>"],
    indirect=True,
)
def test_scratch_text_does_not_become_a_label(chat):
    assert explain(chat, ["on <<Monday>>"]) is None


@pytest.mark.parametrize("chat", [says_yes_to_monday], indirect=True)
def test_detection_is_balanced_accuracy_over_windows(chat):
    firing = ["see you Monday"] * 6 + ["see you Tuesday"] * 2
    other = ["no day here"] * 11 + ["Monday by mistake"]
    found = detect(chat, "Mondays", firing, other)
    assert found.score == pytest.approx((6 / 8 + 11 / 12) / 2, abs=1e-4)
    assert found.n == 20
    assert found.low < found.score < found.high


@pytest.mark.parametrize("chat", [lambda q: "I cannot tell."], indirect=True)
def test_unreadable_answers_give_no_score(chat):
    assert detect(chat, "x", ["a"], ["b"]) is None


def test_no_server_is_said_so():
    with pytest.raises(UserError, match="did not answer"):
        explain(ChatModel(url="http://127.0.0.1:9/v1", model="none", timeout_s=2), ["a"])
    with pytest.raises(UserError, match="not an http address"):
        explain(ChatModel(url="file:///etc", model="none"), ["a"])


def test_marks_surround_the_firing_tokens():
    assert marked(["on", " Monday", "."], [0, 2.5, 0]) == "on<< Monday>>."


def test_the_embedding_score_is_the_area_under_the_curve():
    rng = np.random.default_rng(0)
    firing, other, label = rng.standard_normal((9, 5)), rng.standard_normal((7, 5)), rng.standard_normal(5)
    expected = roc_auc_score([1] * 9 + [0] * 7, np.concatenate([firing @ label, other @ label]))
    assert embedding_score(label, firing, other) == pytest.approx(expected)


def test_the_example_embedding_score_tells_a_tight_group_from_noise():
    rng = np.random.default_rng(0)

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    noise = unit(rng.standard_normal((40, 64)))
    group = unit(rng.standard_normal((1, 64)) * 2 + rng.standard_normal((40, 64)) * 0.5)
    assert example_embedding_score(group, noise) > 0.95
    scores = [example_embedding_score(unit(rng.standard_normal((20, 64))), noise) for _ in range(20)]
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
