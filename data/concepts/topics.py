"""Topics: definitions and words of fourteen subjects from WordNet, dealt into splits by synset, all
in one register.

A definition is a document: `text` reads "Torte: rich cake usually covered with cream". Texts of
other topics are the style-matched contrast. Splits: `discover` (find features), `classify` (train
classifiers), `dev` (choose), `test` (report). The data are built by `benchmarks.build_topics`;
licence in `LICENCE.wordnet.txt`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import Literal

from featureflow.errors import UserError

Split = Literal["discover", "classify", "dev", "test"]


@dataclass(frozen=True, kw_only=True)
class Definition:
    """One definition and the word it defines."""

    word: str
    definition: str
    split: Split

    @property
    def text(self) -> str:
        return f"{self.word[:1].upper()}{self.word[1:]}: {self.definition}."


@dataclass(frozen=True, kw_only=True)
class Topic:
    """One subject. `lexicon` holds lower-case words whose most frequent sense belongs to it."""

    name: str
    definitions: tuple[Definition, ...]
    lexicon: frozenset[str]

    def texts(self, split: Split) -> list[str]:
        return [definition.text for definition in self.definitions if definition.split == split]


@cache
def read_topics() -> Mapping[str, Topic]:
    """All bundled topics by name."""
    definitions: dict[str, list[Definition]] = {}
    lexicons: dict[str, frozenset[str]] = {}
    for line in (
        files("data.concepts").joinpath("topics.jsonl").read_text(encoding="utf-8").splitlines()
    ):
        record = json.loads(line)
        topic = record.pop("topic")
        if "lexicon" in record:
            lexicons[topic] = frozenset(record["lexicon"])
        else:
            definitions.setdefault(topic, []).append(Definition(**record))
    return MappingProxyType(
        {
            name: Topic(name=name, definitions=tuple(found), lexicon=lexicons[name])
            for name, found in definitions.items()
        }
    )


def topic_named(name: str) -> Topic:
    """One topic. Raises UserError naming those there are."""
    topics = read_topics()
    if name not in topics:
        raise UserError(f"there is no topic {name!r}", expected=", ".join(topics))
    return topics[name]


def contrast_texts(topic: str, split: Split) -> list[str]:
    """Texts of the same register about anything else, one topic after the other in turn."""
    others = [other.texts(split) for name, other in read_topics().items() if name != topic]
    longest = max(map(len, others))
    return [texts[place] for place in range(longest) for texts in others if place < len(texts)]
