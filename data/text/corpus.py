"""Where text comes from: a union of small choices that each yield documents in a seeded order.

`iter_documents(spec, seed)` checks what it can at once (names, paths, packages) and then streams.
Orders are repeatable; a corpus up to 64 MB is shuffled uniformly, a larger one within a window of
that size. Blank documents are left out here, exact duplicates in packing, where every document is
hashed anyway.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, assert_never

from annotated_types import Ge, Gt, MinLen
from huggingface_hub import HfApi
from typing_extensions import Doc

from data.cache import cache_folder
from data.text.bundled import bundled_records
from data.text.documents import (
    Document,
    Fields,
    PassedOver,
    document_of,
    iter_passages,
    iter_shuffled,
)
from data.text.packaged_texts import iter_packaged_text
from data.text.text_files import find_text_files, iter_file_documents
from data.worlds import AnyWorld
from featureflow.errors import UserError
from featureflow.settings import ByKind, Settings

_COMMIT = re.compile(r"[0-9a-f]{40}")


class BundledText(Settings):
    """The small text in this repository: 57 short passages of five kinds, for tests and the tiny
    recipe."""

    kind: Literal["bundled"] = "bundled"


class PackagedText(Settings):
    """A text that ships inside a package of the registry."""

    kind: Literal["packaged"] = "packaged"
    name: Annotated[str, Doc("wiki, recipes, news, commons, reviews or pystdlib")] = "wiki"


class TextFiles(Settings):
    """One's own files: .txt and .md (a document each), .jsonl (a line each), .parquet (a row
    each)."""

    kind: Literal["files"] = "files"
    paths: Annotated[
        tuple[str, ...], MinLen(1), Doc("files, folders (read with all below) or glob patterns")
    ]
    text_field: Annotated[
        str, Doc("field or column of the text in .jsonl and .parquet, or of lists of chat messages")
    ] = "text"
    title_field: Annotated[str, Doc("field or column of the title, where there is one")] = "title"
    label_field: Annotated[str, Doc("field or column of the label, where there is one")] = "label"
    max_characters: Annotated[
        int | None,
        Ge(100),
        Doc("longer .txt and .md files are cut into documents of this length at paragraph ends"),
    ] = 8000


class HubText(Settings):
    """A data set of the Hugging Face Hub (or a local folder of its form), streamed. Needs the `hub`
    extra."""

    kind: Literal["hub"] = "hub"
    dataset: Annotated[
        str, Doc("data set id, such as `HuggingFaceFW/fineweb-edu`, or a local folder")
    ]
    config: Annotated[str | None, Doc("the data set's configuration, where it has several")] = None
    revision: Annotated[
        str | None,
        Doc("branch, tag or commit on the Hub; none for the newest at the first reading"),
    ] = None
    split: Annotated[str, Doc("split to read")] = "train"
    text_field: Annotated[
        str, Doc("column of the text, or of lists of messages for the model's chat template")
    ] = "text"
    label_field: Annotated[str, Doc("column of the label, where there is one")] = "label"


class WorldText(Settings):
    """The language of a world where the answer is known (data/worlds); a document a context."""

    kind: Literal["world"] = "world"
    world: Annotated[AnyWorld, Doc("which world")]
    n_documents: Annotated[int, Ge(2), Doc("documents")] = 4096
    seed: Annotated[int, Ge(0), Doc("of the documents")] = 0


SingleCorpus = Annotated[BundledText | PackagedText | TextFiles | HubText | WorldText, ByKind()]


class Part(Settings):
    """One source of a mixture and its share of the characters."""

    corpus: Annotated[SingleCorpus, Doc("the text of this part, a table with its kind")]
    weight: Annotated[float, Gt(0), Doc("share of the characters, relative to the other parts")] = (
        1.0
    )
    max_characters: Annotated[
        int | None,
        Ge(100),
        Doc("of a longer document one passage of at most this length is used, drawn at random"),
    ] = 8000


class Mixture(Settings):
    """Several corpora, interleaved so that each has its share of the characters at every point."""

    kind: Literal["mixture"] = "mixture"
    parts: Annotated[tuple[Part, ...], MinLen(1), Doc("the corpora and their weights")]


CorpusSpec = Annotated[
    BundledText | PackagedText | TextFiles | HubText | WorldText | Mixture, ByKind()
]


def iter_documents(
    spec: CorpusSpec, seed: int, passed_over: PassedOver | None = None
) -> Iterator[Document]:
    """The corpus's documents in the order of `seed`; records whose text is null are counted.

    Raises UserError at once for what can be seen without reading, and while reading for text that
    is not UTF-8, broken lines or rows, or a corpus without any text."""
    passed_over = PassedOver() if passed_over is None else passed_over
    if isinstance(spec, Mixture):
        sources = [_iter_part(part, seed + i, passed_over) for i, part in enumerate(spec.parts)]
        return _iter_interleaved(sources, [part.weight for part in spec.parts])
    return _iter_single(spec, seed, passed_over)


def describe_corpus(spec: CorpusSpec) -> str:
    """One line for titles and provenance; file names without folders."""
    match spec:
        case BundledText():
            return "bundled"
        case PackagedText(name=name):
            return name
        case TextFiles(paths=paths):
            names = [path.rstrip("/").rpartition("/")[2] for path in paths]
            return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        case HubText(dataset=dataset, split=split):
            return f"{dataset} ({split})"
        case WorldText(world=world):
            return f"the world {world.kind}"
        case Mixture(parts=parts):
            total = sum(part.weight for part in parts)
            return " + ".join(
                f"{describe_corpus(part.corpus)} {part.weight / total:.0%}" for part in parts
            )
        case _:
            assert_never(spec)


def _iter_part(part: Part, seed: int, passed_over: PassedOver) -> Iterator[Document]:
    documents = _iter_single(part.corpus, seed, passed_over)
    return (
        documents
        if part.max_characters is None
        else iter_passages(documents, part.max_characters, seed)
    )


def _iter_single(spec: SingleCorpus, seed: int, passed_over: PassedOver) -> Iterator[Document]:
    match spec:
        case BundledText():
            documents: Iterator[Document] = (
                Document(
                    text=record["text"],
                    source=record["source"],
                    title=record["title"],
                    label=record["label"],
                )
                for record in bundled_records()
            )
        case PackagedText(name=name):
            documents = iter_packaged_text(name)
        case TextFiles():
            documents = _iter_files(spec, passed_over)
        case HubText():
            documents = _iter_hub(spec, passed_over)
        case WorldText(world=world, n_documents=n, seed=draw):
            documents = (
                Document(text=text, source=world.kind, title=f"{world.kind} {number}")
                for number, text in enumerate(world.documents(n, draw))
            )
        case _:
            assert_never(spec)
    return _iter_not_blank(iter_shuffled(documents, seed), describe_corpus(spec))


def _iter_files(spec: TextFiles, passed_over: PassedOver) -> Iterator[Document]:
    files = find_text_files(spec.paths)
    fields = Fields(text=spec.text_field, title=spec.title_field, label=spec.label_field)
    return (
        document
        for file in files
        for document in iter_file_documents(
            file, fields, n_characters=spec.max_characters, passed_over=passed_over
        )
    )


def _iter_not_blank(documents: Iterator[Document], where: str) -> Iterator[Document]:
    is_empty = True
    for document in documents:
        if document.text.strip():
            is_empty = False
            yield document
    if is_empty:
        raise UserError("the corpus has no text", where=where)


def _iter_hub(spec: HubText, passed_over: PassedOver) -> Iterator[Document]:
    rows = _open_hub(spec)
    columns = rows.column_names
    if columns is not None and spec.text_field not in columns:
        raise UserError(
            f"the data set has no column {spec.text_field!r}",
            where=spec.dataset,
            expected=", ".join(columns),
        )
    return _iter_rows(spec, rows, passed_over)


def _iter_rows(spec: HubText, rows: Any, passed_over: PassedOver) -> Iterator[Document]:
    fields = Fields(text=spec.text_field, title="", label=spec.label_field)
    name_of_class = getattr((rows.features or {}).get(spec.label_field), "int2str", None)
    for number, row in enumerate(_explained_rows(spec, rows)):
        label = row.get(spec.label_field)
        if name_of_class is not None and isinstance(label, int) and label >= 0:
            row = {**row, spec.label_field: name_of_class(label)}
        try:
            document = document_of(row, fields, source=spec.dataset, number=number)
        except ValueError as error:
            raise UserError(
                f"no text in the column {spec.text_field!r}",
                where=f"{spec.dataset} ({spec.split}), row {number}",
                expected="a string, a list of messages with role and content, or null",
                found=str(error),
            ) from error
        if document is None:
            passed_over[spec.dataset] += 1
        else:
            yield document


def _explained_rows(spec: HubText, rows: Any) -> Iterator[Any]:
    number = 0
    try:
        for row in rows:
            yield row
            number += 1
    except UserError:
        raise
    except Exception as error:  # the library raises errors of many packages
        raise UserError(
            "the data set cannot be read",
            where=f"{spec.dataset} ({spec.split}), row {number} or soon after",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            fix="correct the file; of the Hub, check the network and run again",
        ) from error


def _open_hub(spec: HubText) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "reading Hub data sets needs the package datasets", fix="pip install 'featureflow[hub]'"
        ) from error
    try:
        return datasets.load_dataset(
            spec.dataset,
            spec.config,
            split=spec.split,
            revision=commit_of_data_set(spec.dataset, spec.revision),
            streaming=True,
        )
    except Exception as error:  # the library raises errors of many packages
        raise UserError(
            f"the data set {spec.dataset!r} cannot be opened",
            expected=f"split {spec.split!r} of a public data set or a local folder of .jsonl or "
            ".parquet files",
            found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}",
            fix='check name, split and network; offline, use kind = "files" or "packaged"',
        ) from error


def commit_of_data_set(dataset: str, revision: str | None) -> str | None:
    """The commit that is read: the revision's, looked up on the Hub once a process and remembered
    for when there is no network. None for a local folder, and where it was never seen."""
    if Path(dataset).is_dir():
        return None
    return _commit_of(dataset, revision)


@cache
def _commit_of(dataset: str, revision: str | None) -> str | None:
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    name = hashlib.sha256(f"{dataset}@{revision}".encode()).hexdigest()[:32]
    memo = cache_folder() / "commits" / f"{name}.json"
    try:
        commit = HfApi().dataset_info(dataset, revision=revision, timeout=10).sha
    except Exception:  # no network, no such data set: reading it explains
        with suppress(OSError, ValueError, KeyError, TypeError):
            return str(json.loads(memo.read_text())["commit"])
        return revision
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        memo.write_text(json.dumps({"commit": commit}))
    return commit


def _iter_interleaved(
    sources: list[Iterator[Document]], weights: list[float]
) -> Iterator[Document]:
    """Next comes the source that is furthest behind its share; one that is exhausted drops out."""
    behind = dict.fromkeys(range(len(sources)), 0.0)
    while behind:
        chosen = min(behind, key=lambda i: (behind[i], i))
        document = next(sources[chosen], None)
        if document is None:
            del behind[chosen]
            continue
        behind[chosen] += len(document.text) / weights[chosen]
        yield document
