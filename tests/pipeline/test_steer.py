"""The steer stage on a small model, from text to a finished artifact; the atlas is a stand-in that
takes what it is given.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from data.concepts.prompts import read_prompts
from featureflow.errors import UserError
from pipeline.artifact import Artifact
from pipeline.context import RunContext
from pipeline.describe.chat import ChatModel
from pipeline.lenses.steering import tables as steer_tables
from pipeline.lenses.steering.blind_pairs import judge_artifact, verdict_lines
from pipeline.lenses.steering.examples import DOSES, TOLERATED, largest_coherent
from pipeline.lenses.steering.judge import SAE_TS, Judge, Judged
from pipeline.run import Run
from pipeline.serve.endpoint import Endpoint, make_server
from pipeline.stages import steer
from pipeline.stages.atlas import steering_document
from steering.generation import Sampling, generate
from steering.plan_files import read_plan
from steering.reading import CoherenceLimits, is_coherent, read_back

CONFIG = steer.Config(
    n_features=2,
    doses=(0.05, 0.2),
    arms=("single", "single_budget", "copied", "flow", "flow_closed_loop", "random_flow"),
    n_prompts=2,
    n_samples=1,
    n_new_tokens=12,
    n_example_tokens=24,
    n_neutral_texts=2,
    n_rows=2048,
    min_persistence=2,
)


def without_labels(patch: pytest.MonkeyPatch) -> None:
    """Features are described by a stand-in that has no tables."""
    patch.setattr(steer, "labels_of", lambda run, chosen: {})
    patch.setattr(steer, "has_label", lambda run: lambda feature: True)


@pytest.fixture
def unlabelled(monkeypatch) -> None:
    without_labels(monkeypatch)


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Artifact:
    with pytest.MonkeyPatch.context() as patch:
        without_labels(patch)
        return steer.run(
            CONFIG, inputs, tmp_path_factory.mktemp("steer") / "steer", RunContext(n_threads=1)
        )


def test_every_steered_text_stands_beside_its_unsteered_pair(finished):
    samples = pd.read_parquet(finished.file("samples.parquet"))
    n_arm_doses = len(CONFIG.arms) * len(CONFIG.doses)
    assert (
        len(samples)
        == finished.summary["n_features"] * n_arm_doses * CONFIG.n_prompts * CONFIG.n_samples
    )
    assert samples.groupby(["feature", "prompt", "sample"])["unsteered"].nunique().eq(1).all()
    shared = samples.groupby(["prompt", "sample"])["unsteered"].nunique()
    assert shared.eq(1).all()


def test_examples_are_two_designed_pushes_and_a_removal_or_a_remark(finished):
    """What cannot be made of a model that knows no words, or of short flows, is said."""
    examples = json.loads(finished.file("examples.json").read_text())
    remarks = json.loads(finished.file("features.json").read_text())["remarks"]
    assert len(examples) + sum("no example" in remark for remark in remarks) == 3
    page = finished.file("report.html").read_text(encoding="utf-8")
    for place, example in enumerate(examples):
        plan = read_plan(finished.file(f"plans/example_{place}.toml"))
        assert plan.dose == example["dose"]
        assert all(node.weight > 0 for node in plan.nodes)
        assert example["n"] == CONFIG.n_prompts
        coherent = {each["dose"]: each["coherent"] for each in example["doses_tried"]}
        kept = [d for d, (was, now) in coherent.items() if now >= was - TOLERATED]
        if "push" in example["title"]:
            assert plan.dose == pytest.approx(max(kept, default=min(coherent)), rel=0.06)
        assert 0 <= example["coherent"][1] <= 1
        assert example["title"] in page
        assert 1 <= len(example["samples"]) <= 2


def test_each_length_of_text_has_limits_of_its_own(finished, inputs):
    """Nine in ten unsteered continuations are coherent by the limits of their length; longer text
    repeats more and compresses better."""
    choice = json.loads(finished.file("choice.json").read_text())
    model = Run.open(inputs.collect.path.parent).model
    for name, n_tokens in (("coherence_limits", 12), ("example_limits", 24)):
        limits = CoherenceLimits(**choice[name])
        prompts, sampling = choice["prompts"]["ordinary"], Sampling(n_tokens=n_tokens)
        written = generate(
            model, {}, prompts, [None], n_samples=2, seed=CONFIG.seed + 1, sampling=sampling
        )
        read = read_back(model, {}, written.samples, [])
        assert 0.9 <= sum(is_coherent(each, limits) for each in read) / len(read) < 1, name


@pytest.mark.parametrize("bearable", [0.0, 0.05, 0.12, 0.2, 1.0])
def test_the_largest_dose_that_is_coherent_is_found_in_three_tries(bearable):
    tried: list[float] = []
    found = largest_coherent(lambda dose: not tried.append(dose) and dose <= bearable)
    assert found == max((dose for dose in DOSES if dose <= bearable), default=min(DOSES))
    assert found in tried
    assert len(tried) <= 3


def test_calibrated_doses_are_what_was_asked_or_said_not_to_be(finished):
    doses = pd.read_parquet(finished.file("tables/doses.parquet"))
    asked = doses[(doses["arm"] != "single_budget") & doses["reached"]]
    assert ((asked["kl"] / asked["target"] - 1).abs() <= 0.06).all()
    assert finished.summary["n_doses_not_reached"] == int((~doses["reached"]).sum())
    assert (doses["n_touched"] > 0).all()


def test_the_single_layer_with_the_whole_budget_has_the_flows_coefficient(finished):
    doses = pd.read_parquet(finished.file("tables/doses.parquet")).set_index(
        ["feature", "target", "arm"]
    )["strength"]
    for feature, target in {key[:2] for key in doses.index}:
        assert doses[feature, target, "single_budget"] == pytest.approx(
            doses[feature, target, "flow"]
        )


def test_plans_read_back_and_name_what_they_were_made_from(finished, inputs):
    model_fingerprint = Run.open(inputs.collect.path.parent).model.fingerprint
    names = [
        name for name in finished.files if name.startswith("plans/") and name.endswith(".toml")
    ]
    assert len(names) == finished.summary["n_features"] * len(CONFIG.arms) * len(CONFIG.doses)
    for name in names:
        plan = read_plan(finished.file(name))
        assert plan.digests == {"dictionaries": inputs.train.digest, "graph": inputs.link.digest}
        assert plan.dose is not None
        assert plan.model == model_fingerprint


def test_effects_are_the_means_of_the_samples(finished):
    effects = pd.read_parquet(finished.file("tables/effects.parquet"))
    samples = pd.read_parquet(finished.file("samples.parquet"))
    keys = ["feature", "arm", "target"]
    expected = (
        (samples["top_tokens_steered"] - samples["top_tokens_unsteered"])
        .groupby([samples[k] for k in keys])
        .mean()
    )
    own = effects[effects["measure"] == "top_tokens"].set_index(keys)
    pd.testing.assert_series_equal(
        own["difference"].sort_index(), expected.sort_index(), check_names=False
    )
    assert (
        (own["low"] <= own["difference"] + 1e-12) & (own["difference"] <= own["high"] + 1e-12)
    ).all()


def test_what_is_reported_comes_from_prompts_that_nothing_was_chosen_on(finished):
    choice = json.loads(finished.file("choice.json").read_text())
    samples = pd.read_parquet(finished.file("samples.parquet"))
    used = {
        prompt for use in ("screening", "dose", "ordinary") for prompt in choice["prompts"][use]
    }
    assert used == set(read_prompts().dev)
    assert set(samples["prompt"]) == set(choice["prompts"]["report"])
    assert not set(samples["prompt"]) & (used | set(read_prompts().test[:6]))
    assert [trial["dose"] for trial in choice["doses"]] == sorted(CONFIG.doses)
    assert finished.summary["dose"] == choice["dose"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Noting(Judge):
    """A judge that keeps what it was asked about, in order."""

    asked: list[Judged] = dataclasses.field(default_factory=list)

    def judge(self, rubric, texts, **rest):
        if texts is not self.asked:
            self.asked.extend(texts)
        return super().judge(rubric, texts, **rest)


def test_a_judge_sees_both_texts_of_a_pair_blind_and_what_it_says_is_counted(finished, inputs):
    """The judge is the small random model behind the real endpoint: its answers are noise, and
    hardly any is read."""
    model = Run.open(inputs.collect.path.parent).model
    model.tokenizer.hf.chat_template = "{{ messages[0].content }}"
    with make_server(Endpoint(model=model, saes={}), port=0).running() as address:
        judge = _Noting(chat=ChatModel(url=f"{address}/v1", model=model.name), max_tokens=2)
        table = judge_artifact(finished.path, judge, "sae-ts", arm="flow", n_pairs=4, seed=0)
        again = judge.judge(SAE_TS, judge.asked)
    sides = [[pair, side] for pair in range(4) for side in ("steered", "unsteered")]
    assert table[["pair", "side"]].to_numpy().tolist() == sides
    samples = pd.read_parquet(finished.file("samples.parquet"))
    written = samples[(samples["arm"] == "flow") & (samples["target"] == finished.summary["dose"])]
    in_order = [text for pair in written.itertuples() for text in (pair.unsteered, pair.steered)]
    asked = [each.text for each in judge.asked]
    assert sorted(asked) == sorted(in_order) == sorted(table["text"])
    assert asked != in_order
    told = table[["text", "answer_behaviour", "answer_coherence"]].to_numpy().tolist()
    assert sorted(told) == sorted(
        [text, *verdict.answers.values()] for text, verdict in zip(asked, again, strict=True)
    )
    first, *_ = verdict_lines(table, "sae-ts")
    assert first.startswith("answers that could be read, of 8 texts: behaviour")
    with pytest.raises(UserError, match="no texts of the arm"):
        judge_artifact(finished.path, judge, "sae-ts", arm="sideways", n_pairs=2, seed=0)
    with pytest.raises(UserError, match="no texts to judge"):
        judge_artifact(finished.path / "plans", judge, "sae-ts", arm="flow", n_pairs=2, seed=0)


def test_answers_that_were_read_give_a_paired_difference():
    rows = [
        {
            "pair": pair,
            "side": side,
            "total": total,
            "rating_behaviour": 1,
            "rating_coherence": 1 + pair,
            "answer_behaviour": "1",
            "answer_coherence": str(1 + pair),
        }
        for pair in range(3)
        for side, total in (("unsteered", 0.1), ("steered", 0.3 if pair < 2 else None))
    ]
    read, different, alike, difference = verdict_lines(pd.DataFrame(rows), "sae-ts")
    assert read.endswith("behaviour 100%, coherence 100%, all 83%")
    assert different == "different ratings given: behaviour 1, coherence 3"
    assert alike.startswith("the judge rates every text alike in behaviour:")
    assert (
        "over 2 pairs: unsteered 0.100, steered 0.300, difference +0.200 [+0.200, +0.200]"
        in difference
    )


def test_a_named_feature_is_steered_and_the_atlas_has_its_samples(
    inputs, unlabelled, tmp_path, finished
):
    feature = json.loads(finished.file("features.json").read_text())["features"][0]["feature"]
    config = CONFIG.replace(features=(feature,), arms=("flow",), doses=(0.1,))
    artifact = steer.run(config, inputs, tmp_path / "steer", RunContext(n_threads=1))
    document = steering_document(artifact, SimpleNamespace(label_of=lambda name: "a label"))
    assert {sample["feature"] for sample in document["samples"]} == {feature}
    assert document["version"] == 1
    assert set(document["commands"]) == {feature}
    assert document["samples"][0]["label"] == "a label"
    assert artifact.summary["n_features"] == 1


def test_wrong_features_and_arms_are_explained(inputs, unlabelled, tmp_path):
    for name, word in (
        ("L99/1", "no site"),
        ("L2/9999", "no latent"),
        ("nonsense", "not a feature"),
    ):
        with pytest.raises(UserError, match=word):
            steer.run(
                CONFIG.replace(features=(name,)),
                inputs,
                tmp_path / "steer",
                RunContext(n_threads=1),
            )
    with pytest.raises(ValueError, match="no such arm"):
        steer.Config(arms=("sideways",))
    with pytest.raises(ValueError, match="single_budget"):
        steer.Config(arms=("single_budget",))
    assert not Path(tmp_path / "steer").exists()
    assert steer_tables.HEADLINE_ARM in steer.Config().arms
