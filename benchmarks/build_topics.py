"""WordNet's noun database → `topics.jsonl`: definitions and words of fourteen topics, split by
synset.

    python -m benchmarks.build_topics /usr/share/wordnet

1. A synset belongs to a topic by its lexicographer file (food, animal, plant …), by its topic
   domain (law, music …) or by being below a root in the hierarchy (ship, disease …). Synsets of
   several topics are left out.
2. Its definition is kept without examples and bracketed remarks, if it has 5 to 30 words.
3. Of each topic the first `_PER_TOPIC` by a hash of the synset's words are kept; the same hash
   deals them into the splits discover (40 %), classify (30 %), dev (15 %) and test (15 %).
4. The topic's lexicon: single words whose most frequent noun sense is in the topic.

The result is a function of the database alone; a test builds it again. WordNet's licence allows
this with its notice, `LICENCE.wordnet.txt`. Cost: two seconds.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from featureflow.errors import UserError

_PER_TOPIC = 300
_MAX_LEXICON = 600
_SPLITS = (("discover", 0.40), ("classify", 0.70), ("dev", 0.85), ("test", 1.0))


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What puts a synset into a topic: lexicographer files, words whose topic domain it is in, or
    roots above it."""

    files: tuple[int, ...] = ()
    domains: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()


RULES: Mapping[str, Rule] = {
    "food": Rule(files=(13,), domains=("cooking#1",)),
    "animals": Rule(files=(5,)),
    "plants": Rule(files=(20,)),
    "body": Rule(files=(8,), domains=("anatomy#2",)),
    "feeling": Rule(files=(12,)),
    "medicine": Rule(
        domains=("medicine#1", "pathology#1", "psychiatry#1"),
        roots=("disease#1", "medicine#2", "medical_procedure#1", "surgery#1"),
    ),
    "law": Rule(
        domains=("law#1", "law#2", "crime#1"),
        roots=("lawyer#1", "court#1", "legal_document#1", "crime#1"),
    ),
    "military": Rule(
        domains=("military#1",), roots=("weapon#1", "military_unit#1", "serviceman#1")
    ),
    "computing": Rule(
        domains=("computer_science#1", "computer#1"),
        roots=("computer#1", "software#1", "programmer#1"),
    ),
    "sport": Rule(
        domains=(
            "sport#1",
            "baseball#1",
            "football#1",
            "golf#1",
            "american_football#1",
            "tennis#1",
        ),
        roots=("athlete#1", "athletic_game#1", "sport#1", "sports_equipment#1"),
    ),
    "music": Rule(
        domains=("music#1", "music#3"),
        roots=(
            "musical_instrument#1",
            "musical_composition#1",
            "musician#1",
            "musical_organization#1",
        ),
    ),
    "religion": Rule(
        domains=(
            "religion#1",
            "roman_catholic_church#1",
            "christianity#1",
            "judaism#1",
            "old_testament#1",
            "hinduism#1",
        ),
        roots=(
            "clergyman#1",
            "religion#1",
            "religious_ceremony#1",
            "place_of_worship#1",
            "prayer#1",
        ),
    ),
    "money": Rule(
        domains=("commerce#1", "finance#1"),
        roots=(
            "monetary_unit#1",
            "financial_institution#1",
            "fee#1",
            "security#4",
            "tax#1",
            "payment#1",
            "banker#1",
        ),
    ),
    "sea": Rule(
        domains=("seafaring#1",), roots=("vessel#2", "body_of_water#1", "sailor#1", "seamanship#1")
    ),
}


@dataclass(frozen=True, kw_only=True)
class Synset:
    """One line of `data.noun`."""

    offset: str
    file: int
    words: tuple[str, ...]
    hypernyms: tuple[str, ...]
    domains: tuple[str, ...]
    definition: str


def build(folder: Path) -> list[dict[str, object]]:
    """The records of `topics.jsonl`. Raises UserError when the folder holds no noun database."""
    missing = [name for name in ("data.noun", "index.noun") if not (folder / name).is_file()]
    if missing:
        raise UserError(
            "no WordNet database here",
            where=str(folder),
            expected=", ".join(missing),
            fix="install the package wordnet-base, or unpack it and name the folder",
        )
    synsets = {synset.offset: synset for synset in _iter_synsets(folder / "data.noun")}
    senses = _read_senses(folder / "index.noun")
    members = _members(synsets, senses)
    return [
        record for topic in RULES for record in _records(topic, members[topic], synsets, senses)
    ]


def _members(
    synsets: Mapping[str, Synset], senses: Mapping[str, Sequence[str]]
) -> dict[str, set[str]]:
    """Synsets of each topic; those of several are taken out of all."""
    members = {topic: set(_matching(rule, synsets, senses)) for topic, rule in RULES.items()}
    counts: dict[str, int] = {}
    for offsets in members.values():
        for offset in offsets:
            counts[offset] = counts.get(offset, 0) + 1
    return {topic: {o for o in offsets if counts[o] == 1} for topic, offsets in members.items()}


def _matching(
    rule: Rule, synsets: Mapping[str, Synset], senses: Mapping[str, Sequence[str]]
) -> Iterator[str]:
    domains = {_sense(name, senses) for name in rule.domains}
    below = _below({_sense(name, senses) for name in rule.roots}, synsets)
    for offset, synset in synsets.items():
        if synset.file in rule.files or domains & set(synset.domains) or offset in below:
            yield offset


def _sense(name: str, senses: Mapping[str, Sequence[str]]) -> str:
    word, _, number = name.partition("#")
    found = senses.get(word, ())
    if len(found) < int(number):
        raise UserError("WordNet has no such sense", where=name, expected="database version 3.0")
    return found[int(number) - 1]


def _below(roots: set[str], synsets: Mapping[str, Synset]) -> set[str]:
    children: dict[str, list[str]] = {}
    for synset in synsets.values():
        for hypernym in synset.hypernyms:
            children.setdefault(hypernym, []).append(synset.offset)
    found, frontier = set(roots), list(roots)
    while frontier:
        for child in children.get(frontier.pop(), ()):
            if child not in found:
                found.add(child)
                frontier.append(child)
    return found


def _records(
    topic: str,
    members: set[str],
    synsets: Mapping[str, Synset],
    senses: Mapping[str, Sequence[str]],
) -> Iterator[dict[str, object]]:
    usable = [synsets[o] for o in members if synsets[o].definition]
    for synset in sorted(usable, key=_hash)[:_PER_TOPIC]:
        word = synset.words[0].replace("_", " ")
        yield {
            "topic": topic,
            "split": _split(synset),
            "word": word,
            "definition": synset.definition,
        }
    words = {
        word.lower()
        for offset in members
        for word in synsets[offset].words
        if word.isalpha() and len(word) > 2
    }
    leading = sorted(word for word in words if senses.get(word, ("",))[0] in members)
    chosen = sorted(leading, key=lambda word: hashlib.sha256(word.encode()).hexdigest())[
        :_MAX_LEXICON
    ]
    yield {"topic": topic, "lexicon": sorted(chosen)}


def _hash(synset: Synset) -> str:
    return hashlib.sha256(" ".join((*synset.words, synset.definition)).encode()).hexdigest()


def _split(synset: Synset) -> str:
    share = int(hashlib.sha256(("split " + _hash(synset)).encode()).hexdigest()[:8], 16) / 2**32
    return next(name for name, upper in _SPLITS if share < upper)


def _iter_synsets(path: Path) -> Iterator[Synset]:
    """`offset file pos n (word id)… n_pointers (symbol offset pos source/target)… | gloss`; n is
    hexadecimal."""
    with path.open(encoding="latin-1") as stream:
        for line in stream:
            if line.startswith("  "):
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split()
            n_words = int(fields[3], 16)
            rest = fields[4 + 2 * n_words :]
            pointers = [
                (rest[1 + 4 * k], rest[2 + 4 * k], rest[3 + 4 * k]) for k in range(int(rest[0]))
            ]
            yield Synset(
                offset=fields[0],
                file=int(fields[1]),
                words=tuple(fields[4 : 4 + 2 * n_words : 2]),
                hypernyms=tuple(
                    o for symbol, o, pos in pointers if symbol in ("@", "@i") and pos == "n"
                ),
                domains=tuple(o for symbol, o, pos in pointers if symbol == ";c" and pos == "n"),
                definition=_definition(gloss),
            )


def _definition(gloss: str) -> str:
    """The definition without examples and bracketed remarks; empty if too short or too long."""
    text = re.sub(r"\([^)]*\)", " ", gloss.split('; "')[0].split(";")[0])
    text = re.sub(r"\s+", " ", text).strip(" ;,:")
    return text if 5 <= len(text.split()) <= 30 and '"' not in text else ""


def _read_senses(path: Path) -> dict[str, tuple[str, ...]]:
    """Word → its noun synsets, most frequent first: `word pos n_senses … offsets`."""
    senses = {}
    with path.open(encoding="latin-1") as stream:
        for line in stream:
            if not line.startswith("  "):
                fields = line.split()
                senses[fields[0]] = tuple(fields[-int(fields[2]) :])
    return senses


def main() -> None:
    """Write `topics.jsonl` beside this file."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "/usr/share/wordnet")
    lines = [json.dumps(record, ensure_ascii=False) for record in build(folder)]
    Path(__file__).with_name("topics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
