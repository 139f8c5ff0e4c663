"""The study's rules: choice on development data only, a lock that cannot be edited, a verdict that
follows the numbers.
"""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from benchmarks.steering_study.figures import selectivity_at_equal_dose
from benchmarks.steering_study.options import ACTIVATION_ARMS, SUPPRESSION_ARMS
from benchmarks.steering_study.report import CONTROLS, FLOWS, verdict, write_report
from benchmarks.steering_study.results import compare, read_records
from benchmarks.steering_study.study import (
    Study,
    StudyOptions,
    choose_dose,
    cost_of,
    with_whole_budget,
)
from featureflow.errors import UserError
from tests.steering.conftest import steering_of


def records(n_success, n_coherent, n=10):
    return [{"success": k < n_success, "coherent": k < n_coherent} for k in range(n)]


def entry(dose, **kwargs):
    return {
        "dose": dose,
        "kl": dose,
        "strength": 10 * dose,
        "reached": True,
        "selectivity": 0.0,
        **kwargs,
    }


def test_the_dose_with_most_coherent_successes_is_chosen_and_ties_go_to_the_lower():
    entries = [
        entry(0.1, records=records(3, 10)),
        entry(0.2, records=records(6, 9)),
        entry(0.5, records=records(6, 9)),
        entry(1.0, records=records(10, 2)),
        entry(2.0),
    ]
    assert choose_dose(entries, "flow", 0.8)["dose"] == 0.2
    assert choose_dose(entries[3:], "flow", 0.8) is None
    assert choose_dose(entries, "suppress_flow", 0.8)["dose"] == 0.1


def test_the_whole_budget_takes_the_flows_strength():
    locked = {
        "arms": {"flow": {"choice": entry(0.2)}, "single": {"plan": "p", "choice": entry(0.5)}}
    }
    assert with_whole_budget(locked)["arms"]["single"]["choice"]["strength"] == 2.0
    assert locked["arms"]["single"]["choice"]["strength"] == 5.0


def put(folder, part, topic, arm, document):
    path = folder / part / topic / f"{arm}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))


def test_without_an_intact_lock_nothing_is_tested(tmp_path):
    study = Study(steering=None, options=StudyOptions(topics=("food",)), folder=tmp_path)
    with pytest.raises(UserError, match="nothing is locked"):
        study.test()
    base = {"limits": {}, "threshold": 0.5}
    put(tmp_path, "dev", "food", "unsteered", base)
    for arm in (*ACTIVATION_ARMS, *SUPPRESSION_ARMS):
        put(
            tmp_path, "dev", "food", arm, {"plan": {}, "doses": [entry(0.1, records=records(5, 9))]}
        )
    study.lock()
    assert study.read_lock()["topics"]["food"]["arms"]["flow"]["choice"]["dose"] == 0.1
    changed = study.lock_path.read_text().replace('"dose": 0.1', '"dose": 0.2', 1)
    study.lock_path.write_text(changed)
    with pytest.raises(UserError, match="changed after"):
        study.test()


def test_a_folder_belongs_to_one_choice_of_sizes_and_dictionaries(tmp_path):
    """Results are kept by file, so those of other choices would pass for these."""

    def study(topics=("food",), made_from=None, **sizes):
        arms = ("unsteered", *ACTIVATION_ARMS, *SUPPRESSION_ARMS)
        for topic, arm in ((topic, arm) for topic in topics for arm in arms):
            put(tmp_path, "dev", topic, arm, {})
        options = StudyOptions(topics=topics, **sizes)
        return Study(
            steering=None,
            options=options,
            folder=tmp_path,
            made_from=made_from or {"dictionaries": "a"},
        )

    study().develop()
    study(topics=("food", "music"), batch_size=3).develop()
    for other in (study(n_tokens=25), study(doses=(0.1,)), study(made_from={"dictionaries": "b"})):
        with pytest.raises(UserError, match="other choices"):
            other.develop()
    study().develop()


def test_results_of_an_earlier_lock_are_not_kept(tmp_path):
    study = Study(steering=None, options=StudyOptions(topics=("food",)), folder=tmp_path)
    put(tmp_path, "dev", "food", "unsteered", {"limits": {}, "threshold": 0.5})

    def locked(dose):
        for arm in (*ACTIVATION_ARMS, *SUPPRESSION_ARMS):
            put(
                tmp_path,
                "dev",
                "food",
                arm,
                {"plan": {}, "doses": [entry(dose, records=records(5, 9))]},
            )
        study.lock()

    locked(0.1)
    assert study._once("test", "food", "flow", lambda: {"made": 1})["made"] == 1
    assert study._once("test", "food", "flow", lambda: {"made": 2})["made"] == 1
    locked(0.2)
    assert study._missing("test", "food", ("flow",)) == ["flow"]
    assert study._once("test", "food", "flow", lambda: {"made": 3})["made"] == 3


def results(folder, *, flow_rate, control_rate, n_topics=12, vacuous=()):
    """A study with known success rates; every sample coherent."""
    generator = np.random.default_rng(0)
    rates = (
        dict.fromkeys(FLOWS, control_rate)
        | dict.fromkeys(CONTROLS, control_rate)
        | {"unsteered": 0.05}
    )
    rates["flow"] = flow_rate
    for topic in range(n_topics):
        for arm, rate in rates.items():
            fixed = {
                "sample": 0,
                "text": "some text",
                "probability": 0.5,
                "coherent": True,
                "nll": 3.0,
            }
            made = [
                {
                    **fixed,
                    "prompt": f"p{k}",
                    "success": bool(generator.random() < rate),
                    "lexicon_rate": 1.0,
                }
                for k in range(30)
            ]
            document = (
                {"vacuous": True}
                if arm in vacuous
                else {"records": made, "kl": 0.3, "selectivity": 0.1}
            )
            put(folder, "test", f"t{topic}", arm, document)


def test_a_real_advantage_is_found_and_a_missing_one_is_not(tmp_path):
    results(tmp_path / "a", flow_rate=0.7, control_rate=0.3)
    results(tmp_path / "b", flow_rate=0.3, control_rate=0.3)
    better = compare(read_records(tmp_path / "a"), FLOWS, CONTROLS)
    assert better[0].arm == "flow"
    assert better[0].p_holm < 0.01
    assert better[0].difference.low > 0.2
    assert "beats" in verdict(better)
    equal = verdict(compare(read_records(tmp_path / "b"), FLOWS, CONTROLS))
    assert equal.startswith(("No flow arm beats", "The best flow arm"))


def test_a_vacuous_arm_counts_as_unsteered(tmp_path):
    results(tmp_path, flow_rate=0.7, control_rate=0.3, n_topics=3, vacuous=("flow",))
    table = read_records(tmp_path)
    assert (
        table[table["arm"] == "flow"]["hit"].mean()
        == table[table["arm"] == "unsteered"]["hit"].mean()
    )


def test_the_report_says_what_was_found(tmp_path):
    results(tmp_path, flow_rate=0.3, control_rate=0.3, n_topics=4)
    page = write_report(tmp_path, tmp_path / "report.md").read_text()
    assert "4 topics" in page
    assert "No flow arm beats" in page or "equivalent" in page
    with pytest.raises(UserError, match="no results"):
        read_records(tmp_path / "nowhere")


def test_selectivity_is_compared_at_one_dose_with_the_control_that_is_best_there():
    rows = [
        {"topic": topic, "arm": arm, "target": dose, "selectivity": value + shift}
        for topic, shift in (("food", 0.0), ("law", 1.0))
        for dose, values in (
            (0.1, {"flow": 0.5, "single": 0.3, "copied": 0.2}),
            (0.2, {"flow": 0.4, "single": 0.1, "copied": 0.6}),
        )
        for arm, value in values.items()
    ]
    table = selectivity_at_equal_dose(pd.DataFrame(rows), ("flow",), ("single", "copied"), seed=0)
    assert table["control"].tolist() == ["single", "copied"]
    assert table["difference"].tolist() == pytest.approx([0.2, -0.2])
    assert table["topics above"].tolist() == [2, 0]


def test_the_cost_grows_with_the_study():
    small, large = (cost_of(StudyOptions(topics=topics)) for topics in (("food",), ("food", "law")))
    assert large["generated"] == 2 * small["generated"]


@pytest.mark.slow
def test_a_small_study_runs_through_and_goes_on_where_it_stopped(model, saes, tmp_path):
    options = StudyOptions(
        topics=("food",),
        doses=(0.05, 0.2),
        n_dev_prompts=4,
        n_test_prompts=4,
        n_texts=3,
        n_tokens=12,
        min_coherent=0.1,
    )
    study = Study(steering=steering_of(model, saes), options=options, folder=tmp_path)
    study.develop()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    study.develop()
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.json")}
    study.lock()
    study.test()
    page = write_report(tmp_path, tmp_path / "report.md").read_text()
    assert "flow closed loop" in page.replace("_", " ")
