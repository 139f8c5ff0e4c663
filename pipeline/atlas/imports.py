"""Labels from elsewhere: the notes a person wrote on the pages, and Neuronpedia's explanations.

`import_notes` reads the JSON that the site's notes page exports; `import_neuronpedia` reads
`explanations/batch-N.jsonl(.gz)` or a saved upload batch. `attach_labels` writes the atlas' label table with them
added as human or imported labels: they carry no held-out score, so they never displace measured ones.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.sites import Site, parse_feature
from pipeline.atlas.opened import Atlas
from sae.errors import Problem, UserError

MAX_LABEL = 512


@dataclass(frozen=True, kw_only=True)
class ImportedLabel:
    """A label of one feature from a person (`human`) or another site (`imported`)."""

    feature: str
    text: str
    method: str


def import_notes(path: Path) -> list[ImportedLabel]:
    """The labels in an export of the site's notes. Raises UserError with every bad entry."""
    document = _json(path)
    if not isinstance(document, dict) or (document.get("kind"), document.get("schema")) != ("featureflow-notes", 1):
        raise UserError("not an export of notes", where=str(path), expected='"kind": "featureflow-notes", "schema": 1')
    labels, problems = [], []
    for note in document.get("notes") or []:
        feature, text = str(note.get("feature")), note.get("label") or ""
        if problem := _problem_of(feature, text):
            problems.append(problem)
        elif text.strip():
            labels.append(ImportedLabel(feature=feature, text=text.strip(), method="human"))
    if problems:
        raise UserError("some notes cannot be read", where=str(path), problems=tuple(problems))
    return labels


def import_neuronpedia(paths: Iterable[Path], site: Site) -> list[ImportedLabel]:
    """Explanations of one source, as labels of the features of `site`. Raises UserError naming file and line."""
    labels, problems = [], []
    for path in paths:
        for where, index, text in _explanations(path):
            feature = f"{site.short}/{index}"
            if problem := _problem_of(feature, text, where):
                problems.append(problem)
            elif str(text).strip():
                labels.append(ImportedLabel(feature=feature, text=str(text).strip(), method="imported"))
    if problems:
        raise UserError("some explanations cannot be read", problems=tuple(problems[:50]))
    return labels


def attach_labels(atlas: Atlas, labels: Iterable[ImportedLabel], out: Path) -> Path:
    """Write the atlas' label table with these labels added after the measured ones, to `out`. Raises UserError for
    features that the atlas does not have."""
    labels = list(labels)
    table = pq.read_table(atlas.folder / "tables" / "labels.parquet")
    known = set(atlas.features["feature"])
    unknown = [Problem(what="no such feature", where=label.feature) for label in labels if label.feature not in known]
    if unknown:
        raise UserError("labels of features that the atlas does not have", problems=tuple(unknown[:50]))
    rank = table.column("rank").to_pylist()
    last: dict[str, int] = {}
    for feature, place in zip(table.column("feature").to_pylist(), rank, strict=True):
        last[feature] = max(last.get(feature, -1), place)
    rows = []
    for label in labels:
        last[label.feature] = last.get(label.feature, -1) + 1
        row: dict[str, Any] = dict.fromkeys(table.column_names)
        row |= {"feature": label.feature, "rank": last[label.feature], "text": label.text, "method": label.method}
        rows.append(row | {"accepted": False, "n": 0})
    added = pa.Table.from_pylist(rows, schema=table.schema)
    pq.write_table(pa.concat_tables([table, added]), out, compression="zstd")
    return out


def _explanations(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Place, index and text of every explanation of a file."""
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for number, line in enumerate(raw.decode("utf-8", errors="replace").splitlines(), 1):
            if line.strip():
                row = _parse(line, f"{path}:{number}")
                yield f"{path}:{number}", str(row.get("index")), row.get("description")
        return
    for feature in _json(path).get("features", []):
        for explanation in feature.get("explanations") or []:
            yield str(path), str(feature.get("index")), explanation.get("text")


def _problem_of(feature: str, text: object, where: str | None = None) -> Problem | None:
    try:
        parse_feature(feature)
    except UserError as error:
        return Problem(what="not a feature", where=where or feature, found=error.what)
    if not isinstance(text, str):
        return Problem(what="not a text", where=where or feature, found=type(text).__name__)
    if len(text) > MAX_LABEL:
        return Problem(what="too long for a label", where=where or feature, expected=f"at most {MAX_LABEL} characters",
                       found=str(len(text)))  # fmt: skip
    return None


def _json(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError("cannot be read", where=str(path), found=str(error)) from error
    return _parse(text, str(path))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError("not JSON", where=where, found=str(error)) from error
