"""Strategies read off a graph's edges, pairs spread over the depth, evidence back on the right
edges."""

from __future__ import annotations

import numpy as np
import pandas as pd

from featureflow.sites import Site
from pipeline.flow.validation import (
    TOP_1,
    TOP_5,
    Validation,
    attach_evidence,
    chosen_pairs,
    strategies_of,
)


def edges_between(source: str, target: str, relation: str = "residual") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "source_site": pd.Categorical([source] * 4, categories=[source, target]),
            "source_latent": [5, 6, 7, 9],
            "target_site": pd.Categorical([target] * 4, categories=[source, target]),
            "target_latent": [0, 0, 2, 2],
            "relation": relation,
            "rank": [0, 1, 0, -1],
            "kept": [True, True, False, True],
        }
    )


def test_strategies_hold_each_targets_candidates() -> None:
    found = strategies_of(edges_between("L0", "L1"), 4, seed=0)
    assert found[TOP_1][:, 0].tolist() == [5, -1, 7, -1]
    assert found["kept link"][:, 0].tolist() == [5, -1, -1, -1], (
        "the best predecessor of 2 was not kept"
    )
    assert found[TOP_5][0].tolist() == [5, 6, -1, -1, -1]
    assert set(found["random of top-5"][0]) <= {5, 6, -1}


def test_pairs_are_spread_over_the_depth_and_relations() -> None:
    residual = [edges_between(f"L{i}", f"L{i + 1}") for i in range(12)]
    modules = [edges_between(f"L{i}.mlp", f"L{i}", "mlp") for i in range(3)]
    edges = pd.concat(residual + modules, ignore_index=True)
    pairs = chosen_pairs(edges, Validation(n_residual_pairs=3, n_module_pairs=1))
    assert pairs == [
        (Site(2, "resid_post"), Site(3, "resid_post"), "residual"),
        (Site(6, "resid_post"), Site(7, "resid_post"), "residual"),
        (Site(10, "resid_post"), Site(11, "resid_post"), "residual"),
        (Site(1, "mlp_out"), Site(1, "resid_post"), "mlp"),
    ]
    assert len(chosen_pairs(edges, Validation(n_residual_pairs=99, n_module_pairs=0))) == 12


def test_evidence_lands_on_its_edge_only() -> None:
    evidence = pd.DataFrame(
        {
            "source": ["L0"],
            "target": ["L1"],
            "source_latent": [7],
            "target_latent": [2],
            "causal_n": [3],
            "causal_success": [1.0],
            "causal_change": [0.9],
        }
    )
    attached = attach_evidence(edges_between("L0", "L1"), evidence)
    assert attached["causal_n"].tolist() == [0, 0, 3, 0]
    assert attached["causal_success"].isna().tolist() == [True, True, False, True]
    np.testing.assert_allclose(attached.loc[2, "causal_change"], 0.9, rtol=1e-6)
    again = attach_evidence(attached, evidence)
    pd.testing.assert_frame_equal(again, attached)
