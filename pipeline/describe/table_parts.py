"""The parts of the Parquet tables that one site contributes; `pipeline/describe/tables.py` joins
them.

features   one row a latent        labels   one row a label        examples   one row an example
"""

from __future__ import annotations

import gzip
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from pipeline.describe.examples import NO_DECILE, TABS
from pipeline.describe.labels import Label
from pipeline.site.graph import CLASSES
from pipeline.site.pages import SitePages, overview_shard
from pipeline.site.shards import PAD

PARTS = ("features", "labels", "examples")
AS_CSV = ("features", "labels")
_N_LISTED = 5


def write_parts(folder: Path, pages: SitePages) -> None:
    """Write `features.parquet`, `labels.parquet`, `examples.parquet` of one site into `folder`, and
    the first two as CSV, where the first site's part has the header."""
    made = {
        "features": features_part(pages),
        "labels": labels_part(pages),
        "examples": examples_part(pages),
    }
    for name, table in made.items():
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")
    for name in AS_CSV:
        write_csv(made[name], folder / f"{name}.csv.gz", header=pages.index == 0)


def write_csv(table: pa.Table, out: Path, *, header: bool) -> None:
    """Lists become texts joined by spaces between bars, so that a spreadsheet shows them."""
    table = table.cast(plain_schema(table.schema))
    for i, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            joined = pc.binary_join(
                table.column(i).combine_chunks().cast(pa.list_(pa.string())), " | "
            )
            table = table.set_column(i, field.name, joined)
    with (
        out.open("wb") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=6, mtime=0) as stream,
    ):
        pacsv.write_csv(table, stream, pacsv.WriteOptions(include_header=header))


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Dictionary-encoded strings as plain ones (Parquet encodes them anyway), nulls typed."""
    fields = []
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        fields.append(pa.field(field.name, pa.float32() if pa.types.is_null(kind) else kind))
    return pa.schema(fields)


def features_part(pages: SitePages) -> pa.Table:
    c, overview = pages.columns, overview_shard(pages).columns
    n = pages.n_latents
    best = [labels[0] if labels else None for labels in pages.labels]
    return pa.table(
        {
            "feature": [f"{pages.short}/{f}" for f in range(n)],
            "site": pa.array([pages.short] * n).dictionary_encode(),
            "latent": np.arange(n, dtype=np.int32),
            "label": pages.shown,
            "label_accepted": [label is not None and label.accepted for label in best],
            "label_method": pa.array(
                [None if label is None else label.method for label in best]
            ).dictionary_encode(),
            "label_score": pa.array(
                [None if label is None else label.score for label in best], pa.float32()
            ),
            "alive": c["count"] > 0,
            "n_firings": c["count"],
            "n_documents": c["n_documents"],
            "density": overview["density"],
            "mean": c["mean"],
            "std": c["std"],
            "max": c["max"],
            "threshold": pa.array(c["threshold"], from_pandas=True),
            "class": pa.array(np.array(CLASSES)[overview["class"]]).dictionary_encode(),
            "birth_layer": _known(overview["birth"], -1),
            "death_layer": _known(overview["death"], -1),
            "community": _known(overview["community"].astype(np.int32), 65535),
            "n_links_in": overview["n_in"],
            "n_links_out": overview["n_out"],
            "output_kurtosis": pa.array(c["output_kurtosis"], from_pandas=True),
            "tokens": _texts(pages, "token"),
            "promotes": _texts(pages, "promotes"),
            "suppresses": _texts(pages, "suppresses"),
        }
    )


def labels_part(pages: SitePages) -> pa.Table:
    flat = [
        (latent, rank, label)
        for latent, labels in enumerate(pages.labels)
        for rank, label in enumerate(labels)
    ]
    columns: dict[str, list | pa.Array] = {
        "feature": [f"{pages.short}/{latent}" for latent, _, _ in flat],
        "rank": pa.array([rank for _, rank, _ in flat], pa.int16()),
    }
    types = {
        "text": pa.string(),
        "method": pa.string(),
        "accepted": pa.bool_(),
        "n": pa.int32(),
        "origin": pa.string(),
    }
    for field in fields(Label):
        values = [getattr(label, field.name) for _, _, label in flat]
        columns[field.name] = pa.array(values, types.get(field.name, pa.float32()))
    return pa.table(columns)


def examples_part(pages: SitePages) -> pa.Table:
    c, corpus = pages.columns, pages.corpus
    latent = np.repeat(np.arange(pages.n_latents), _lengths(c["example_offset"]))
    row = c["example_row"].astype(np.int64)
    return pa.table(
        {
            "site": pa.array([pages.short] * len(row)).dictionary_encode(),
            "latent": latent.astype(np.int32),
            "tab": pa.DictionaryArray.from_arrays(
                pa.array(c["example_tab"], pa.int8()), list(TABS)
            ),
            "decile": _known(c["example_decile"].astype(np.int16), NO_DECILE),
            "row": row,
            "document": corpus.document[row],
            "position": corpus.position[row],
            "token": corpus.token[row],
            "value": c["example_value"],
            "gap": pa.array(c["example_gap"], from_pandas=True),
        }
    )


def _lengths(offset: np.ndarray) -> np.ndarray:
    return offset[1:].astype(np.int64) - offset[:-1].astype(np.int64)


def _known(values: np.ndarray, missing: int) -> pa.Array:
    return pa.array(values, mask=values == missing)


def _texts(pages: SitePages, name: str) -> pa.Array:
    """The first few tokens of a column as lists of strings."""
    ids = pages.columns[name][:, :_N_LISTED].astype(np.int64)
    filled = ids != PAD
    unique, inverse = np.unique(ids[filled], return_inverse=True)
    text = pa.array([pages.corpus.vocabulary.text(int(t)) for t in unique], pa.string())
    offset = np.concatenate([[0], filled.sum(axis=1).cumsum()])
    return pa.ListArray.from_arrays(pa.array(offset, pa.int32()), text.take(pa.array(inverse)))
