"""Documents from a person's own files: .txt and .md, .jsonl, .parquet.

A text file is one document, cut at paragraph ends when it is longer than asked; a JSON line or a
Parquet row is one document, whose text, title and label are in named fields. Files are read as a
stream in the order of their names.
"""

from __future__ import annotations

import glob
import json
import os
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet

from data.text.documents import Document, Fields, PassedOver, document_of, iter_parts
from featureflow.errors import Problem, UserError
from featureflow.files import is_lfs_pointer, lfs_problem

_TEXT, _LINES, _TABLE = (".txt", ".md"), (".jsonl", ".ndjson"), (".parquet",)
SUFFIXES = (*_TEXT, *_LINES, *_TABLE)
_PACKED = (".gz", ".zst", ".bz2", ".xz")
_MOST_PROBLEMS = 20
_TEXT_COLUMN = r"(large_)?string|string_view|dictionary<values=string|(large_)?list|null"


def find_text_files(paths: Sequence[str]) -> list[Path]:
    """Files, folders (all text files below) and glob patterns, as sorted files without repetition.
    Raises UserError naming every path that gives nothing."""
    found: dict[Path, None] = {}
    problems = []
    for path in paths:
        files = _files_of(path)
        found.update(dict.fromkeys(files))
        if not files:
            problems.append(_problem_of_path(path))
    problems += [
        Problem(
            what="not a kind of file that is read", where=str(path), expected=", ".join(SUFFIXES)
        )
        for path in found
        if path.suffix.lower() not in SUFFIXES
    ]
    problems += [
        Problem(what="the file is empty", where=str(path))
        for path in found
        if path.stat().st_size == 0
    ]
    problems += [lfs_problem(path) for path in found if is_lfs_pointer(path)]
    problems += [
        Problem(what="a compressed text is not read", where=str(each), expected="unpack it first")
        for path in map(Path, map(os.path.expanduser, paths))
        if path.is_dir()
        for each in sorted(path.rglob("*"))
        if each.suffix.lower() in _PACKED and Path(each.stem).suffix.lower() in SUFFIXES
    ]
    if not paths:
        problems.append(Problem(what="no text files are named", expected='paths = ["my-texts/"]'))
    if problems:
        raise UserError("the text files cannot be read", problems=tuple(problems))
    return list(found)


def iter_file_documents(
    file: Path, fields: Fields, *, n_characters: int | None, passed_over: PassedOver
) -> Iterator[Document]:
    """The documents of one file. Raises UserError naming the file and the byte, lines or rows that
    are wrong; rows whose text is null are counted."""
    suffix = file.suffix.lower()
    if suffix in _TEXT:
        return _iter_text(file, n_characters)
    parsed = _iter_lines(file, fields) if suffix in _LINES else _iter_table(file, fields)
    return _iter_good(file, parsed, passed_over)


def _files_of(path: str) -> list[Path]:
    place = Path(os.path.expanduser(path))
    if place.is_dir():
        return sorted(
            each for each in place.rglob("*") if each.suffix.lower() in SUFFIXES and each.is_file()
        )
    if place.is_file():
        return [place]
    return sorted(
        Path(each) for each in glob.glob(str(place), recursive=True) if Path(each).is_file()
    )


def _problem_of_path(path: str) -> Problem:
    if Path(os.path.expanduser(path)).is_dir():
        return Problem(
            what="no text files below this folder", where=path, expected=", ".join(SUFFIXES)
        )
    return Problem(what="there is no such file", where=path)


def _iter_text(file: Path, n_characters: int | None) -> Iterator[Document]:
    text = _decoded(file.read_bytes(), file, 0).removeprefix("\ufeff").replace("\r\n", "\n")
    if not text.strip():
        raise UserError("the file has only blank text", where=str(file))
    parts = list(iter_parts(text, n_characters)) if n_characters else [text]
    for number, part in enumerate(parts, start=1):
        title = file.name if len(parts) == 1 else f"{file.name}, part {number}"
        yield Document(text=part, source=file.name, title=title)


def _decoded(raw: bytes, file: Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"{file}, byte {offset + error.start}"
        found = f"byte 0x{raw[error.start]:02x} ({error.reason})"
        fix = "convert it, for example: iconv -f latin1 -t utf-8 <file>"
        raise UserError("the text is not UTF-8", where=where, found=found, fix=fix) from error


def _iter_good(
    file: Path, parsed: Iterator[Document | Problem | None], passed_over: PassedOver
) -> Iterator[Document]:
    """Good records are given out as they come; a bad one ends the stream, naming every bad one that
    follows too."""
    n_documents = 0
    for each in parsed:
        if isinstance(each, Problem):
            raise _bad_records(file, [each, *(p for p in parsed if isinstance(p, Problem))])
        if each is None:
            passed_over[file.name] += 1
        else:
            n_documents += 1
            yield each
    if n_documents == 0:
        raise UserError("the file has no documents", where=str(file))


def _iter_lines(file: Path, fields: Fields) -> Iterator[Document | Problem | None]:
    with file.open("rb") as stream:
        offset = 0
        for number, raw in enumerate(stream, start=1):
            line = raw.removeprefix(BOM_UTF8) if number == 1 else raw
            if line.strip():
                yield _parse_line(line, file, number, offset, fields)
            offset += len(raw)


def _bad_records(file: Path, problems: list[Problem]) -> UserError:
    shown = problems[:_MOST_PROBLEMS]
    if len(problems) > len(shown):
        shown.append(Problem(what=f"and {len(problems) - len(shown)} more lines", where=str(file)))
    return UserError(f"{file.name} has bad lines or rows", problems=tuple(shown))


def _parse_line(
    raw: bytes, file: Path, number: int, offset: int, fields: Fields
) -> Document | Problem | None:
    """None where the text is null; a line without the field is wrong."""
    where = f"{file}, line {number} (byte {offset})"
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Problem(
            what="the line is not UTF-8",
            where=f"{file}, line {number}, byte {offset + error.start}",
        )
    except ValueError as error:
        return Problem(what="the line is not JSON", where=where, found=str(error))
    if not isinstance(record, dict):
        return Problem(what="the line is not an object", where=where, found=type(record).__name__)
    if fields.text in record and record[fields.text] is None:
        return None
    found = f"the fields {', '.join(record)}" if record else "an empty object"
    try:
        document = document_of(record, fields, source=file.name, number=number)
    except ValueError as error:
        document, found = None, str(error)
    return document or Problem(
        what=f"no text in the field {fields.text!r}",
        where=where,
        expected="a string, or a list of messages with role and content",
        found=found,
    )


def _iter_table(file: Path, fields: Fields) -> Iterator[Document | Problem | None]:
    try:
        table = parquet.ParquetFile(file)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            "not a Parquet file that can be read", where=str(file), found=str(error)
        ) from error
    with table:
        columns = table.schema_arrow.names
        kind = table.schema_arrow.field(fields.text).type if fields.text in columns else None
        if kind is None or not re.match(_TEXT_COLUMN, str(kind)):
            raise UserError(
                f"no text in the column {fields.text!r}",
                where=str(file),
                expected="strings, or lists of messages with role and content",
                found=f"columns {', '.join(columns)}" if kind is None else f"a column of {kind}",
            )
        wanted = [name for name in (fields.text, fields.title, fields.label) if name in columns]
        number = 0
        for batch in table.iter_batches(batch_size=256, columns=wanted):
            for record in batch.to_pylist():
                number += 1
                try:
                    yield document_of(record, fields, source=file.name, number=number)
                except ValueError as error:
                    yield Problem(
                        what=f"no text in the column {fields.text!r}",
                        where=f"{file}, row {number}",
                        expected="a string, or a list of messages with role and content",
                        found=str(error),
                    )
