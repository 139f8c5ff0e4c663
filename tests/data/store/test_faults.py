"""The fault suite at a small size: killed, damaged, full, locked and contended stores all end as they should."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.mark.slow
def test_every_fault_ends_in_the_same_bytes_or_in_a_refusal(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import store_faults

    collection = store_faults.make_collection(n_tokens=4000)
    outcomes = list(store_faults.iter_outcomes(collection, tmp_path, n_kills=3, seed=0))
    assert [outcome for outcome in outcomes if not outcome["as_wanted"]] == []
    assert len(outcomes) == 13
    sys.modules.pop("store_faults")
