"""Concept data: built again from the database it came from, disjoint where it must be, and telling
topics apart."""

from __future__ import annotations

import json
import os
from importlib.resources import files
from pathlib import Path

import pytest

from benchmarks import build_topics
from data.concepts import sources
from data.concepts.prompts import read_prompts
from data.concepts.topics import contrast_texts, read_topics, topic_named
from featureflow.errors import UserError

WORDNET = Path(os.environ.get("FEATUREFLOW_WORDNET", "/usr/share/wordnet"))


@pytest.mark.skipif(
    not (WORDNET / "data.noun").is_file(), reason="the package wordnet-base is not installed"
)
def test_the_topics_are_what_the_script_builds():
    built = [json.dumps(record, ensure_ascii=False) for record in build_topics.build(WORDNET)]
    bundled = (
        files("data.concepts").joinpath("topics.jsonl").read_text(encoding="utf-8").splitlines()
    )
    assert built == bundled


def test_a_synset_is_read_as_wndb_5_says(tmp_path):
    """The manual's fields, by hand: two words, one hypernym, one topic domain, an example after the
    definition."""
    line = (
        "07700001 13 n 02 torte 0 layer_cake 1 002 @ 07628870 n 0000 ;c 00243918 n 0000 | "
        'rich cake (usually) covered with cream; "she ate the torte"  \n'
    )
    (tmp_path / "data.noun").write_text("  1 licence\n" + line, encoding="latin-1")
    (synset,) = build_topics._iter_synsets(tmp_path / "data.noun")
    assert synset.words == ("torte", "layer_cake")
    assert (synset.file, synset.hypernyms, synset.domains) == (13, ("07628870",), ("00243918",))
    assert synset.definition == "rich cake covered with cream"


def test_the_whole_build_on_a_database_written_by_hand(tmp_path, monkeypatch):
    """Food by file, law by topic domain, ships below a root; a synset of two topics is in neither;
    short definitions are left out; a lexicon takes words whose first sense is in the topic."""
    long = "a thing that is told of here in some words"
    synsets = [
        ("00000001", 13, ["pie", "tart"], "", long),
        ("00000002", 9, ["verdict"], ";c 00000003 n 0000", long + " too"),
        ("00000003", 9, ["law"], "", "short one"),
        ("00000004", 6, ["vessel"], "", long + " again"),
        ("00000005", 6, ["brig"], "@ 00000004 n 0000", long + "; then more"),
        ("00000006", 13, ["tart"], ";c 00000003 n 0000", long + " twice"),
    ]
    lines = []
    for offset, file, words, pointer, definition in synsets:
        named = " ".join(f"{word} 0" for word in words)
        pointers = f"001 {pointer}" if pointer else "000"
        lines.append(
            f"{offset} {file:02d} n {len(words):02x} {named} {pointers} | {definition}  \n"
        )
    (tmp_path / "data.noun").write_text("".join(lines), encoding="latin-1")
    senses = {
        "pie": "00000001",
        "tart": "00000006 00000001",
        "verdict": "00000002",
        "law": "00000003",
        "vessel": "00000004",
        "brig": "00000005",
    }
    index = "".join(
        f"{word} n {len(found.split())} 0 1 0 {found}\n" for word, found in senses.items()
    )
    (tmp_path / "index.noun").write_text(index, encoding="latin-1")
    rules = {
        "food": build_topics.Rule(files=(13,)),
        "law": build_topics.Rule(domains=("law#1",)),
        "sea": build_topics.Rule(roots=("vessel#1",)),
    }
    monkeypatch.setattr(build_topics, "RULES", rules)
    built = build_topics.build(tmp_path)
    words = {
        (record["topic"], record["word"], record["definition"])
        for record in built
        if "word" in record
    }
    assert words == {
        ("food", "pie", long),
        ("law", "verdict", long + " too"),
        ("sea", "vessel", long + " again"),
        ("sea", "brig", long),
    }
    lexicons = {record["topic"]: record["lexicon"] for record in built if "lexicon" in record}
    assert lexicons == {"food": ["pie"], "law": ["verdict"], "sea": ["brig", "vessel"]}


def test_a_folder_without_wordnet_is_explained(tmp_path):
    with pytest.raises(UserError, match="no WordNet"):
        build_topics.build(tmp_path)


def test_no_definition_is_in_two_topics_or_two_splits():
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for name, topic in read_topics().items():
        for each in topic.definitions:
            key = (each.word, each.definition)
            assert seen.setdefault(key, (name, each.split)) == (name, each.split)
        assert {each.split for each in topic.definitions} == {"discover", "classify", "dev", "test"}
    assert len(read_topics()) >= 12


def test_a_classifier_tells_the_topics_apart():
    """Trained on one split, read on another: far above the chance of one in fourteen."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.naive_bayes import ComplementNB
    from sklearn.pipeline import make_pipeline

    topics = read_topics()
    pairs = {
        split: [
            (t, name)
            for name, topic in topics.items()
            for t in (d.definition for d in topic.definitions if d.split in split)
        ]
        for split in (("discover", "classify"), ("test",))
    }
    train, test = pairs["discover", "classify"], pairs[("test",)]
    classifier = make_pipeline(TfidfVectorizer(sublinear_tf=True), ComplementNB(alpha=0.1))
    classifier.fit(*zip(*train, strict=True))
    texts, names = zip(*test, strict=True)
    assert classifier.score(texts, names) > 0.6


def test_contrast_is_everything_else():
    own = set(topic_named("food").texts("dev"))
    contrast = contrast_texts("food", "dev")
    assert own.isdisjoint(contrast)
    assert len(contrast) == sum(len(t.texts("dev")) for t in read_topics().values()) - len(own)
    with pytest.raises(UserError, match="no topic"):
        topic_named("philately")


def test_prompts_are_disjoint_and_enough():
    prompts = read_prompts()
    assert (len(prompts.dev), len(prompts.test)) == (64, 128)
    assert not set(prompts.dev) & set(prompts.test)
    assert set(prompts.topical) == set(prompts.topical_test) >= set(read_topics())
    for topic, own in prompts.topical.items():
        assert len(own) >= 4
        assert len(prompts.topical_test[topic]) >= 8
        assert not set(own) & set(prompts.topical_test[topic])
    assert len(prompts.neutral_texts) >= 24


def test_neutral_texts_hold_few_words_of_any_topic():
    words = sources.words_of(" ".join(read_prompts().neutral_texts))
    for name, topic in read_topics().items():
        assert sources.lexicon_rate(words, topic.lexicon) < 0.03, name


@pytest.mark.skipif(not sources.installed()["empath"], reason="the package empath is not installed")
def test_empaths_words_find_their_own_topic():
    for name, topic in read_topics().items():
        words = [word for text in topic.texts("test") for word in sources.words_of(text)]
        lexicon = sources.empath_lexicon(name)
        others = [w for t in contrast_texts(name, "test") for w in sources.words_of(t)]
        assert sources.lexicon_rate(words, lexicon) > 1.5 * sources.lexicon_rate(others, lexicon), (
            name
        )
