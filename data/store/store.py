"""Reading a store: a path or URL in, rows that can be trusted out.

1. `ActivationStore.open` reads the metadata, the completion record and every shard record, and
   compares the size of every file; a store that is unfinished, damaged or of another version is
   refused with all problems.
2. `read` and `batches` compare the crc32c of every chunk they touch. A missing chunk is an error,
   never zeros.
3. `kept_rows` says which rows to train on, or to validate on; no document is in both.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, reduce
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow.parquet as pq
import xxhash
from jaxtyping import Float, Int64

from data.store.encoding import Standard, decode, decode_int8
from data.store.layout import (
    DOCUMENTS,
    MEND_DAMAGE,
    TOKEN_COLUMNS,
    SiteLayout,
    StoreLayout,
    parse_layout,
    record_name,
)
from data.store.places import Place, open_place
from data.store.shards import (
    Completion,
    ShardRecord,
    iter_problems_of_record,
    parse_record,
    read_chunk_file,
    read_chunks,
    read_completion,
    sum_of,
)
from data.store.statistics import N_BINS, Moments, SiteStatistics
from data.tokens import DocumentRow, RowFilters, TokenTable
from featureflow.errors import Command, Problem, UserError
from featureflow.sites import Site, named_site, parse_site

if TYPE_CHECKING:
    import dask.array

    from data.store.batches import BatchReader

Split = Literal["train", "validation"]
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


class ActivationStore:
    """A finished store. Cheap to open; safe to read from many threads."""

    def __init__(self, place: Place, layout: StoreLayout, records: Sequence[ShardRecord]) -> None:
        self.place = place
        self.layout = layout
        self.records = tuple(records)
        self._by_name = {site.name: site for site in layout.sites}

    @classmethod
    def open(cls, url: str | Path) -> ActivationStore:
        """Open a finished store. Raises UserError with every problem that names and sizes show."""
        place = open_place(url)
        try:
            text = place.read("zarr.json")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                "there is no activation store here",
                where=place.url,
                expected="a folder with zarr.json",
                fix=Command("collect"),
            ) from None
        layout = parse_layout(text, where=f"{place.url}/zarr.json")
        completion = read_completion(place)
        if completion is None:
            n_done = sum(name.rpartition("/")[2][:6].isdecimal() for name in place.sizes("records"))
            raise UserError(
                "the activation store is not finished",
                where=place.url,
                found=f"{n_done} of {layout.n_shards or '?'} shards",
                fix=Command("collect", note="it takes up what is there"),
            )
        records, problems = read_records(place, layout, completion)
        if problems:
            raise UserError(
                f"{place.url} cannot be trusted", problems=tuple(problems), fix=MEND_DAMAGE
            )
        return cls(place, layout, records)

    @property
    def url(self) -> str:
        return self.place.url

    @property
    def names(self) -> tuple[str, ...]:
        """The sites as they are named in the store; also those of models that are no
        transformers."""
        return tuple(self._by_name)

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The sites of a transformer; names of another form are left out (see `names`). Where no
        name is a transformer's, all of them as named sites in the order of the store."""
        found = []
        for name in self.names:
            with suppress(UserError):
                found.append(parse_site(name))
        return tuple(found or starmap(named_site, enumerate(self.names)))

    @cached_property
    def _by_any_name(self) -> dict[str, SiteLayout]:
        named = (site for site in self.sites if site.called in self._by_name)
        return self._by_name | {site.name: self._by_name[site.called] for site in named}

    @property
    def is_of_any_module(self) -> bool:
        """Whether the sites are named, so that there is no language model behind them."""
        return any(site.called for site in self.sites)

    def check_language_model(self) -> None:
        """Raises UserError where there is none."""
        if self.is_of_any_module:
            raise UserError(
                "this needs a language model, and the activations are of another kind of module",
                where=self.url,
                found=", ".join(site.short for site in self.sites),
                fix="look with a lens that reads only activations, SAEs and the graph",
            )

    @property
    def n_rows(self) -> int:
        return self.layout.n_rows or 0

    @property
    def n_context(self) -> int:
        return self.layout.n_context

    @property
    def shard_rows(self) -> int:
        return self.layout.shard_rows

    @property
    def chunk_rows(self) -> int:
        return self.layout.chunk_rows

    @property
    def validation_start(self) -> int:
        """First row of the validation part; `n_rows` when there is none."""
        start = self.layout.validation_start
        return self.n_rows if start is None else start

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.layout.provenance

    def width(self, site: Site | str) -> int:
        return self.site_layout(site).width

    def site_layout(self, site: Site | str) -> SiteLayout:
        """The layout of a site. Raises UserError naming the sites there are."""
        try:
            return self._by_any_name[str(site)]
        except KeyError:
            raise UserError(
                f"the store has no site {site}",
                where=self.url,
                expected=", ".join(self.names),
                fix="collect again with this site in `sites`",
            ) from None

    def tokens(self) -> TokenTable:
        """The token table, read once and kept."""
        return self._tokens

    def read(self, site: Site | str, start: int, stop: int) -> Float[np.ndarray, "row d_model"]:
        """Rows `start` to `stop` as float32, checksums compared. Reads whole chunks."""
        if not 0 <= start <= stop <= self.n_rows:
            raise UserError(
                "rows outside the store",
                found=f"{start}:{stop}",
                expected=f"within 0:{self.n_rows}",
            )
        layout = self.site_layout(site)
        out = np.empty((stop - start, layout.width), dtype=np.float32)
        chunk = self.chunk_rows
        row = start
        while row < stop:
            shard = row // self.shard_rows
            end = min(stop, (shard + 1) * self.shard_rows)
            first, last = row // chunk, -(-end // chunk)
            stored = np.empty(
                ((last - first) * chunk, layout.width), dtype=self.layout.rows_array(layout).dtype
            )
            self.read_stored(layout, first, stored)
            here, wanted = (
                slice(row - start, end - start),
                slice(row - first * chunk, end - first * chunk),
            )
            if self.layout.dtype == "int8":
                out[here] = self.decoded(layout, stored, first * chunk)[wanted]
            else:
                decode(stored[wanted], self.layout.dtype, out=out[here])
            row = end
        return out

    def read_stored(self, site: SiteLayout, first_chunk: int, out: np.ndarray) -> None:
        """Whole chunks of one shard as stored, into a contiguous buffer. The fast path under `read`
        and `batches`."""
        per_shard = self.shard_rows // self.chunk_rows
        shard, first = divmod(first_chunk, per_shard)
        read_chunks(self.place, self.layout.rows_array(site), shard, first, out)

    def decoded(
        self, site: SiteLayout, stored: np.ndarray, start: int
    ) -> Float[np.ndarray, "row d_model"]:
        """float32 values of whole stored chunks that begin at row `start` and lie in one shard."""
        if self.layout.dtype != "int8":
            return decode(stored, self.layout.dtype)
        shard, offset = divmod(start, self.shard_rows)
        scale = self._shard_scale(site, shard)[offset : offset + len(stored)]
        pairs = read_chunk_file(self.place, self.layout.standard_array(site), shard)
        values = np.empty(stored.shape, dtype=np.float32)
        for first in range(0, len(stored), self.chunk_rows):
            rows = slice(first, first + self.chunk_rows)
            mean, spread = pairs[(offset + first) // self.chunk_rows]
            values[rows] = decode_int8(
                stored[rows], scale[rows], Standard(mean=mean, spread=spread)
            )
        return values

    def scales(self, site: SiteLayout) -> Float[np.ndarray, "row"]:
        """The int8 scale of every row."""
        return self._column(
            [self._shard_scale(site, shard) for shard in range(self.layout.n_shards)]
        )

    def variance_lost(self, site: Site | str) -> float:
        """The largest fraction of a chunk's variance that storing lost; 0 where it was not int8."""
        name = self.site_layout(site).name
        return max((record.variance_lost.get(name, 0.0) for record in self.records), default=0.0)

    def norms(self, site: Site | str) -> Float[np.ndarray, "row"]:
        """The norm of every row, as gathered when it was written."""
        array = self.layout.norm_array(self.site_layout(site))
        return self._column(
            [read_chunk_file(self.place, array, shard) for shard in range(self.layout.n_shards)]
        )

    def norms_of_shard(self, site: SiteLayout, shard: int) -> Float[np.ndarray, "row"]:
        """The stored norms of one shard's rows."""
        start, stop = self.layout.rows_of_shard(shard)
        return read_chunk_file(self.place, self.layout.norm_array(site), shard)[: stop - start]

    def statistics(self, site: Site | str) -> SiteStatistics:
        """Statistics over rows with flags = 0, from what was gathered while writing. Reads no
        activations."""
        layout = self.site_layout(site)
        histogram = np.zeros(N_BINS, dtype=np.int64)
        for record in self.records:
            histogram += np.asarray(record.histograms[layout.name], dtype=np.int64)
        n_non_finite = sum(record.n_non_finite[layout.name] for record in self.records)
        return self.statistics_from(layout, self._moments(layout), histogram, n_non_finite)

    def statistics_from(
        self, site: SiteLayout, moments: Moments, histogram: np.ndarray, n_non_finite: int
    ) -> SiteStatistics:
        """The statistics that these counts and the stored norms make."""
        kept = self.norms(site.name)[self.tokens().flags == 0]
        quantiles = np.quantile(kept, _QUANTILES) if len(kept) else np.full(len(_QUANTILES), np.nan)
        return SiteStatistics(
            n=moments.n,
            mean=moments.mean.astype(np.float32),
            variance=moments.variance.astype(np.float32),
            n_non_finite=n_non_finite,
            median_norm=float(quantiles[_QUANTILES.index(0.5)]),
            norm_quantiles=dict(zip(_QUANTILES, quantiles.tolist(), strict=True)),
            norm_histogram=histogram,
        )

    def kept_rows(
        self,
        split: Split = "train",
        filters: RowFilters | None = None,
        *,
        sites: Sequence[Site | str] = (),
    ) -> Int64[np.ndarray, "row"]:
        """Rows of a split that the filters allow, ascending. `max_norm_ratio` looks at the norms of
        `sites`."""
        filters = filters or RowFilters()
        kept = filters.keeps(self.tokens())
        if split == "train":
            kept[self.validation_start :] = False
        else:
            kept[: self.validation_start] = False
        if filters.max_norm_ratio is not None:
            for site in sites:
                norms = self.norms(site)
                kept &= norms <= filters.max_norm_ratio * np.median(norms[self.tokens().flags == 0])
        return np.flatnonzero(kept)

    def batches(
        self,
        sites: Sequence[Site | str],
        *,
        batch_size: int,
        seed: int,
        split: Split = "train",
        filters: RowFilters | None = None,
        n_epochs: int | None = None,
        **options: Any,
    ) -> BatchReader:
        """Shuffled batches of the same rows at all `sites`; see `data.store.batches.BatchReader`
        for the options."""
        from data.store.batches import BatchReader

        return BatchReader(
            self,
            sites,
            batch_size=batch_size,
            seed=seed,
            split=split,
            filters=filters,
            n_epochs=n_epochs,
            **options,
        )

    def as_dask(self, site: Site | str) -> dask.array.Array:
        """The rows of a site as a float32 Dask array, one chunk a shard. Workers open the store by
        its URL and compare checksums."""
        import dask.array as da
        from dask import delayed

        width, parts = self.width(site), []
        for shard in range(self.layout.n_shards):
            start, stop = self.layout.rows_of_shard(shard)
            part = delayed(_read_part, pure=True)(self.url, str(site), start, stop)
            parts.append(da.from_delayed(part, shape=(stop - start, width), dtype=np.float32))
        return da.concatenate(parts)

    @cached_property
    def _tokens(self) -> TokenTable:
        columns = {}
        for column in TOKEN_COLUMNS:
            array = self.layout.token_array(column)
            columns[column] = self._column(
                [read_chunk_file(self.place, array, shard) for shard in range(self.layout.n_shards)]
            )
        return TokenTable(**columns, documents=_read_documents(self.place))

    def _column(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts)[: self.n_rows] if parts else np.zeros(0)

    def _shard_scale(self, site: SiteLayout, shard: int) -> np.ndarray:
        return read_chunk_file(self.place, self.layout.scale_array(site), shard)

    def _moments(self, site: SiteLayout) -> Moments:
        array = self.layout.moments_array(site)
        parts = []
        for record in self.records:
            mean, m2 = read_chunk_file(self.place, array, record.shard)[0]
            parts.append(Moments(n=record.n_kept, mean=mean, m2=m2))
        return reduce(Moments.merged, parts)


def read_records(
    place: Place, layout: StoreLayout, completion: Completion
) -> tuple[list[ShardRecord], list[Problem]]:
    """All records, and everything that names, sizes and the records' own checksums show to be
    wrong."""
    sizes, records, problems = place.sizes(), [], []
    if completion.identity != layout.identity or completion.n_rows != layout.n_rows:
        problems.append(
            Problem(what="the completion record belongs to another store", where=place.url)
        )
    if sorted(completion.records) != list(range(layout.n_shards)):
        problems.append(Problem(what="the completion record names other shards", where=place.url))
    for shard, expected in sorted(completion.records.items()):
        try:
            content = place.read(record_name(shard))
        except FileNotFoundError:
            problems.append(Problem(what=f"shard {shard}: no record", where=record_name(shard)))
            continue
        if xxhash.xxh3_128_hexdigest(content) != expected:
            problems.append(
                Problem(what=f"shard {shard}: the record was changed", where=record_name(shard))
            )
            continue
        record = parse_record(content, where=record_name(shard))
        problems.extend(iter_problems_of_record(record, layout, sizes))
        records.append(record)
    if sizes.get(DOCUMENTS) != completion.documents.size:
        problems.append(
            Problem(what="the document table is missing or of the wrong size", where=DOCUMENTS)
        )
    return records, problems


def _read_documents(place: Place) -> tuple[DocumentRow, ...]:
    content = place.read(DOCUMENTS)
    completion = read_completion(place)
    if completion is None or sum_of(content) != completion.documents:
        raise UserError(
            "the document table is damaged", where=f"{place.url}/{DOCUMENTS}", fix=MEND_DAMAGE
        )
    rows = pq.read_table(io.BytesIO(content)).to_pylist()
    return tuple(DocumentRow(**row) for row in rows)


def _read_part(url: str, site: str, start: int, stop: int) -> Float[np.ndarray, "row d_model"]:
    return ActivationStore.open(url).read(site, start, stop)
