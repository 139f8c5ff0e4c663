"""The tools of `featureflow steer` on a small model's artifacts: plans from features, from texts,
by hand; exports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import torch

from featureflow.errors import UserError
from featureflow.sites import Site, parse_feature
from pipeline.cli import run_command
from pipeline.context import RunContext
from pipeline.flow.options import Fixed
from pipeline.lenses.steering.contrast import telling_tokens
from pipeline.run import Run
from pipeline.stages import link
from pipeline.steering_run import Steering
from steering.features import rank_features, read_texts
from steering.hooks import applied
from steering.plan_files import plan_document, read_plan, write_plan

TOPICAL = [
    f"the {food} was cooked with {spice} in the kitchen"
    for food in ("soup", "bread", "rice")
    for spice in ("salt", "pepper")
]
OTHER = [
    f"the {thing} was seen with {person} in the {place}"
    for thing in ("train", "storm", "game")
    for person, place in (("him", "city"), ("her", "north"))
]


@pytest.fixture(scope="module")
def steering(inputs) -> Steering:
    return Run.open(inputs.collect.path.parent).steering


@pytest.fixture
def steer(inputs, tmp_path, capsys):
    """Runs `featureflow steer …` on the artifacts; words with a dot are files of the test's folder.
    Gives what is printed."""
    root = inputs.collect.path.parent
    (tmp_path / "topical.txt").write_text("\n".join(TOPICAL), encoding="utf-8")
    (tmp_path / "other.txt").write_text("\n\n".join(OTHER) + "\n", encoding="utf-8")

    def run(*words: str, fails: bool = False) -> str:
        placed = [
            str(tmp_path / word) if re.fullmatch(r"[a-z]+\.[a-z]+", word) else word
            for word in words
        ]
        code = run_command(
            ["steer", *placed, "--artifacts", str(root.parent), "--recipe", root.name]
        )
        printed = "".join(capsys.readouterr())
        assert (code != 0) == fails, printed
        assert "internal error" not in printed
        return printed

    return run


def lasting_feature(steering) -> str:
    nodes = steering.graph.nodes
    here = nodes[(nodes["kind"] == "resid_post") & nodes["alive"] & (nodes["layer"] == 2)]
    return f"L2/{int(here.sort_values('density')['latent'].iloc[-1])}"


def prompt_for(steering, store, feature: str) -> str:
    """Held-out text up to the token on which the feature is most active."""
    at, first = parse_feature(feature), store.validation_start
    x = torch.from_numpy(store.read(at.site, first, store.n_rows))
    codes = steering.saes[at.site].encode(x)
    row = first + int(codes[:, at.latent].argmax())
    begin = row - row % store.n_context
    ids = [int(i) for i in store.tokens().id[begin : row + 1]]
    return steering.model.tokenizer.decode(ids[max(1, len(ids) - 24) :])


@pytest.fixture(scope="module")
def linked_through(inputs, tmp_path_factory) -> Path:
    """The same run with every link kept, so that features have flows; of a small random model
    hardly any is."""
    root = tmp_path_factory.mktemp("linked")
    for stage in ("collect", "train", "describe"):
        (root / stage).symlink_to(getattr(inputs, stage).path)
    config = link.Config(
        functional_tokens=1024, n_null=500, thresholds=Fixed(residual=0.0, modules=0.0)
    )
    link.run(
        config,
        link.Inputs(collect=inputs.collect, train=inputs.train),
        root / "link",
        RunContext(n_threads=1),
    )
    return root


def test_a_feature_is_removed_along_its_flow_and_readers_say_what_is_left(
    linked_through, steering, tmp_path, capsys
):
    feature = lasting_feature(steering)
    where = ["--artifacts", str(linked_through.parent), "--recipe", linked_through.name]
    out = ["--out", str(tmp_path / "a.toml")]
    assert run_command(["steer", "remove", feature, *out, *where]) == 0
    printed = capsys.readouterr().out
    made = read_plan(tmp_path / "a.toml")
    flow = Run.open(linked_through).graph.chain(feature, backward=False)
    assert [node.at for node in made.nodes] == [str(step.feature) for step in flow]
    assert made.edit.kind == "ablate"
    assert made.strength == 1
    assert "left, probe end" in printed
    assert "KL, before" in printed

    gated = ["--every", "2", "--where-active", "--unread"]
    run_command(["steer", "remove", feature, *gated, *out, *where])
    made = read_plan(tmp_path / "a.toml")
    assert [node.at for node in made.nodes] == [str(step.feature) for step in flow[::2]]
    assert made.scope.model_dump()["feature"] == feature
    assert "left" not in capsys.readouterr().out


def test_a_plan_is_designed_from_texts_and_says_what_it_should_do_and_does(
    steer, steering, tmp_path
):
    common = ["--texts", "topical.txt", "--against", "other.txt", "--dose", "0.05"]
    printed = steer("design", *common, "--k", "3", "--out", "a.toml")
    made = read_plan(tmp_path / "a.toml")
    assert 1 <= len(made.nodes) <= 3
    assert made.dose == pytest.approx(0.05, rel=0.06)
    assert made.digests == steering.digests
    assert all(node.weight > 0 for node in made.nodes)
    assert sum(node.weight for node in made.nodes) == pytest.approx(1)
    assert "predicted  measured" in printed
    assert "topical less other" in printed
    rows = {line[:36].strip(): line[36:].split() for line in printed.splitlines()}
    predicted, measured = map(float, rows["its words of 100, steered"])
    unsteered = float(rows["its words of 100, unsteered"][1])
    assert predicted > unsteered
    assert measured > unsteered

    steer("design", "--words", "the,of", "--layers", "3", "--dose", "0.05", "--out", "a.toml")
    assert {node.site.layer for node in read_plan(tmp_path / "a.toml").nodes} == {3}
    steer("design", "--words", "the,of", "--dense", "--dose", "0.05", "--out", "a.json")
    assert [node.vector is not None for node in read_plan(tmp_path / "a.json").nodes] == [True]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--texts", "topical.txt", "--against", "topical.txt"], "texts in both sets"),
        (["--texts", "topical.txt"], "belong together"),
        (["--texts", "topical.txt", "--against", "few.txt"], "too few texts"),
        (["--words", "xylophonically"], "one token"),
        (["--words", "the", "--dose", "500"], "no strength of this plan gives 500 nats"),
        (["--words", "the", "--layers", "7-9"], "no layer that is sketched"),
        (["--words", "the", "--layers", "a-b"], "a span such as"),
        (["--feature", "L2/9999"], "9999"),
        ([], "give one of"),
    ],
)
def test_what_cannot_be_designed_is_said(steer, tmp_path, words, told):
    (tmp_path / "few.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert told in steer("design", *words, "--out", "a.toml", fails=True)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["L2/9999"], "9999"),
        (["L9/1"], "L9"),
        (["L2/1", "--every", "0"], "every n-th"),
        (["nonsense"], "nonsense"),
    ],
)
def test_what_cannot_be_removed_is_said(steer, words, told):
    assert told in steer("remove", *words, "--out", "a.toml", fails=True)


def test_a_plan_along_a_flow_shares_its_strength_by_the_schedule(
    linked_through, steering, tmp_path
):
    words = ["--before", "1", "--after", "1", "--dose", "0.05", "--out", str(tmp_path / "a.toml")]
    where = ["--artifacts", str(linked_through.parent), "--recipe", linked_through.name]
    assert (
        run_command(
            ["steer", "plan", lasting_feature(steering), "--schedule", "linear", *words, *where]
        )
        == 0
    )
    made = read_plan(tmp_path / "a.toml")
    assert [node.site.layer for node in made.nodes] == [1, 2, 3]
    assert [node.weight for node in made.nodes] == pytest.approx([2 / 3, 1 / 3, 0])


def test_a_plan_of_a_feature_has_the_edit_and_dose_asked_for(steer, steering, tmp_path):
    feature = lasting_feature(steering)
    steer("plan", feature, "--before", "1", "--after", "1", "--dose", "0.05", "--out", "a.toml")
    made = read_plan(tmp_path / "a.toml")
    assert made.edit.kind == "add"
    assert made.dose == pytest.approx(0.05, rel=0.06)
    steer(
        "plan", feature, "--along", "layer", "--edit", "cap", "--strength", "1", "--out", "b.toml"
    )
    cap = read_plan(tmp_path / "b.toml")
    assert (cap.edit.kind, cap.strength, cap.dose, [node.at for node in cap.nodes]) == (
        "cap",
        1.0,
        None,
        [feature],
    )
    assert "no strength of this plan" in steer(
        "plan", feature, "--edit", "ablate", "--dose", "5", "--out", "c.toml", fails=True
    )


def test_a_plan_from_texts_follows_a_feature_that_tells_them_apart(steer, steering, tmp_path):
    for by in ("auroc", "d-prime"):
        said = steer(
            "contrast", "topical.txt", "other.txt", "--by", by, "--dose", "0.05", "--out", "p.toml"
        )
        shares = [float(found) for found in re.findall(r"([-\d.]+)% of a push", said)]
        assert shares == sorted(shares, reverse=True)
        assert ("features read the topic rather than write it" in said) == (shares[0] < 1)
        made = read_plan(tmp_path / "p.toml")
        best = re.search(r"(L\d+/\d+)  AUROC", said)[1]
        assert best in [node.at for node in made.nodes]
        assert made.dose == pytest.approx(0.05, rel=0.06)


def test_features_are_ranked_as_asked(steer, steering, tmp_path):
    """On texts that no feature tells apart, so that AUROC and d′ have different favourites."""
    one, other = [*TOPICAL[:3], *OTHER[3:]], [*TOPICAL[3:], *OTHER[:3]]
    (tmp_path / "one.txt").write_text("\n".join(one), encoding="utf-8")
    (tmp_path / "rest.txt").write_text("\n".join(other), encoding="utf-8")
    states = read_texts(steering.model, steering.saes, [*one, *other])
    is_topic = [True] * len(one) + [False] * len(other)

    def favourites(n: int) -> dict[str, set[str]]:
        ranked = {"auroc": rank_features(states, is_topic, n_best=n)}
        ranked["d-prime"] = rank_features(states, is_topic, n_best=n, by="d_prime")
        return {by: {str(contrast.feature) for contrast in found} for by, found in ranked.items()}

    n = next(n for n in range(1, 6) if favourites(n)["auroc"] != favourites(n)["d-prime"])
    for by, expected in favourites(n).items():
        said = steer(
            "contrast", "one.txt", "rest.txt", "--by", by, "--candidates", str(n), "--out", "p.toml"
        )
        assert set(re.findall(r"(L\d+/\d+)  AUROC", said)) == expected


def test_a_difference_of_means_is_the_difference_of_the_mean_vectors(steer, steering, tmp_path):
    steer(
        "contrast",
        "topical.txt",
        "other.txt",
        "--by",
        "difference",
        "--layers",
        "1,3",
        "--dose",
        "0.05",
        "--out",
        "d.safetensors",
    )
    made = read_plan(tmp_path / "d.safetensors")
    states = read_texts(
        steering.model, dict.fromkeys([Site(3, "resid_post")], None), [*TOPICAL, *OTHER]
    )
    vectors = states.vectors[Site(3, "resid_post")]
    expected = vectors[: len(TOPICAL)].mean(0) - vectors[len(TOPICAL) :].mean(0)
    found = made.vectors["difference_L3"]
    assert float(found @ expected / expected.norm()) == pytest.approx(1.0, abs=1e-5)
    assert [node.site.layer for node in made.nodes] == [1, 3]
    assert "no dictionary at a layer" in steer(
        "contrast",
        "topical.txt",
        "other.txt",
        "--by",
        "difference",
        "--layers",
        "1,99",
        "--out",
        "e.toml",
        fails=True,
    )


def test_words_of_the_topic_tell_and_shared_words_do_not(steering):
    class Words:
        """Whole words as tokens."""

        known = sorted({word for text in [*TOPICAL, *OTHER] for word in text.split()})

        def encode(self, text):
            return [self.known.index(word) for word in text.split()]

        def decode(self, ids):
            return f" {self.known[ids[0]]}"

    words = [Words.known[token] for token in telling_tokens(Words(), TOPICAL, OTHER)]
    assert {"cooked", "kitchen", "soup", "salt"} <= set(words)
    assert not {"the", "was", "with", "train", "storm"} & set(words)


def test_a_plan_written_by_hand_is_calibrated_and_changes_what_is_written(
    steer, steering, tmp_path
):
    feature = lasting_feature(steering)
    by_hand = f'''
schema = 1
strength = 1.0
[edit]
kind = "add"
[scope]
kind = "generated"
[[nodes]]
at = "{feature}"
'''
    (tmp_path / "hand.toml").write_text(by_hand, encoding="utf-8")
    said = steer("calibrate", "hand.toml", "--dose", "0.1", "--out", "full.toml", fails=True)
    assert (
        "no strength" in said
    )  # neutral text is all prompt: a plan for generated tokens has no dose there
    (tmp_path / "hand.toml").write_text(
        by_hand.replace("generated", "everywhere"), encoding="utf-8"
    )
    steer("calibrate", "hand.toml", "--dose", "0.1", "--out", "full.toml")
    made = read_plan(tmp_path / "full.toml")
    assert made.dose == pytest.approx(0.1, rel=0.06)
    assert made.model == steering.model.fingerprint
    said = steer("generate", "full.toml", "-n", "2", "--tokens", "6", "--log-probs")
    assert said.count("unsteered") == said.count("steered  ") == 2
    samples = steering.sample("I think", [None, made], n_samples=2, n_new_tokens=6)
    told = [
        f"{value:.2f}" for sample in (*samples[0::2], *samples[1::2]) for value in sample.log_probs
    ]
    assert re.findall(r":(-?\d+\.\d\d)(?= |$)", said, re.MULTILINE) == told
    touched, seen = map(int, re.search(r"changed (\d+) of (\d+)", said).groups())
    assert touched == seen > 0
    streamed = steer("generate", "full.toml", "--stream", "--tokens", "6", "--temperature", "0")
    greedy = steering.sample("I think", [made], n_new_tokens=6, temperature=0)[0]
    assert streamed.splitlines()[0] == ("I think" + greedy.text).splitlines()[0]


def test_plans_of_other_dictionaries_or_models_are_refused(steer, steering, tmp_path):
    plan = steering.plan(lasting_feature(steering), dose=None)
    for changed, word in (
        (replace(plan, digests={"dictionaries": "0" * 64}), "other dictionaries"),
        (replace(plan, model="0" * 64), "another model"),
    ):
        write_plan(changed, tmp_path / "bad.toml")
        for words in (
            ("generate", "bad.toml"),
            ("export", "bad.toml", "x.gguf"),
            ("calibrate", "bad.toml", "--out", "y.toml"),
        ):
            assert word in steer(*words, fails=True)
    with (
        pytest.raises(UserError, match="does not fit"),
        applied(steering.model, steering.saes, replace(plan, model="0" * 64)),
    ):
        pass


def test_a_plan_sent_to_the_endpoint_is_held_against_the_runs_saes(inputs, steering, monkeypatch):
    """As a document, a plan's own digest of its SAEs is all that tells them apart."""
    plan = steering.plan(lasting_feature(steering), along="layer", dose=None)
    others = (plan, replace(plan, digests={"dictionaries": "0" * 64}))
    answers = []

    def asked(server) -> None:
        with server.running() as address:
            for each in others:
                body = {"prompt": "I", "max_tokens": 2}
                body["steering"] = {"document": plan_document(each)}
                answers.append(httpx.post(f"{address}/v1/completions", json=body, timeout=60))

    monkeypatch.setattr("pipeline.cli.serving.serve_until_interrupted", asked)
    root = inputs.collect.path.parent
    where = ["--artifacts", str(root.parent), "--recipe", root.name]
    assert run_command(["serve", "--port", "0", *where]) == 0
    assert [each.status_code for each in answers] == [200, 400]
    assert "other dictionaries" in answers[1].json()["error"]["message"]


def test_exports_by_suffix(steer, steering, tmp_path):
    feature = lasting_feature(steering)
    steer("plan", feature, "--along", "layer", "--dose", "0.05", "--out", "p.toml")
    steer("export", "p.toml", "v.gguf")
    steer("export", "p.toml", "v.safetensors")
    steer("export", "p.toml", "v.json", "--model-id", "gpt2-small", "--source", "L2=2-res-jb")
    body = json.loads((tmp_path / "v.json").read_text())
    assert body["features"][0]["index"] == int(feature.split("/")[1])
    assert body["features"][0]["layer"] == "2-res-jb"
    assert "--model-id" in steer("export", "p.toml", "v.json", fails=True)
    steer("plan", feature, "--edit", "floor", "--dose", "0.02", "--out", "f.toml")
    assert "no fixed vectors" in steer("export", "f.toml", "v.gguf", fails=True)


HALVE = '''
"""Part of a feature is taken away: a' = a (1 - s/2)."""
from typing import Literal

from steering.edits import FeatureEdit


class Halve(FeatureEdit):
    kind: Literal["halve"] = "halve"

    def new_activation(self, a, values):
        return a * (1 - values.strength / 2)
'''


def test_an_edit_of_another_package_is_used_in_a_plan(steer, steering, inputs, tmp_path):
    """Halved twice over, a feature is gone: what is written is that of the edit ablate."""
    package = tmp_path / "site-packages"
    (package / "mine-1.0.dist-info").mkdir(parents=True)
    (package / "mine-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mine\nVersion: 1.0\n"
    )
    (package / "mine-1.0.dist-info" / "entry_points.txt").write_text(
        "[featureflow.edits]\nhalve = mine_halve:Halve\n"
    )
    (package / "mine_halve.py").write_text(HALVE)
    root, feature = inputs.collect.path.parent, lasting_feature(steering)
    paths = os.pathsep.join([str(package), str(Path(__file__).parents[2])])

    def with_package(*words: str) -> str:
        run = ["--artifacts", str(root.parent), "--recipe", root.name]
        command = [sys.executable, "-m", "pipeline", "steer", *words, *run]
        environment = {**os.environ, "PYTHONPATH": paths}
        found = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stderr
        return found.stdout

    alone = ("--along", "layer")
    prompt = prompt_for(steering, Run.open(root).store, feature)
    asked = ("-n", "1", "--tokens", "12", "--log-probs", "--prompt", prompt)
    with_package("plan", feature, *alone, "--edit", "halve", "--strength", "2", "--out", "a.toml")
    steer("plan", feature, *alone, "--edit", "ablate", "--strength", "1", "--out", "b.toml")
    written = with_package("generate", "a.toml", *asked)
    assert written == steer("generate", "b.toml", *asked)
    unsteered, steered = (line for line in written.splitlines() if line.startswith("  '"))
    assert unsteered != steered, "the feature was active, so the edit did something"
    assert "no such kind" in steer("generate", "a.toml", fails=True)
    refused = steer("plan", feature, "--edit", "halve", "--out", "c.toml", fails=True)
    assert "there is no edit 'halve'" in refused
    assert "mean_ablate" in refused
