"""Collecting again over a damaged store: sound shards are taken over, damaged ones made anew,
foreign ones left."""

import shutil
from pathlib import Path

import pytest

from data.model.spec import Random
from data.store import ActivationStore, StoreWriter
from data.store.checks import verify_store
from data.store.collection import adopt_shards
from data.text.corpus import BundledText
from featureflow.errors import UserError
from pipeline.context import RunContext
from pipeline.stages.collect import Config
from pipeline.stages.recipe import Recipe
from pipeline.stages.schedule import run_recipe
from tests.data.store.made import RESIDUAL, make_store, planted_layout, planted_rows

CONFIG = Config(
    model=Random(n_layers=2, d_model=16, n_heads=2, d_mlp=32),
    corpus=BundledText(),
    n_context=32,
    n_tokens=4000,
    shard_rows=1024,
    chunk_rows=128,
    batch_contexts=5,
)


def collect(root: Path, *, force: bool = False) -> tuple[Path, list[int]]:
    """The store of a real run of the collect stage, and the shards that the model was run for."""
    collected: list[int] = []
    context = RunContext(metrics=lambda record: collected.append(record["shard"]))
    recipe = Recipe(name="fixed", description="", configs={"collect": CONFIG})
    force_of = ("collect",) if force else ()
    [result] = run_recipe(recipe, to="collect", root=root, context=context, force=force_of)
    return result.artifact.path / "store.zarr", collected


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def shard_file(store: Path, shard: int) -> Path:
    return store / "sites" / RESIDUAL / "rows" / "c" / str(shard) / "0"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip, Path.unlink], ids=["a flipped bit", "a missing file"])
def test_a_forced_collection_runs_the_model_for_the_damaged_shard_alone(tmp_path, damage):
    store, first = collect(tmp_path)
    whole = bytes_of(store)
    assert first == [0, 1, 2, 3]
    damage(shard_file(store, 2))
    fixed, again = collect(tmp_path, force=True)
    assert again == [2]
    assert bytes_of(fixed) == whole
    assert verify_store(fixed, full=True, context=RunContext()).is_sound


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("earlier") / "store.zarr"
    make_store(folder, planted_rows())
    return folder


@pytest.mark.parametrize(
    ("damage", "sound"),
    [
        (lambda folder: None, [0, 1, 2]),
        (lambda folder: flip(shard_file(folder, 0)), [1, 2]),
        (lambda folder: shutil.copy(shard_file(folder, 0), shard_file(folder, 1)), [0, 2]),
        (lambda folder: (folder / "records" / "000002.json").unlink(), [0, 1]),
        (lambda folder: (folder / "tokens" / "id" / "c" / "0").write_bytes(b""), [1, 2]),
        (lambda folder: (folder / "records" / "complete.json").unlink(), [0, 1, 2]),
        (lambda folder: (folder / "zarr.json").write_text("{"), []),
        (shutil.rmtree, []),
    ],
    ids=[
        "whole",
        "flipped bit",
        "file of another shard",
        "no record",
        "emptied",
        "unfinished",
        "no layout",
        "no store",
    ],
)
def test_only_shards_that_are_whole_byte_by_byte_are_taken_over(earlier, tmp_path, damage, sound):
    folder = shutil.copytree(earlier, tmp_path / "earlier.zarr")
    damage(folder)
    writer = StoreWriter.create(tmp_path / "store.zarr", planted_layout(planted_rows()))
    assert adopt_shards(writer, folder) == sound
    assert writer.missing_shards() == [shard for shard in range(3) if shard not in sound]


def test_what_is_taken_over_reads_as_it_was(earlier, tmp_path):
    writer = StoreWriter.create(tmp_path / "store.zarr", planted_layout(planted_rows()))
    adopt_shards(writer, earlier)
    writer.finish(validation_start=4096)
    old, new = ActivationStore.open(earlier), ActivationStore.open(tmp_path / "store.zarr")
    assert (old.read(RESIDUAL, 0, 5000) == new.read(RESIDUAL, 0, 5000)).all()


def test_shards_of_another_run_are_left(earlier, tmp_path):
    other = StoreWriter.create(
        tmp_path / "store.zarr", planted_layout(planted_rows(), provenance={"corpus": "other"})
    )
    assert adopt_shards(other, earlier) == []
    assert other.missing_shards() == [0, 1, 2]
    with pytest.raises(UserError, match="missing"):
        other.finish()
