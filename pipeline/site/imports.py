"""Labels and examples from elsewhere: the notes a person wrote on the pages, and Neuronpedia's
exports.

`import_notes` reads the JSON that the site's notes page exports; `import_neuronpedia` reads
`explanations/batch-N.jsonl(.gz)` or a saved upload batch. `attach_labels` writes the label table
with them added as human or imported labels: they carry no held-out score, so they never displace
measured ones.

`import_neuronpedia_examples` reads `activations/batch-N.jsonl(.gz)` or a saved upload batch;
`write_examples` writes them as a table. Their text is not that of the run, so they do not appear on
its pages.
"""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from featureflow.errors import Problem, UserError
from featureflow.sites import Site, parse_feature
from pipeline.describe.features import Features

MAX_LABEL = 512
_STRONGEST = -1.0  # Neuronpedia's mark of the group of strongest activations
_EXAMPLES = pa.schema(
    {
        "feature": pa.string(),
        "rank": pa.int32(),
        "value": pa.float32(),
        "low": pa.float32(),
        "high": pa.float32(),
        "before": pa.string(),
        "token_text": pa.string(),
        "after": pa.string(),
        "tokens": pa.list_(pa.string()),
        "values": pa.list_(pa.float32()),
    }
)


@dataclass(frozen=True, kw_only=True)
class ImportedLabel:
    """A label of one feature from a person (`human`) or another site (`imported`)."""

    feature: str
    text: str
    method: str


@dataclass(frozen=True, kw_only=True)
class ImportedExample:
    """A text with a feature's activation on each token. `low` and `high` are the interval it was
    drawn from, None for one of the strongest."""

    feature: str
    tokens: tuple[str, ...]
    values: tuple[float, ...]
    low: float | None
    high: float | None

    @property
    def peak(self) -> int:
        return max(range(len(self.values)), key=self.values.__getitem__)


def import_notes(path: Path) -> list[ImportedLabel]:
    """The labels in an export of the site's notes. Raises UserError with every bad entry."""
    document = _json(path)
    if not isinstance(document, dict) or (document.get("kind"), document.get("schema")) != (
        "featureflow-notes",
        1,
    ):
        raise UserError(
            "not an export of notes",
            where=str(path),
            expected='"kind": "featureflow-notes", "schema": 1',
        )
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
    """Explanations of one source, as labels of the features of `site`. Raises UserError naming file
    and line."""
    labels, problems = [], []
    for path in paths:
        for where, index, text in _explanations(path):
            feature = f"{site.short}/{index}"
            if problem := _problem_of(feature, text, where):
                problems.append(problem)
            elif str(text).strip():
                labels.append(
                    ImportedLabel(feature=feature, text=str(text).strip(), method="imported")
                )
    if problems:
        raise UserError("some explanations cannot be read", problems=tuple(problems[:50]))
    return labels


def import_neuronpedia_examples(paths: Iterable[Path], site: Site) -> list[ImportedExample]:
    """Examples of one source, as examples of the features of `site`. Raises UserError naming file
    and line."""
    examples: list[ImportedExample] = []
    problems: list[Problem] = []
    for path in paths:
        for where, index, row in _activations(path):
            found = _example_of(f"{site.short}/{index}", row, where)
            if isinstance(found, Problem):
                problems.append(found)
            else:
                examples.append(found)
    if problems:
        raise UserError("some examples cannot be read", problems=tuple(problems[:50]))
    return examples


def write_examples(examples: Iterable[ImportedExample], out: Path) -> Path:
    """A Parquet table: feature, rank by activation, text before, at and after the peak, value,
    tokens, values, the interval."""
    rows: list[dict[str, Any]] = []
    for example in sorted(examples, key=lambda e: (e.feature, -e.values[e.peak])):
        peak = example.peak
        texts = {
            "before": example.tokens[:peak],
            "token_text": example.tokens[peak : peak + 1],
            "after": example.tokens[peak + 1 :],
        }
        rank = rows[-1]["rank"] + 1 if rows and rows[-1]["feature"] == example.feature else 0
        numbers = {
            "rank": rank,
            "value": example.values[peak],
            "low": example.low,
            "high": example.high,
        }
        lists = {"tokens": list(example.tokens), "values": list(example.values)}
        rows.append(
            {
                "feature": example.feature,
                **numbers,
                **{k: "".join(t) for k, t in texts.items()},
                **lists,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows, schema=_EXAMPLES), out, compression="zstd")
    return out


def attach_labels(features: Features, labels: Iterable[ImportedLabel], out: Path) -> Path:
    """Write the label table with these labels added after the measured ones, to `out`.
    Raises UserError for features that are not described."""
    labels = list(labels)
    table = pq.read_table(features.folder / "tables" / "labels.parquet")
    known = set(features.table["feature"])
    unknown = [
        Problem(what="no such feature", where=label.feature)
        for label in labels
        if label.feature not in known
    ]
    if unknown:
        raise UserError("labels of features that are not described", problems=tuple(unknown[:50]))
    rank = table.column("rank").to_pylist()
    last: dict[str, int] = {}
    for feature, place in zip(table.column("feature").to_pylist(), rank, strict=True):
        last[feature] = max(last.get(feature, -1), place)
    rows = []
    for label in labels:
        last[label.feature] = last.get(label.feature, -1) + 1
        row: dict[str, Any] = dict.fromkeys(table.column_names)
        where = parse_feature(label.feature)
        row |= {
            "feature": label.feature,
            "site": where.site.short,
            "latent": where.latent,
            "rank": last[label.feature],
            "text": label.text,
            "method": label.method,
        }
        rows.append(row | {"accepted": False, "n": 0})
    added = pa.Table.from_pylist(rows, schema=table.schema)
    pq.write_table(pa.concat_tables([table, added]), out, compression="zstd")
    return out


def _explanations(path: Path) -> Iterator[tuple[str, str, Any]]:
    """Place, index and text of every explanation of a file."""
    if _is_bulk(path):
        for where, row in _lines(path):
            yield where, str(row.get("index")), row.get("description")
        return
    for feature in _json(path).get("features", []):
        for explanation in feature.get("explanations") or []:
            yield str(path), str(feature.get("index")), explanation.get("text")


def _activations(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Place, index and fields of every example of a file; the interval under `binMin` and
    `binMax`."""
    if _is_bulk(path):
        for where, row in _lines(path):
            yield where, str(row.get("index")), row
        return
    for feature in _json(path).get("features", []):
        for row in feature.get("activations") or []:
            interval = {"binMin": row.get("quantileMin"), "binMax": row.get("quantileMax")}
            yield (
                f"{path}, feature {feature.get('index')}",
                str(feature.get("index")),
                {**interval, **row},
            )


def _example_of(feature: str, row: dict[str, Any], where: str) -> ImportedExample | Problem:
    if problem := _problem_of(feature, "", where):
        return problem
    tokens, values = row.get("tokens"), row.get("values")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        return Problem(
            what="not a list of texts", where=f"{where}: tokens", found=type(tokens).__name__
        )
    if not isinstance(values, list) or not all(_is_number(value) for value in values):
        return Problem(
            what="not a list of numbers", where=f"{where}: values", found=type(values).__name__
        )
    if len(tokens) != len(values) or not tokens:
        return Problem(
            what="not one value a token",
            where=where,
            expected=str(len(tokens)),
            found=str(len(values)),
        )
    interval = [row.get("binMin"), row.get("binMax")]
    known = all(map(_is_number, interval)) and interval[0] != _STRONGEST
    low, high = map(float, interval) if known else (None, None)  # type: ignore[arg-type]
    return ImportedExample(
        feature=feature, tokens=tuple(tokens), values=tuple(map(float, values)), low=low, high=high
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_bulk(path: Path) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and object of every line. Raises UserError where a file or a line cannot be read."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError("cannot be read", where=str(path), found=str(error)) from error
    for number, line in enumerate(raw.decode("utf-8", errors="replace").split("\n"), 1):
        if line.strip():
            row = _parse(line, f"{path}:{number}")
            if not isinstance(row, dict):
                raise UserError("not an object", where=f"{path}:{number}", found=type(row).__name__)
            yield f"{path}:{number}", row


def _problem_of(feature: str, text: object, where: str | None = None) -> Problem | None:
    try:
        parse_feature(feature)
    except UserError as error:
        return Problem(what="not a feature", where=where or feature, found=error.what)
    if not isinstance(text, str):
        return Problem(what="not a text", where=where or feature, found=type(text).__name__)
    if len(text) > MAX_LABEL:
        return Problem(
            what="too long for a label",
            where=where or feature,
            expected=f"at most {MAX_LABEL} characters",
            found=str(len(text)),
        )
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
