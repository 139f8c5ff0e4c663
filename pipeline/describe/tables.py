"""The atlas as tables for programs: the sites' parts joined into `tables/*.parquet`, and features
and labels as CSV too.

    features.parquet labels.parquet examples.parquet     one row a latent, a label, an example
    edges.parquet                                         kept links of the flow graph
    tokens.parquet documents.parquet vocabulary.parquet   what `row`, `document` and `token` of an
    example refer to
    features.csv.gz labels.csv.gz

Parts are streamed one by one, so memory stays at one site.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.describe.corpus import PARTS as DOCUMENT_PARTS
from pipeline.describe.corpus import Corpus
from pipeline.describe.table_parts import AS_CSV, PARTS, plain_schema
from pipeline.site.graph import RELATIONS, AtlasGraph


def write_tables(
    folder: Path, parts: Sequence[Path], corpus: Corpus, graph: AtlasGraph | None
) -> None:
    """Write all tables into `folder`; `parts` are the sites' folders in order."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        join_parts([part / f"{name}.parquet" for part in parts], folder / f"{name}.parquet")
    for name in AS_CSV:
        join_bytes([part / f"{name}.csv.gz" for part in parts], folder / f"{name}.csv.gz")
    if graph is not None:
        pq.write_table(edges_table(graph), folder / "edges.parquet", compression="zstd")
    _write_corpus(folder, corpus)


def join_parts(parts: Sequence[Path], out: Path) -> None:
    """Parquet files of one schema, one after the other, a row group each."""
    schema = plain_schema(pq.read_schema(parts[0]))
    with pq.ParquetWriter(out, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(pq.read_table(part).cast(schema))


def join_bytes(parts: Sequence[Path], out: Path) -> None:
    """Files one after the other; gzip files joined so are one gzip file."""
    with out.open("wb") as stream:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, stream)


def edges_table(graph: AtlasGraph) -> pa.Table:
    """Kept links with feature ids and all their evidence."""
    links = graph.links
    short = np.array([site.short for site in graph.sites])
    ids = {
        name: pc.binary_join_element_wise(
            pa.array(short[site]), pa.array(latent).cast(pa.string()), "/"
        )
        for name, site, latent in (
            ("source", links.source_site, links.source),
            ("target", links.target_site, links.target),
        )
    }
    drop = ("source_site", "source_latent", "target_site", "target_latent", "relation", "kept")
    evidence = links.evidence.drop(columns=[c for c in drop if c in links.evidence])
    relation = pa.DictionaryArray.from_arrays(pa.array(links.relation, pa.int8()), list(RELATIONS))
    rest = pa.Table.from_pandas(evidence, preserve_index=False)
    return pa.table(
        {**ids, "relation": relation, **dict(zip(rest.column_names, rest.columns, strict=True))}
    )


def _write_corpus(folder: Path, corpus: Corpus) -> None:
    tokens = pa.table(
        {
            "token": corpus.token,
            "document": corpus.document,
            "position": corpus.position,
            "kept": corpus.kept,
            "part": pa.DictionaryArray.from_arrays(
                pa.array(corpus.part, pa.int8()), list(DOCUMENT_PARTS)
            ),
            "held_out": corpus.held_out,
        }
    )
    pq.write_table(tokens, folder / "tokens.parquet", compression="zstd")
    source = np.array(corpus.sources)[corpus.document_source]
    labels = np.array([*corpus.labels, ""])[corpus.document_label]
    documents = pa.table({"title": list(corpus.titles), "source": source, "label": labels})
    pq.write_table(documents, folder / "documents.parquet", compression="zstd")
    vocabulary = corpus.vocabulary
    words = pa.table(
        {
            "token": np.arange(len(vocabulary), dtype=np.int32),
            "bytes": pa.array([bytes(t) for t in vocabulary.tokens], pa.binary()),
            "text": [vocabulary.text(t) for t in range(len(vocabulary))],
            "special": [t in vocabulary.special for t in range(len(vocabulary))],
        }
    )
    pq.write_table(words, folder / "vocabulary.parquet", compression="zstd")
