"""Chunks of one shard while it is written: buffered rows of all sites in, encoded chunks, flags and
statistics out."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from data.store.encoding import MOST_LOST, Standard, decode, decode_int8, encode, quantise
from data.store.layout import STORED_AS, SiteLayout, StoreLayout
from data.store.places import Place
from data.store.shards import FileSum, ShardFile, write_chunk_file
from data.store.statistics import N_BINS, Moments, empty_moments, histogram_of, moments_of, norms_of
from data.tokens import FLAG_NON_FINITE, FLAG_SINK, TokenTable
from featureflow.errors import Problem, UserError

# at a time: one after the other, three files a site wait for the disk longer than they take to
# write
_FLUSHES = 8
_RESIDUAL = ("resid_post", "resid_pre", "resid_mid")


@dataclass(frozen=True, kw_only=True)
class ChunkStatistics:
    """What a shard's record and small arrays need. `flags` has the sinks and non-finite rows
    added."""

    flags: np.ndarray
    n_kept: int
    n_non_finite: Mapping[str, int]
    histograms: Mapping[str, np.ndarray]
    variance_lost: Mapping[str, float]


class ShardChunks:
    """Collects rows into chunks and writes each chunk of all sites when it is full."""

    def __init__(
        self,
        place: Place,
        layout: StoreLayout,
        shard: int,
        tokens: TokenTable,
        allow_non_finite: bool,
    ) -> None:
        self._place, self._layout, self._shard = place, layout, shard
        self._allow_non_finite = allow_non_finite
        self._flags = tokens.flags.astype(np.uint8, copy=True)
        self._sites = [
            _SiteChunks(place, layout, site, shard, len(tokens)) for site in layout.sites
        ]
        residual = [each for each in self._sites if each.site.name.endswith(_RESIDUAL)]
        self._sink_sites = residual or self._sites
        self._n_written = 0
        self._n_pending = 0

    def append(self, rows: Mapping[str, Tensor | np.ndarray]) -> None:
        n = self._checked_length(rows)
        encoded = {each.site.name: each.prepared(rows[each.site.name]) for each in self._sites}
        done = 0
        while done < n:
            step = min(n - done, self._layout.chunk_rows - self._n_pending)
            for each in self._sites:
                each.buffer[self._n_pending : self._n_pending + step] = encoded[each.site.name][
                    done : done + step
                ]
            self._n_pending += step
            done += step
            if self._n_pending == self._layout.chunk_rows:
                self._write_chunk()

    def finish(self) -> tuple[dict[str, FileSum], ChunkStatistics]:
        """Write the last, shorter chunk and the small arrays. Raises UserError if rows are
        missing."""
        if self._n_pending:
            self._write_chunk()
        if self._n_written != len(self._flags):
            raise UserError(
                "the shard got too few rows",
                where=f"{self._place.url} (shard {self._shard})",
                expected=str(len(self._flags)),
                found=str(self._n_written),
            )
        kept = self._flags == 0
        files: dict[str, FileSum] = {}
        with ThreadPoolExecutor(_FLUSHES, thread_name_prefix="store-flush") as flushes:
            for finished in flushes.map(_SiteChunks.finish, self._sites):
                files.update(finished)
        statistics = ChunkStatistics(
            flags=self._flags,
            n_kept=int(kept.sum()),
            n_non_finite={each.site.name: each.n_non_finite for each in self._sites},
            histograms={each.site.name: each.histogram for each in self._sites},
            variance_lost={each.site.name: each.variance_lost for each in self._sites},
        )
        return files, statistics

    def abandon(self) -> None:
        for each in self._sites:
            each.file.abandon()

    def _write_chunk(self) -> None:
        n = self._n_pending
        flags = self._flags[self._n_written : self._n_written + n]
        norms = {each.site.name: each.measured(n) for each in self._sites}
        self._refuse_non_finite()
        finite = np.logical_and.reduce([np.isfinite(each) for each in norms.values()])
        flags[~finite] |= FLAG_NON_FINITE
        plain = flags == 0
        for each in self._sink_sites:
            values = norms[each.site.name]
            if plain.any():
                flags[plain & (values > self._layout.sink_ratio * np.median(values[plain]))] |= (
                    FLAG_SINK
                )
        for each in self._sites:
            each.write(n, self._n_written, flags == 0)
        self._refuse_lost_variance()
        self._n_written += n
        self._n_pending = 0

    def _refuse_lost_variance(self) -> None:
        problems = tuple(
            Problem(
                what="int8 loses too much of the variance",
                where=f"{each.site.name}, rows {first} to {first + self._layout.chunk_rows}",
                expected=f"at most {MOST_LOST:g}",
                found=f"{each.variance_lost:.2g}",
            )
            for each in self._sites
            for first in [self._shard * self._layout.shard_rows + self._n_written]
            if each.variance_lost > MOST_LOST
        )
        if problems:
            raise UserError(
                "these activations cannot be stored as int8",
                problems=problems,
                fix="choose dtype = bfloat16, float16 or float32",
            )

    def _checked_length(self, rows: Mapping[str, Tensor | np.ndarray]) -> int:
        missing = [each.site.name for each in self._sites if each.site.name not in rows]
        if missing:
            raise UserError(
                "activations are missing", where=f"shard {self._shard}", expected=", ".join(missing)
            )
        shapes = {each.site.name: tuple(rows[each.site.name].shape) for each in self._sites}
        n = next(iter(shapes.values()))[0]
        problems = [
            Problem(
                what="rows of the wrong shape",
                where=each.site.name,
                expected=str((n, each.site.width)),
                found=str(found),
            )
            for each in self._sites
            if (found := shapes[each.site.name]) != (n, each.site.width)
        ]
        if self._n_written + self._n_pending + n > len(self._flags):
            problems.append(
                Problem(what="more rows than the shard has", where=f"shard {self._shard}")
            )
        if problems:
            raise UserError("these rows do not fit the store", problems=tuple(problems))
        return n

    def _refuse_non_finite(self) -> None:
        bad = {each.site.name: each.n_non_finite for each in self._sites if each.n_non_finite}
        if bad and not self._allow_non_finite:
            raise UserError(
                "activations are not finite",
                problems=tuple(
                    Problem(
                        what=f"{n} numbers are not finite", where=f"{name}, shard {self._shard}"
                    )
                    for name, n in bad.items()
                ),
                fix="dtype = bfloat16 or float32 if float16 overflows; allow_non_finite counts "
                "and skips such rows",
            )


class _SiteChunks:
    """One site: a buffer of one chunk, its open shard file, and statistics so far."""

    def __init__(
        self, place: Place, layout: StoreLayout, site: SiteLayout, shard: int, n_rows: int
    ) -> None:
        self.site = site
        self._place, self._layout, self._shard = place, layout, shard
        self._is_int8 = layout.dtype == "int8"
        buffer_dtype = "float32" if self._is_int8 else STORED_AS[layout.dtype]
        self.buffer = np.zeros((layout.chunk_rows, site.width), dtype=buffer_dtype)
        self.file = ShardFile(place, layout.rows_array(site), shard)
        self.n_non_finite = 0
        self.histogram = np.zeros(N_BINS, dtype=np.int64)
        self._norms = np.zeros(n_rows, dtype=np.float32)
        self._scale = np.ones(n_rows if self._is_int8 else 0, dtype=np.float32)
        self._standards: list[Standard] = []
        self.variance_lost = 0.0
        self._moments: Moments = empty_moments(site.width)
        self._chunk_norms = np.zeros(0, dtype=np.float32)

    def prepared(self, rows: Tensor | np.ndarray) -> np.ndarray:
        return encode(rows, "float32" if self._is_int8 else self._layout.dtype)

    def measured(self, n: int) -> np.ndarray:
        """Norms of the first n buffered rows; counts what is not finite."""
        values = self._values(n)
        self._chunk_norms = norms_of(values)
        if not np.isfinite(self._chunk_norms).all():
            self.n_non_finite += int((~np.isfinite(values)).sum())
        return self._chunk_norms

    def write(self, n: int, start: int, kept: np.ndarray) -> None:
        """Append the chunk to the file and its kept rows to the statistics."""
        self.buffer[n:] = 0
        if self._is_int8:
            values = self._write_int8(n, start, kept)
            self._chunk_norms = norms_of(values)
        else:
            self.file.append(self.buffer)
            values = self._values(n)
        self._norms[start : start + n] = self._chunk_norms
        self.histogram += histogram_of(self._chunk_norms[kept])
        self._moments = self._moments.merged(moments_of(values, kept))

    def finish(self) -> dict[str, FileSum]:
        place, layout, site, shard = self._place, self._layout, self.site, self._shard
        norm, moments = layout.norm_array(site), layout.moments_array(site)
        files = {layout.rows_array(site).file_of(shard): self.file.finish()}
        files[norm.file_of(shard)] = write_chunk_file(place, norm, shard, self._norms)
        stacked = np.stack([self._moments.mean, self._moments.m2])[None]
        files[moments.file_of(shard)] = write_chunk_file(place, moments, shard, stacked)
        if self._is_int8:
            scale, standard = layout.scale_array(site), layout.standard_array(site)
            pairs = np.stack([np.stack([each.mean, each.spread]) for each in self._standards])
            files[scale.file_of(shard)] = write_chunk_file(place, scale, shard, self._scale)
            files[standard.file_of(shard)] = write_chunk_file(place, standard, shard, pairs)
        return files

    def _values(self, n: int) -> np.ndarray:
        return (
            self.buffer[:n].copy() if self._is_int8 else decode(self.buffer[:n], self._layout.dtype)
        )

    def _write_int8(self, n: int, start: int, kept: np.ndarray) -> np.ndarray:
        standard, stored, scale, lost = quantise(self.buffer[:n], kept)
        self._standards.append(standard)
        self.variance_lost = max(self.variance_lost, lost)
        chunk = np.zeros((self._layout.chunk_rows, self.site.width), dtype=np.int8)
        chunk[:n] = stored
        self.file.append(chunk)
        self._scale[start : start + n] = scale
        return decode_int8(stored, scale, standard)
