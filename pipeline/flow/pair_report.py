"""One linked pair of dictionaries → its rows of the edge table and its row of the pair table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import scipy

from featureflow.statistics import accepted_p
from pipeline.flow.edges import EdgeColumns
from pipeline.flow.functional import Cofiring
from pipeline.flow.judge import Evidence
from pipeline.flow.null import NullSample
from pipeline.flow.pairing import RELATIONS, Pair, StartRelation

HISTOGRAM_EDGES = np.linspace(0, 1, 101)
"""Bins of the cosine histograms in the pair table."""


def edge_table(
    pair: Pair,
    columns: EdgeColumns,
    evidence: Evidence,
    cofiring: Cofiring | None,
    kept: np.ndarray,
    *,
    fdr: float,
    sites: Sequence[str],
) -> pd.DataFrame:
    """The edges of one pair, in the columns that docs/formats.md names. Evidence that was not
    gathered is null.

    `sites` are the short names of all sites: the categories of both site columns, so that tables
    can be joined cheaply.
    """
    n = len(columns.source)
    unknown = np.full(n, np.nan, dtype=np.float32)
    return pd.DataFrame(
        {
            "source_site": _repeated(pair.source.short, sites, n),
            "source_latent": columns.source.astype(np.int32),
            "target_site": _repeated(pair.target.short, sites, n),
            "target_latent": columns.target.astype(np.int32),
            "relation": _repeated(pair.relation, RELATIONS, n),
            "rank": columns.rank.astype(np.int16),
            "forward_rank": columns.forward_rank.astype(np.int16),
            "cosine": columns.cosine.astype(np.float32),
            "margin": columns.margin.astype(np.float32),
            "mutual": columns.mutual,
            "p_cosine": evidence.cosine.astype(np.float32),
            "p_active": unknown if evidence.active is None else evidence.active.astype(np.float32),
            "p_rival": unknown if evidence.rival is None else evidence.rival.astype(np.float32),
            "p_partner": evidence.partner.astype(np.float32),
            "p_value": evidence.joint.astype(np.float32),
            "q_value": evidence.q.astype(np.float32),
            "related": evidence.related <= fdr,
            "kept": kept,
            "pearson": unknown if cofiring is None else cofiring.links.pearson.astype(np.float32),
            "jaccard": unknown if cofiring is None else cofiring.links.jaccard.astype(np.float32),
        }
    )


def _repeated(name: str, names: Sequence[str], n: int) -> pd.Categorical:
    return pd.Categorical.from_codes(
        np.full(n, list(names).index(name), dtype=np.int16), categories=list(names)
    )


def pair_row(
    pair: Pair,
    columns: EdgeColumns,
    evidence: Evidence,
    cofiring: Cofiring | None,
    kept: np.ndarray,
    *,
    start: StartRelation,
    nulls: list[NullSample],
    n_sources: int,
    few: np.ndarray | None,
    fdr: float,
) -> dict[str, Any]:
    """Counts, strengths, the null beside them, hubness, and what activations say, for one pair."""
    top = columns.top
    cosine = columns.cosine[top]
    strictest = max(nulls, key=lambda null: null.quantile(0.99), default=None)
    p = accepted_p(evidence.joint[top], fdr)
    skew, largest = hubness(columns.source[top], n_sources)
    return {
        "source_site": pair.source.short,
        "target_site": pair.target.short,
        "relation": pair.relation,
        "gap": pair.gap,
        "start": start,
        "null": " + ".join(null.name for null in nulls),
        "n_targets": int(top.sum()),
        "n_links": int((kept & top).sum()),
        "n_links_kept_all_ranks": int(kept.sum()),
        "n_mutual": int((kept & columns.mutual).sum()),
        "n_same_number": int((columns.source == columns.target)[top].sum()),
        "cosine_median": _median(cosine),
        "margin_median": _median(columns.margin[top]),
        "null_median": None if strictest is None else strictest.quantile(0.5),
        "null_p99": None if strictest is None else strictest.quantile(0.99),
        "threshold": None if p is None or not nulls else max(n.cosine_at(p) for n in nulls),
        "n_above_fixed": int((cosine >= (0.5 if pair.relation == "residual" else 0.15)).sum()),
        "hub_skewness": skew,
        "hub_largest": largest,
        **_activity(columns, cofiring, kept, few),
        "histogram": np.histogram(cosine, HISTOGRAM_EDGES)[0].tolist(),
        "null_histogram": []
        if strictest is None
        else np.histogram(strictest.best_cosine, HISTOGRAM_EDGES)[0].tolist(),
    }


def hubness(index: np.ndarray, n_possible: int) -> tuple[float, int]:
    """How unequally sources are chosen as best partner: skewness of the counts (0 even, > 1 hubs)
    and the largest."""
    counts = np.bincount(index[index >= 0], minlength=n_possible)
    skew = float(scipy.stats.skew(counts)) if counts.std() > 0 else 0.0
    return skew, int(counts.max(initial=0))


def _activity(
    columns: EdgeColumns, cofiring: Cofiring | None, kept: np.ndarray, few: np.ndarray | None
) -> dict[str, Any]:
    """Medians over top-1 links of targets that were active often enough, kept links apart from the
    rest."""
    names = (
        "pearson_median",
        "pearson_median_kept",
        "jaccard_median",
        "pearson_best_median",
        "pearson_chance_p99",
        "agreement",
    )
    if cofiring is None or few is None:
        return dict.fromkeys(names)
    active = columns.top & ~few[columns.target]
    best_index, best = cofiring.best.index[columns.target], cofiring.best.pearson[columns.target]
    chance = cofiring.chance.pearson
    values = (
        _median(cofiring.links.pearson[active]),
        _median(cofiring.links.pearson[active & kept]),
        _median(cofiring.links.jaccard[active]),
        _median(best[active]),
        float(np.quantile(chance, 0.99)) if len(chance) else None,
        float((best_index == columns.source)[active].mean()) if active.any() else None,
    )
    return dict(zip(names, values, strict=True))


def _median(values: np.ndarray) -> float | None:
    return float(np.median(values)) if len(values) else None
