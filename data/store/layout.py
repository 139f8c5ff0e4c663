"""The layout of an activation store: names, shapes, dtypes and the Zarr v3 metadata of every array
in it.

A store is one Zarr v3 group (docs/formats.md, "Activation store", is the normative text):

    zarr.json                       the group; attributes.featureflow describes the store
    tokens/{id,document,position,flags}    one value a row, stored once for all sites
    sites/<name>/rows               (row, d_model); shards of `shard_rows`, inner chunks of
    `chunk_rows`, crc32c on each
    sites/<name>/norm               (row,) float32, the norm of the row as stored
    sites/<name>/moments            (shard, 2, d_model) float64: mean, and sum of squared
    deviations, over kept rows
    sites/<name>/{scale,standard}   int8 only: a scale a row; mean and spread of each dimension, a
    pair a chunk
    records/<shard>.json            sizes and checksums of the shard's files, written last: no
    record, no shard
    records/complete.json           the checksums of all records; written when the store is complete
    records/documents.parquet       one row a document: source, title, label

The metadata is written here as plain JSON, so that making a store costs no engine; tests open it
with two foreign engines.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from featureflow.errors import Command, Problem, UserError

SCHEMA = 1
FORMAT = "featureflow activation store"
StoredDtype = Literal["bfloat16", "float16", "float32", "int8"]
STORED_AS: dict[str, str] = {
    "bfloat16": "uint16",
    "float16": "float16",
    "float32": "float32",
    "int8": "int8",
}
TOKEN_COLUMNS: dict[str, str] = {
    "id": "uint32",
    "document": "uint32",
    "position": "uint32",
    "flags": "uint8",
}
COMPLETE = "records/complete.json"
DOCUMENTS = "records/documents.parquet"
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_SINGLE_BYTE = {"name": "bytes"}
_CRC = {"name": "crc32c"}
_ITEM_SIZE = {
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "float16": 2,
    "uint32": 4,
    "float32": 4,
    "float64": 8,
}


@dataclass(frozen=True, kw_only=True)
class SiteLayout:
    """One site of a store: the name of its folder and the width of its vectors."""

    name: str
    width: int


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """One Zarr array: chunks of `chunk` (the unit that is one file), each in `inner` rows when it
    is a shard."""

    path: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    dtype: str
    dimensions: tuple[str, ...]
    inner_rows: int | None = None
    logical_dtype: str | None = None

    @property
    def row_bytes(self) -> int:
        return math.prod(self.chunk[1:]) * _ITEM_SIZE[self.dtype]

    def file_of(self, index: int) -> str:
        """The file of chunk `index` of the first axis; the other axes have one chunk."""
        return "/".join([self.path, "c", str(index), *["0"] * (len(self.shape) - 1)])

    def metadata(self) -> dict[str, Any]:
        """The content of `zarr.json`."""
        plain = [_SINGLE_BYTE if _ITEM_SIZE[self.dtype] == 1 else _LITTLE, _CRC]
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0,
            "codecs": plain if self.inner_rows is None else [self._sharding(plain)],
            "attributes": {}
            if self.logical_dtype is None
            else {"logical_dtype": self.logical_dtype},
            "dimension_names": list(self.dimensions),
            "storage_transformers": [],
        }

    def _sharding(self, inner: list[dict[str, Any]]) -> dict[str, Any]:
        configuration = {
            "chunk_shape": [self.inner_rows, *self.chunk[1:]],
            "codecs": inner,
            "index_codecs": [_LITTLE, _CRC],
            "index_location": "end",
        }
        return {"name": "sharding_indexed", "configuration": configuration}


@dataclass(frozen=True, kw_only=True)
class StoreLayout:
    """Everything that fixes the bytes of a store except the activations. `n_rows` is None while it
    is not known yet.

    `validation_start` is the first row of the validation part, which holds whole documents and runs
    to the end.
    """

    sites: tuple[SiteLayout, ...]
    dtype: StoredDtype
    n_rows: int | None
    n_context: int
    shard_rows: int
    chunk_rows: int
    validation_start: int | None = None
    sink_ratio: float = 5.0
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = tuple(_problems_of_layout(self))
        if problems:
            raise UserError("the layout of the activation store is impossible", problems=problems)

    @property
    def identity(self) -> str:
        """The name of the run that may fill this store. Records of another run are refused.
        `n_rows` of a run over a stream is known only at its end, so it is no part of the name;
        provenance names the tokens."""
        plain = {**self.attributes(), "n_rows": None, "validation_start": None}
        return hashlib.sha256(canonical_json(plain).encode()).hexdigest()

    @property
    def n_shards(self) -> int:
        return -(-(self.n_rows or 0) // self.shard_rows)

    def rows_of_shard(self, shard: int) -> tuple[int, int]:
        """First row and one past the last row of a shard."""
        start = shard * self.shard_rows
        stop = start + self.shard_rows
        return start, stop if self.n_rows is None else min(stop, self.n_rows)

    def attributes(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "schema": SCHEMA,
            "n_rows": self.n_rows,
            "n_context": self.n_context,
            "shard_rows": self.shard_rows,
            "chunk_rows": self.chunk_rows,
            "validation_start": self.validation_start,
            "sink_ratio": self.sink_ratio,
            "dtype": self.dtype,
            "sites": [{"name": site.name, "width": site.width} for site in self.sites],
            "provenance": dict(self.provenance),
            **({"standard_of": "chunk"} if self.dtype == "int8" else {}),
        }

    def rows_array(self, site: SiteLayout) -> ArrayLayout:
        return ArrayLayout(
            path=f"sites/{site.name}/rows",
            shape=(self.n_rows or 0, site.width),
            chunk=(self.shard_rows, site.width),
            dtype=STORED_AS[self.dtype],
            dimensions=("row", "d_model"),
            inner_rows=self.chunk_rows,
            logical_dtype=self.dtype,
        )

    def token_array(self, column: str) -> ArrayLayout:
        return self._per_row(f"tokens/{column}", TOKEN_COLUMNS[column])

    def norm_array(self, site: SiteLayout) -> ArrayLayout:
        return self._per_row(f"sites/{site.name}/norm", "float32")

    def scale_array(self, site: SiteLayout) -> ArrayLayout:
        return self._per_row(f"sites/{site.name}/scale", "float32")

    def moments_array(self, site: SiteLayout) -> ArrayLayout:
        return ArrayLayout(
            path=f"sites/{site.name}/moments",
            shape=(self.n_shards, 2, site.width),
            chunk=(1, 2, site.width),
            dtype="float64",
            dimensions=("shard", "moment", "d_model"),
        )

    def standard_array(self, site: SiteLayout) -> ArrayLayout:
        per_shard = self.shard_rows // self.chunk_rows
        return ArrayLayout(
            path=f"sites/{site.name}/standard",
            shape=(self.n_shards * per_shard, 2, site.width),
            chunk=(per_shard, 2, site.width),
            dtype="float32",
            dimensions=("chunk", "moment", "d_model"),
        )

    def iter_arrays(self) -> Iterator[ArrayLayout]:
        """All arrays, in the order in which a shard is written."""
        for site in self.sites:
            yield from self.arrays_of_site(site)
        for column in TOKEN_COLUMNS:
            yield self.token_array(column)

    def arrays_of_site(self, site: SiteLayout) -> tuple[ArrayLayout, ...]:
        always = (self.rows_array(site), self.norm_array(site), self.moments_array(site))
        return (
            (*always, self.scale_array(site), self.standard_array(site))
            if self.dtype == "int8"
            else always
        )

    def iter_metadata(self) -> Iterator[tuple[str, str]]:
        """Every `zarr.json` of the store: its name and its text. The root comes last."""
        groups = ["records", "tokens", "sites", *(f"sites/{site.name}" for site in self.sites)]
        for group in groups:
            yield f"{group}/zarr.json", _json(_group({}))
        for array in self.iter_arrays():
            yield f"{array.path}/zarr.json", _json(array.metadata())
        yield "zarr.json", _json(_group({"featureflow": self.attributes()}))

    def _per_row(self, path: str, dtype: str) -> ArrayLayout:
        return ArrayLayout(
            path=path,
            shape=(self.n_rows or 0,),
            chunk=(self.shard_rows,),
            dtype=dtype,
            dimensions=("row",),
        )


def record_name(shard: int) -> str:
    return f"records/{shard:06d}.json"


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def parse_layout(text: bytes, *, where: str) -> StoreLayout:
    """Read the root `zarr.json`. Raises UserError with every problem: not a store, another schema,
    missing keys."""
    try:
        document = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            "the store's metadata is not JSON", where=where, found=str(error), fix=COLLECT_AGAIN
        ) from error
    attributes = (
        document.get("attributes", {}).get("featureflow") if isinstance(document, dict) else None
    )
    if not isinstance(attributes, dict) or attributes.get("format") != FORMAT:
        raise UserError(
            "this is not an activation store",
            where=where,
            expected=f"attributes.featureflow.format = {FORMAT!r}",
            fix="give the folder that ends in store.zarr; other activations come in by "
            "`featureflow store import`",
        )
    if attributes.get("schema") != SCHEMA:
        raise UserError(
            "the store was written by another version",
            where=where,
            expected=f"schema {SCHEMA}",
            found=f"schema {attributes.get('schema')}",
            fix=COLLECT_AGAIN,
        )
    if attributes.get("dtype") == "int8" and attributes.get("standard_of") != "chunk":
        raise UserError(
            "the int8 rows are relative to the first chunk of their shard, which may lose most of "
            "their variance",
            where=where,
            expected="mean and spread of every chunk",
            fix=COLLECT_AGAIN,
        )
    return _layout_of_attributes(attributes, where)


MEND_DAMAGE = Command(
    "collect", force=True, note="sound shards are kept, damaged ones are made anew"
)
COLLECT_AGAIN = Command("collect", force=True)


def _layout_of_attributes(attributes: Mapping[str, Any], where: str) -> StoreLayout:
    expected = {
        "n_rows": int,
        "n_context": int,
        "shard_rows": int,
        "chunk_rows": int,
        "dtype": str,
        "sites": list,
    }
    problems = [
        Problem(
            what="missing or of the wrong type", where=f"{where}: {key}", expected=kind.__name__
        )
        for key, kind in expected.items()
        if not (
            isinstance(attributes.get(key), kind)
            or (key == "n_rows" and attributes.get(key, 0) is None)
        )
    ]
    if not problems:
        try:
            sites = tuple(
                SiteLayout(name=str(site["name"]), width=int(site["width"]))
                for site in attributes["sites"]
            )
        except (KeyError, TypeError, ValueError):
            problems.append(
                Problem(what="not a list of sites", where=f"{where}: sites", expected="name, width")
            )
    if problems:
        raise UserError(
            "the store's metadata is damaged", problems=tuple(problems), fix=COLLECT_AGAIN
        )
    plain = {
        key: attributes[key] for key in ("n_rows", "n_context", "shard_rows", "chunk_rows", "dtype")
    }
    optional = {
        key: attributes[key]
        for key in ("validation_start", "sink_ratio", "provenance")
        if key in attributes
    }
    return StoreLayout(sites=sites, **plain, **optional)


def _problems_of_layout(layout: StoreLayout) -> Iterator[Problem]:
    if layout.dtype not in STORED_AS:
        yield Problem(
            what="unknown dtype",
            where="dtype",
            expected=", ".join(STORED_AS),
            found=str(layout.dtype),
        )
    if not layout.sites:
        yield Problem(what="a store needs at least one site", where="sites")
    names = [site.name for site in layout.sites]
    if len(set(names)) != len(names):
        yield Problem(what="a site is named twice", where="sites", found=", ".join(names))
    for site in layout.sites:
        if not _SAFE_NAME.fullmatch(site.name) or site.width < 1:
            yield Problem(
                what="not usable as a site",
                where="sites",
                found=f"{site.name!r}, width {site.width}",
                expected="letters, digits, '_', '.', '-' and a width of at least 1",
            )
    if (
        layout.chunk_rows < 1
        or layout.shard_rows < 1
        or layout.shard_rows % max(layout.chunk_rows, 1)
    ):
        yield Problem(
            what="shards are whole numbers of chunks",
            where="shard_rows, chunk_rows",
            found=f"{layout.shard_rows}, {layout.chunk_rows}",
            expected="shard_rows a multiple of chunk_rows",
        )
    if layout.n_context < 1 or layout.shard_rows % max(layout.n_context, 1):
        yield Problem(
            what="a context may not straddle two shards",
            where="shard_rows, n_context",
            found=f"{layout.shard_rows}, {layout.n_context}",
            expected="shard_rows a multiple of n_context",
        )


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def _json(document: Mapping[str, Any]) -> str:
    return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
