"""Is a store what its records say? A store in, a report of everything that is wrong with it out.

Quick: metadata, records, and existence and size of every file. Full: also the xxh3 of every byte
against the records, which finds flipped bits and files of another run; for a damaged shard file the
chunks that fail their crc32c are named.

Statistics measured again: a store in, the statistics of every site computed from its rows out,
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
from typing import Any

import numpy as np
import xxhash

from data.store.cluster import Machines, map_shards
from data.store.encoding import MOST_LOST
from data.store.layout import DOCUMENTS, MEND_DAMAGE, SiteLayout, StoreLayout, parse_layout
from data.store.places import Place, open_place
from data.store.shards import (
    Completion,
    ShardRecord,
    read_chunk_file,
    read_chunks,
    read_completion,
    read_record,
    sum_of,
)
from data.store.statistics import (
    N_BINS,
    Moments,
    SiteStatistics,
    empty_moments,
    histogram_of,
    moments_of,
    norms_of,
)
from data.store.store import ActivationStore, read_records
from featureflow.errors import Command, Problem, UserError

_PIECE = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Report:
    """What verification found. `problems` is empty for a sound store; `variance_lost` is, by site,
    the largest fraction of a chunk's variance that int8 lost (empty for other dtypes)."""

    url: str
    is_full: bool
    n_shards: int
    n_files: int
    n_bytes: int
    problems: tuple[Problem, ...]
    variance_lost: Mapping[str, float]

    @property
    def is_sound(self) -> bool:
        return not self.problems

    def raise_if_damaged(self) -> None:
        """Raises UserError with every problem."""
        if self.problems:
            raise UserError(
                f"{self.url} cannot be trusted", problems=self.problems, fix=MEND_DAMAGE
            )


def verify_store(url: str | Path, full: bool, context: Machines) -> Report:
    """Check a store. Raises UserError only when there is no store at all; everything else is in the
    report."""
    place = open_place(url)
    try:
        layout = parse_layout(place.read("zarr.json"), where=f"{place.url}/zarr.json")
        completion = read_completion(place)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            "there is no activation store here", where=place.url, fix=Command("collect")
        ) from None
    except UserError as error:
        return _report(place.url, full, [], list(error.problems))
    if completion is None:
        problem = Problem(
            what="the store is not finished", where=place.url, expected="records/complete.json"
        )
        return _report(place.url, full, [], [problem])
    records, problems = read_records(place, layout, completion)
    problems += _problems_of_metadata(place, layout)
    if full:
        problems += _problems_of_documents(place, completion)
        problems += _problems_of_bytes(place, layout, records, context)
    return _report(place.url, full, records, problems)


def describe_store(url: str | Path) -> dict[str, Any]:
    """What a store holds, as JSON values; also of an unfinished one."""
    place = open_place(url)
    try:
        layout = parse_layout(place.read("zarr.json"), where=f"{place.url}/zarr.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            "there is no activation store here", where=place.url, fix=Command("collect")
        ) from None
    is_complete = read_completion(place) is not None
    found = {
        "url": place.url,
        "complete": is_complete,
        "n_rows": layout.n_rows,
        "n_context": layout.n_context,
        "n_shards": layout.n_shards,
        "n_shards_recorded": sum(
            read_record(place, shard) is not None for shard in range(layout.n_shards)
        ),
        "shard_rows": layout.shard_rows,
        "chunk_rows": layout.chunk_rows,
        "dtype": layout.dtype,
        "n_bytes": sum(place.sizes().values()),
        "provenance": dict(layout.provenance),
    }
    return (
        {**found, **_describe_rows(url)}
        if is_complete
        else {**found, "sites": [site.name for site in layout.sites]}
    )


def _describe_rows(url: str | Path) -> dict[str, Any]:
    store = ActivationStore.open(url)
    sites = []
    for name in store.names:
        statistics = store.statistics(name)
        sites.append(
            {
                "name": name,
                "width": store.width(name),
                "median_norm": statistics.median_norm,
                "total_variance": statistics.total_variance,
                "n_non_finite": statistics.n_non_finite,
                **(
                    {"variance_lost": store.variance_lost(name)}
                    if store.layout.dtype == "int8"
                    else {}
                ),
            }
        )
    return {
        "n_documents": len(store.tokens().documents),
        "n_train_rows": len(store.kept_rows("train")),
        "n_validation_rows": len(store.kept_rows("validation")),
        "sites": sites,
    }


def _report(url: str, full: bool, records: list[ShardRecord], problems: list[Problem]) -> Report:
    sizes = [each.size for record in records for each in record.files.values()]
    lost: dict[str, float] = {}
    for record in records:
        for name, each in record.variance_lost.items():
            lost[name] = max(each, lost.get(name, 0.0))
    problems += [
        Problem(
            what="int8 lost too much of the variance",
            where=name,
            expected=f"at most {MOST_LOST:g}",
            found=f"{each:.2g}",
        )
        for name, each in lost.items()
        if not each <= MOST_LOST
    ]
    return Report(
        url=url,
        is_full=full,
        n_shards=len(records),
        n_files=len(sizes),
        n_bytes=sum(sizes),
        problems=tuple(problems),
        variance_lost=lost,
    )


def _problems_of_metadata(place: Place, layout: StoreLayout) -> list[Problem]:
    problems = []
    for name, text in layout.iter_metadata():
        try:
            if place.read(name) != text.encode():
                problems.append(Problem(what="the metadata was changed", where=name))
        except FileNotFoundError:
            problems.append(Problem(what="the metadata is missing", where=name))
    return problems


def _problems_of_documents(place: Place, completion: Completion) -> list[Problem]:
    try:
        if sum_of(place.read(DOCUMENTS)) == completion.documents:
            return []
    except FileNotFoundError:
        pass
    return [Problem(what="the document table is damaged", where=DOCUMENTS)]


def _problems_of_bytes(
    place: Place, layout: StoreLayout, records: list[ShardRecord], context: Machines
) -> list[Problem]:
    problems: list[Problem] = []
    check = functools.partial(problems_of_shard, place.url, layout)
    for done, found in enumerate(map_shards(check, records, context), start=1):
        problems += found
        context.progress("verify", done, len(records))
    return sorted(problems, key=str)


def problems_of_shard(url: str, layout: StoreLayout, record: ShardRecord) -> list[Problem]:
    """Files of a shard whose bytes are not those of its record. Missing files and sizes are
    reported elsewhere."""
    place = open_place(url)
    problems = []
    chunks_of = {layout.rows_array(site).file_of(record.shard): site for site in layout.sites}
    for name, expected in record.files.items():
        if (
            place.size(name) != expected.size
            or _xxh3_of(place, name, expected.size) == expected.xxh3
        ):
            continue
        found = None
        if name in chunks_of:
            bad = _bad_chunks(place, layout, record, chunks_of[name].name)
            found = f"chunks {', '.join(map(str, bad))}" if bad else "a whole file of another run"
        problems.append(
            Problem(what=f"shard {record.shard}: checksum differs", where=name, found=found)
        )
    return problems


def _xxh3_of(place: Place, name: str, size: int) -> str:
    hasher = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(size, _PIECE)))
    for offset in range(0, size, _PIECE):
        piece = buffer[: min(_PIECE, size - offset)]
        hasher.update(piece[: place.read_into(name, offset, [piece])])
    return hasher.hexdigest()


def _bad_chunks(
    place: Place, layout: StoreLayout, record: ShardRecord, site_name: str
) -> list[int]:
    site = next(site for site in layout.sites if site.name == site_name)
    array = layout.rows_array(site)
    out = np.empty((layout.chunk_rows, site.width), dtype=array.dtype)
    bad = []
    for chunk in range(-(-(record.stop - record.start) // layout.chunk_rows)):
        try:
            read_chunks(place, array, record.shard, chunk, out)
        except UserError:
            bad.append(chunk)
    return bad


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
