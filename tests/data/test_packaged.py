"""The packaged texts and the guide to models and text: what they promise is there."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from data.model.spec import ModelSpec, Packaged, name_of
from data.packaged import packaged_model_file
from data.text.corpus import CorpusSpec, Mixture, PackagedText, iter_documents
from data.text.documents import Document
from data.text.packaged_texts import packaged_texts
from featureflow.settings import Settings

GUIDE = Path(__file__).parents[2] / "docs" / "models-and-text.md"


def documents_of(name: str) -> list[Document]:
    text = packaged_texts()[name]
    if text.requirement and find_spec(text.module) is None:
        pytest.skip(f"{text.requirement} is not installed")
    return list(iter_documents(PackagedText(name=name), 0))


def test_wiki_has_its_articles_and_topics() -> None:
    documents = documents_of("wiki")
    assert len(documents) == 10_033
    topics = Counter(document.label for document in documents)
    assert topics["People"] == 1828
    assert len(topics) == 12, "eleven topics and none"
    chess = next(document for document in documents if document.title == "Chess")
    assert "board game" in chess.text


def test_recipes_read_as_recipes() -> None:
    documents = documents_of("recipes")
    assert len(documents) == 3129
    assert all(
        "\n\nIngredients\n" in document.text and "\n\nProcedure\n" in document.text
        for document in documents
    )
    assert not any("None" in document.label for document in documents)


@pytest.mark.parametrize(
    ("name", "n_documents", "labels"),
    [("news", 3823, 1), ("commons", 1000, 2), ("reviews", 13_891, 3)],
)
def test_tables_are_read_whole(name: str, n_documents: int, labels: int) -> None:
    documents = documents_of(name)
    assert len(documents) == n_documents
    assert len({document.label for document in documents}) >= labels
    assert {document.source for document in documents} == {name}


def test_every_packaged_text_is_in_the_guide() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    for name, text in packaged_texts().items():
        assert f"| `{name}` |" in guide
        assert text.requirement in guide


class OfModel(Settings):
    model: ModelSpec


class OfCorpus(Settings):
    corpus: CorpusSpec


def read_examples(cls: type, pattern: str, guide: str) -> list:
    """As a recipe reads them."""
    problems: list = []
    found = [cls.read(tomllib.loads(each), "", problems) for each in re.findall(pattern, guide)]
    assert not problems
    return found


def test_every_example_in_the_guide_is_valid() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    specs = [found.model for found in read_examples(OfModel, r"`(model = \{.*?\})`", guide)]
    assert {spec.kind for spec in specs} == {
        "packaged",
        "huggingface",
        "folder",
        "gguf",
        "transformer_lens",
        "random",
        "world",
    }
    assert name_of(next(spec for spec in specs if spec.kind == "gguf")) == "mine.Q4_K_M.gguf"
    corpora = read_examples(OfCorpus, r"`(corpus = \{.*?\})`", guide)
    kinds = {found.corpus.kind for found in corpora}
    assert kinds == {"packaged", "files", "hub", "bundled", "world"}
    recipe = tomllib.loads(re.findall(r"```toml\n(.*?)```", guide, re.DOTALL)[0])
    mixture = TypeAdapter(CorpusSpec).validate_python(recipe["collect"]["corpus"])
    assert isinstance(mixture, Mixture)
    assert [part.weight for part in mixture.parts] == [0.5, 0.2, 0.3]


@pytest.mark.smollm2
def test_the_python_example_in_the_guide_runs() -> None:
    program = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)[0]
    names: dict[str, object] = {}
    exec(compile(program, GUIDE.name, "exec"), names)
    assert tuple(names["x"].shape)[2] == 576  # type: ignore[attr-defined]
    assert names["logits"].isfinite().all()  # type: ignore[attr-defined]


def test_the_packaged_model_s_name_says_what_it_is() -> None:
    assert name_of(Packaged()) == "SmolLM2-135M-Instruct-Q4_1"
    assert packaged_model_file("smollm2-135m").path.stem.replace(".", "-") == name_of(Packaged())
