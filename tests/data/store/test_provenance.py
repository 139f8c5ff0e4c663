"""The digest of a text or a model changes with whatever would change the rows, and with nothing
else."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

import data.store.provenance as provenance
from data.model.spec import Folder, Gguf, HuggingFace, Packaged
from data.store.provenance import corpus_digest, model_digest
from data.text import corpus
from data.text.corpus import BundledText, HubText, Mixture, PackagedText, Part, TextFiles
from data.text.packaged_texts import packaged_texts


@pytest.mark.parametrize("name", [*packaged_texts()])
def test_a_packaged_text_changes_with_its_own_package_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = packaged_texts()[name].requirement.partition("==")[0]
    versions = {text.requirement.partition("==")[0]: "1" for text in packaged_texts().values()}
    monkeypatch.setattr(metadata, "version", lambda package: versions[package])
    monkeypatch.setattr(platform, "python_version", lambda: versions[""])
    before = corpus_digest(PackagedText(name=name))
    for package in versions:
        versions[package] = "2"
        assert (corpus_digest(PackagedText(name=name)) != before) == (package == own), package
        versions[package] = "1"


def test_a_mixture_changes_with_any_of_its_parts(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    mixture = Mixture(
        parts=(Part(corpus=BundledText()), Part(corpus=TextFiles(paths=(str(file),))))
    )
    before = corpus_digest(mixture)
    assert corpus_digest(mixture) == before
    file.write_text("two")
    assert corpus_digest(mixture) != before


def test_a_renamed_text_file_counts_since_its_name_is_a_title(tmp_path: Path) -> None:
    spec = TextFiles(paths=(str(tmp_path),))
    (tmp_path / "a.txt").write_text("one")
    before = corpus_digest(spec)
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert corpus_digest(spec) != before


def test_a_quantised_model_changes_with_the_way_it_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    specs = (Gguf(path=tmp_path / "m.gguf"), Packaged())
    before = [model_digest(spec) for spec in specs]
    monkeypatch.setattr(provenance, "CONVERSION", provenance.CONVERSION + 1)
    assert all(model_digest(spec) != old for spec, old in zip(specs, before, strict=True))


def test_a_model_folder_changes_with_any_byte_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Edited in place, a byte deep inside a large file, same size."""
    monkeypatch.setenv("FEATUREFLOW_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(20 << 20))
    spec = Folder(path=folder)
    before = model_digest(spec)
    assert model_digest(spec) == before
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.seek(7_654_321)
        stream.write(b"x")
    assert model_digest(spec) != before


def test_a_local_data_set_changes_with_its_files(tmp_path: Path) -> None:
    spec = HubText(dataset=str(tmp_path))
    (tmp_path / "train.jsonl").write_text('{"text": "one"}')
    before = corpus_digest(spec)
    assert corpus_digest(spec) == before
    (tmp_path / "train.jsonl").write_text('{"text": "two"}')
    assert corpus_digest(spec) != before


def test_a_data_set_of_the_hub_changes_with_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a network the commit that was read last stands."""
    monkeypatch.setenv("FEATUREFLOW_CACHE", str(tmp_path))
    commits = iter(["a" * 40, "b" * 40])

    def dataset_info(*_: object, **__: object) -> object:
        commit = next(commits, None)
        if commit is None:
            raise OSError("no network")
        return SimpleNamespace(sha=commit)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    seen = []
    for _ in range(3):
        corpus._commit_of.cache_clear()
        seen.append(corpus_digest(HubText(dataset="someone/text")))
    assert seen[0] != seen[1] == seen[2]
    pinned = HubText(dataset="someone/text", revision="a" * 40)
    assert corpus_digest(pinned) == seen[0]


def test_a_model_of_the_hub_changes_with_the_commit_that_lies_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`main` moves on; what was fetched anew is another model."""
    commit = "a" * 40
    monkeypatch.setattr("data.model.sources.hub_snapshot", lambda *_: Path("/cache") / commit)
    spec = HuggingFace(name="someone/tiny")
    before = model_digest(spec)
    assert model_digest(spec) == before
    commit = "b" * 40
    assert model_digest(spec) != before
