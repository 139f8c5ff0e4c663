"""Statistics measured again: a store in, the statistics of every site computed from its rows out,
shard by shard.

1. One task is one shard for all sites: it reads every row, checksums compared, chunk by chunk, and
   returns moments, counts and a histogram of each site (about 16 bytes a dimension); norms are
   compared with the stored ones there.
2. Shards are merged in their order, so the result is the same bits wherever the tasks ran, and the
   same bits as what was gathered while the store was written.

Cost: one reading of the whole store; memory of one chunk a worker.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np

from data.store.cluster import Machines, map_shards
from data.store.layout import SiteLayout
from data.store.shards import read_chunk_file
from data.store.statistics import (
    N_BINS,
    Moments,
    SiteStatistics,
    empty_moments,
    histogram_of,
    moments_of,
    norms_of,
)
from data.store.store import ActivationStore
from featureflow.errors import Problem


@dataclass(frozen=True, kw_only=True)
class SiteCount:
    """What one shard's rows say about one site. `n_norms_differ`: rows whose stored norm is
    another."""

    moments: Moments
    histogram: np.ndarray
    n_non_finite: int
    n_norms_differ: int


@dataclass(frozen=True, kw_only=True)
class Recount:
    """Statistics of every site from its rows, and where they are not those that the store has
    gathered."""

    statistics: Mapping[str, SiteStatistics]
    problems: tuple[Problem, ...]


def recount_store(url: str | Path, machines: Machines) -> Recount:
    """Measure every site again. Raises UserError for a store that cannot be trusted."""
    store = ActivationStore.open(url)
    tasks = list(range(store.layout.n_shards))
    counts: dict[int, Mapping[str, SiteCount]] = {}
    for shard, found in map_shards(functools.partial(recount_shard, store.url), tasks, machines):
        counts[shard] = found
        machines.progress("recount", len(counts), len(tasks))
    statistics = {
        site.name: _merged(store, site, [counts[shard][site.name] for shard in tasks])
        for site in store.layout.sites
    }
    return Recount(
        statistics=statistics, problems=tuple(_iter_differences(store, statistics, counts))
    )


def recount_shard(url: str, shard: int) -> tuple[int, dict[str, SiteCount]]:
    """The counts of one shard, all sites. Runs on a worker."""
    store = ActivationStore.open(url)
    start, stop = store.layout.rows_of_shard(shard)
    flags = read_chunk_file(store.place, store.layout.token_array("flags"), shard)[: stop - start]
    return shard, {site.name: _count(store, site, start, flags) for site in store.layout.sites}


def _count(store: ActivationStore, site: SiteLayout, start: int, flags: np.ndarray) -> SiteCount:
    stored_norms = store.norms_of_shard(site, start // store.shard_rows)
    moments, histogram = empty_moments(site.width), np.zeros(N_BINS, dtype=np.int64)
    n_non_finite = n_differ = 0
    for first in range(0, len(flags), store.chunk_rows):
        kept = flags[first : first + store.chunk_rows] == 0
        values = store.read(site.name, start + first, start + first + len(kept))
        norms = norms_of(values)
        n_non_finite += int((~np.isfinite(values)).sum())
        n_differ += int(
            (norms.view(np.uint32) != stored_norms[first : first + len(kept)].view(np.uint32)).sum()
        )
        histogram += histogram_of(norms[kept])
        moments = moments.merged(moments_of(values, kept))
    return SiteCount(
        moments=moments, histogram=histogram, n_non_finite=n_non_finite, n_norms_differ=n_differ
    )


def _merged(store: ActivationStore, site: SiteLayout, counts: list[SiteCount]) -> SiteStatistics:
    return store.statistics_from(
        site,
        reduce(Moments.merged, [each.moments for each in counts]),
        np.sum([each.histogram for each in counts], axis=0),
        sum(each.n_non_finite for each in counts),
    )


def _iter_differences(
    store: ActivationStore,
    statistics: Mapping[str, SiteStatistics],
    counts: Mapping[int, Mapping[str, SiteCount]],
) -> Iterator[Problem]:
    for name, found in statistics.items():
        gathered = store.statistics(name)
        parts = {
            "count": found.n == gathered.n,
            "mean": np.array_equal(found.mean, gathered.mean),
            "variance": np.array_equal(found.variance, gathered.variance),
            "numbers that are not finite": _same_non_finite(
                store, found.n_non_finite, gathered.n_non_finite
            ),
            "histogram of norms": np.array_equal(found.norm_histogram, gathered.norm_histogram),
            "norms": not any(each[name].n_norms_differ for each in counts.values()),
        }
        if wrong := [part for part, same in parts.items() if not same]:
            yield Problem(
                what=f"gathered statistics differ from the rows: {', '.join(wrong)}", where=name
            )


def _same_non_finite(store: ActivationStore, found: int, gathered: int) -> bool:
    """An int8 row with one number that is not finite reads as a row of them."""
    return found == gathered or (store.layout.dtype == "int8" and min(found, gathered) > 0)
