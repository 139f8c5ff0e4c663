"""Described features as tables for programs: `tables/*.parquet`, and features and labels as CSV.

    features.parquet labels.parquet examples.parquet     one row a latent, a label, an example
    tokens.parquet documents.parquet vocabulary.parquet  what `row`, `document` and `token` of an
    example refer to
    features.csv.gz labels.csv.gz

Every site writes its part when it is done; the parts are joined one by one, so memory stays at one
site.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from featureflow.sites import Site
from pipeline.describe.columns import PAD, Columns
from pipeline.describe.corpus import PARTS as DOCUMENT_PARTS
from pipeline.describe.corpus import Corpus
from pipeline.describe.examples import NO_DECILE, TABS
from pipeline.describe.labels import Label, shown_text
from pipeline.describe.vocabulary import Vocabulary
from pipeline.flow.graph import FlowGraph

PARTS = ("features", "labels", "examples")
AS_CSV = ("features", "labels")
_N_LISTED = 5
_TYPES = {
    "text": pa.string(),
    "method": pa.string(),
    "accepted": pa.bool_(),
    "n": pa.int32(),
    "origin": pa.string(),
    "rule": pa.string(),
    "values": pa.list_(pa.int32()),
}


def write_parts(
    folder: Path,
    site: Site,
    columns: Columns,
    labels: list[list[Label]],
    corpus: Corpus,
    graph: FlowGraph | None,
) -> None:
    """Write `features.parquet`, `labels.parquet`, `examples.parquet` of one site into `folder`."""
    made = {
        "features": _features(site, columns, labels, corpus, graph),
        "labels": _labels(site, labels),
        "examples": _examples(site, columns, corpus),
    }
    for name, table in made.items():
        pq.write_table(table, folder / f"{name}.parquet", compression="zstd")


def write_tables(folder: Path, parts: Sequence[Path], corpus: Corpus) -> None:
    """Write all tables into `folder`; `parts` are the sites' folders in order."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        _join([part / f"{name}.parquet" for part in parts], folder / name)
    _write_corpus(folder, corpus)


def read_vocabulary(path: Path) -> Vocabulary:
    """The vocabulary out of its table."""
    table = pq.read_table(path, columns=["bytes", "special"])
    special = np.flatnonzero(table.column("special").to_numpy())
    tokens = table.column("bytes").to_pylist()
    return Vocabulary(tokens=tokens, special=frozenset(special.tolist()))


def _join(parts: Sequence[Path], out: Path) -> None:
    """Parts of one schema, one after the other, a row group each; some as a spreadsheet too."""
    schema = _plain(pq.read_schema(parts[0]))
    as_csv = out.with_suffix(".csv.gz") if out.name in AS_CSV else None
    with pq.ParquetWriter(out.with_suffix(".parquet"), schema, compression="zstd") as writer:
        for i, part in enumerate(parts):
            table = pq.read_table(part).cast(schema)
            writer.write_table(table)
            if as_csv is not None:
                _append_csv(table, as_csv, header=i == 0)


def _append_csv(table: pa.Table, out: Path, *, header: bool) -> None:
    """Lists become texts joined by bars, so that a spreadsheet shows them; gzip files one after
    the other are one gzip file."""
    for i, field in enumerate(table.schema):
        if pa.types.is_list(field.type):
            lists = table.column(i).combine_chunks().cast(pa.list_(pa.string()))
            table = table.set_column(i, field.name, pc.binary_join(lists, " | "))
    with (
        out.open("wb" if header else "ab") as file,
        gzip.GzipFile(filename="", fileobj=file, mode="wb", compresslevel=6, mtime=0) as stream,
    ):
        pacsv.write_csv(table, stream, pacsv.WriteOptions(include_header=header))


def _plain(schema: pa.Schema) -> pa.Schema:
    """Dictionary-encoded strings as plain ones (Parquet encodes them anyway), nulls typed."""
    names = []
    for field in schema:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        names.append(pa.field(field.name, pa.float32() if pa.types.is_null(kind) else kind))
    return pa.schema(names)


def _features(
    site: Site, c: Columns, labels: list[list[Label]], corpus: Corpus, graph: FlowGraph | None
) -> pa.Table:
    n = len(labels)
    best = [of_latent[0] if of_latent else None for of_latent in labels]
    method = [None if label is None else label.method for label in best]
    score = [None if label is None else label.score for label in best]
    return pa.table(
        {
            "feature": [f"{site.short}/{f}" for f in range(n)],
            "site": pa.array([site.short] * n).dictionary_encode(),
            "latent": np.arange(n, dtype=np.int32),
            "label": [_shown(latent, own, c, corpus) for latent, own in enumerate(labels)],
            "label_accepted": [label is not None and label.accepted for label in best],
            "label_method": pa.array(method, pa.string()).dictionary_encode(),
            "label_score": pa.array(score, pa.float32()),
            "alive": c["count"] > 0,
            "n_active": c["count"],
            "n_documents": c["n_documents"],
            "density": (c["count"] / max(1, corpus.n_kept)).astype(np.float32),
            "mean": c["mean"],
            "std": c["std"],
            "max": c["max"],
            "threshold": pa.array(c["threshold"], from_pandas=True),
            **_flow(site, n, graph),
            "output_kurtosis": pa.array(c["output_kurtosis"], from_pandas=True),
            "tokens": _texts(c["token"], corpus),
            "promotes": _texts(c["promotes"], corpus),
            "suppresses": _texts(c["suppresses"], corpus),
        }
    )


def _shown(latent: int, labels: list[Label], c: Columns, corpus: Corpus) -> str:
    """The one line of a latent; without an accepted label it may show its strongest example."""
    first, last = (int(i) for i in c["example_offset"][latent : latent + 2])
    if not labels or labels[0].accepted or first == last:
        return shown_text(labels)
    before, peak, after = corpus.pieces(int(c["example_row"][first]), before=6, after=3)
    space = " " * peak.startswith(" ")
    example = f"{before}{space}«{peak.removeprefix(' ')}»{after}"
    return shown_text(labels, " ".join(example.split()))


def _flow(site: Site, n: int, graph: FlowGraph | None) -> dict[str, pa.Array]:
    """What the flow graph says of a site's features; all unknown without one."""
    whole = ("birth_layer", "death_layer", "community", "n_links_in", "n_links_out")
    if graph is None:
        types = {"class": pa.string(), **dict.fromkeys(whole, pa.int32())}
        return {name: pa.nulls(n, kind) for name, kind in types.items()}
    start = int(graph.start[graph.sites.index(site)])
    nodes, here = graph.nodes.iloc[start : start + n], slice(start, start + n)
    into, out = graph.degree
    community = nodes["community"].where(nodes["community"] >= 0)
    known = (nodes["birth_layer"], nodes["death_layer"], community, into[here], out[here])
    numbers = {
        name: pa.array(values, pa.int32(), from_pandas=True)
        for name, values in zip(whole, known, strict=True)
    }
    kind = nodes["class"].astype(object)
    return {"class": pa.array(kind, pa.string(), from_pandas=True), **numbers}


def _labels(site: Site, labels: list[list[Label]]) -> pa.Table:
    flat = [(latent, rank, x) for latent, own in enumerate(labels) for rank, x in enumerate(own)]
    short = pa.array([site.short] * len(flat), pa.string())
    columns: dict[str, list | pa.Array] = {
        "feature": pa.array([f"{site.short}/{latent}" for latent, _, _ in flat], pa.string()),
        "site": short.dictionary_encode(),
        "latent": pa.array([latent for latent, _, _ in flat], pa.int32()),
        "rank": pa.array([rank for _, rank, _ in flat], pa.int16()),
    }
    for field in fields(Label):
        values = [getattr(label, field.name) for _, _, label in flat]
        columns[field.name] = pa.array(values, _TYPES.get(field.name, pa.float32()))
    return pa.table(columns)


def _examples(site: Site, c: Columns, corpus: Corpus) -> pa.Table:
    offset = c["example_offset"].astype(np.int64)
    row = c["example_row"].astype(np.int64)
    decile = c["example_decile"].astype(np.int16)
    return pa.table(
        {
            "site": pa.array([site.short] * len(row), pa.string()).dictionary_encode(),
            "latent": np.repeat(np.arange(len(offset) - 1), np.diff(offset)).astype(np.int32),
            "tab": pa.DictionaryArray.from_arrays(
                pa.array(c["example_tab"], pa.int8()), list(TABS)
            ),
            "decile": pa.array(decile, mask=decile == NO_DECILE),
            "row": row,
            "document": corpus.document[row],
            "position": corpus.position[row],
            "token": corpus.token[row],
            "value": c["example_value"],
            "gap": pa.array(c["example_gap"], from_pandas=True),
        }
    )


def _texts(ids: np.ndarray, corpus: Corpus) -> pa.Array:
    """The first few tokens of a column as lists of strings."""
    ids = ids[:, :_N_LISTED].astype(np.int64)
    filled = ids != PAD
    unique, inverse = np.unique(ids[filled], return_inverse=True)
    text = pa.array([corpus.vocabulary.text(int(t)) for t in unique], pa.string())
    offset = np.concatenate([[0], filled.sum(axis=1).cumsum()])
    return pa.ListArray.from_arrays(pa.array(offset, pa.int32()), text.take(pa.array(inverse)))


def _write_corpus(folder: Path, corpus: Corpus) -> None:
    part = pa.DictionaryArray.from_arrays(pa.array(corpus.part, pa.int8()), list(DOCUMENT_PARTS))
    vocabulary = corpus.vocabulary
    tables = {
        "tokens": {
            "token": corpus.token,
            "document": corpus.document,
            "position": corpus.position,
            "kept": corpus.kept,
            "part": part,
            "held_out": corpus.held_out,
        },
        "documents": {
            "title": list(corpus.titles),
            "source": np.array(corpus.sources)[corpus.document_source],
            "label": np.array([*corpus.labels, ""])[corpus.document_label],
            **({"image": list(corpus.images)} if corpus.images else {}),
        },
        "vocabulary": {
            "token": np.arange(len(vocabulary), dtype=np.int32),
            "bytes": pa.array([bytes(t) for t in vocabulary.tokens], pa.binary()),
            "text": [vocabulary.text(t) for t in range(len(vocabulary))],
            "special": [t in vocabulary.special for t in range(len(vocabulary))],
        },
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", compression="zstd")
