"""Whatever happens to a store on disk, it is refused with the shard, site and what fixes it; never
read as zeros."""

import contextlib
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.store import ActivationStore, StoreWriter
from data.store.checks import describe_store, verify_store
from featureflow.errors import UserError
from pipeline.context import RunContext
from tests.data.store.made import (
    MLP,
    RESIDUAL,
    fill_shards,
    make_store,
    planted_layout,
    planted_rows,
    planted_tokens,
)

HERE = RunContext()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound") / "store.zarr"
    make_store(folder, planted_rows())
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "store.zarr")


def shard_file(folder, site=RESIDUAL, shard=1):
    return folder / "sites" / site / "rows" / "c" / str(shard) / "0"


def test_a_sound_store_verifies(sound):
    report = verify_store(sound, full=True, context=HERE)
    assert report.is_sound
    assert report.n_shards == 3
    assert report.n_bytes == sum(
        p.stat().st_size for p in (sound / "sites").rglob("c/**/*") if p.is_file()
    ) + sum(p.stat().st_size for p in (sound / "tokens").rglob("c/*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    ],
    ids=["missing", "emptied", "one byte short", "half"],
)
def test_a_missing_or_cut_file_is_refused_when_opened_and_when_read(folder, sound, damage):
    reading = ActivationStore.open(folder)
    damage(shard_file(folder))
    with pytest.raises(UserError, match="cannot be trusted") as caught:
        ActivationStore.open(folder)
    assert "shard 1" in str(caught.value)
    assert RESIDUAL in str(caught.value)
    assert "featureflow collect" in str(caught.value)
    assert not verify_store(folder, full=False, context=HERE).is_sound
    if (
        shard_file(folder).exists()
        and shard_file(folder).stat().st_size > shard_file(sound).stat().st_size // 2 + 1
    ):
        return  # only the index is cut: the rows themselves are whole and checked
    with pytest.raises(UserError, match="damaged"):
        reading.read(RESIDUAL, 2048, 4096)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_found_by_full_verification(sound, data):
    files = sorted(p for p in sound.rglob("*") if p.is_file())
    path = data.draw(st.sampled_from(files))
    position = data.draw(st.integers(0, path.stat().st_size - 1))
    original = path.read_bytes()
    flipped = bytearray(original)
    flipped[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(flipped)
    try:
        with contextlib.suppress(
            UserError
        ):  # the root metadata may no longer say that this is a store
            assert not verify_store(sound, full=True, context=HERE).is_sound, path
    finally:
        path.write_bytes(original)


def test_a_flipped_bit_in_a_row_is_never_read(folder):
    path = shard_file(folder)
    content = bytearray(path.read_bytes())
    content[1000] ^= 4
    path.write_bytes(content)
    store = ActivationStore.open(folder)
    with pytest.raises(UserError, match="checksum differs in chunk 0") as caught:
        store.read(RESIDUAL, 2048, 2049)
    assert f"shard 1, {RESIDUAL}" in str(caught.value)
    with pytest.raises(UserError, match="checksum"):
        list(store.batches([RESIDUAL], batch_size=256, seed=0, n_epochs=1))
    store.read(RESIDUAL, 2048 + 256, 4096)
    problems = verify_store(folder, full=True, context=HERE).problems
    assert [problem.found for problem in problems] == ["chunks 0"]


def test_a_shard_of_another_run_is_found_though_its_own_checksums_fit(folder, tmp_path):
    make_store(tmp_path / "other.zarr", planted_rows(seed=1))
    shutil.copy(shard_file(tmp_path / "other.zarr"), shard_file(folder))
    problems = verify_store(folder, full=True, context=HERE).problems
    assert [problem.found for problem in problems] == ["a whole file of another run"]


def test_an_unfinished_store_is_refused(tmp_path):
    rows = planted_rows()
    writer = StoreWriter.create(tmp_path / "store.zarr", planted_layout(rows))
    start, stop = writer.layout.rows_of_shard(1)
    writer.write_shard(
        1, planted_tokens(5000).part(start, stop), [{k: v[start:stop] for k, v in rows.items()}]
    )
    with pytest.raises(UserError, match="not finished") as caught:
        ActivationStore.open(tmp_path / "store.zarr")
    assert "1 of 3 shards" in str(caught.value)
    assert describe_store(tmp_path / "store.zarr")["n_shards_recorded"] == 1
    with pytest.raises(UserError, match="shards are missing"):
        writer.finish()


def test_a_foreign_folder_and_another_schema_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match="no activation store"):
        ActivationStore.open(tmp_path / "nothing")
    document = json.loads((folder / "zarr.json").read_text())
    document["attributes"]["featureflow"]["schema"] = 99
    (folder / "zarr.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="another version"):
        ActivationStore.open(folder)
    (folder / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(UserError, match="not an activation store"):
        ActivationStore.open(folder)


def test_a_damaged_store_is_mended_by_writing_it_again_and_only_the_bad_shard_is_made(
    folder, sound
):
    shard_file(folder).unlink()
    rows = planted_rows()
    writer = StoreWriter.create(folder, planted_layout(rows))
    assert writer.missing_shards() == [1]
    fill_shards(writer, rows, planted_tokens(5000))
    from tests.data.store.made import planted_documents

    writer.finish(planted_documents(5000))
    assert {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == {
        p.name: p.read_bytes() for p in sound.rglob("*") if p.is_file()
    }


def test_rows_that_are_not_finite_stop_the_run_unless_they_are_allowed(tmp_path):
    rows = planted_rows()
    rows[MLP][300, 2] = float("inf")
    rows[MLP][301, :3] = float("nan")
    with pytest.raises(UserError, match="not finite") as caught:
        make_store(tmp_path / "store.zarr", rows)
    assert MLP in str(caught.value)
    writer = StoreWriter.create(
        tmp_path / "store.zarr", planted_layout(rows), allow_non_finite=True
    )
    fill_shards(writer, rows, planted_tokens(5000))
    writer.finish()
    store = ActivationStore.open(tmp_path / "store.zarr")
    assert store.statistics(MLP).n_non_finite == 4
    assert np.isfinite(store.statistics(MLP).mean).all()
    assert not {300, 301} & set(store.kept_rows("train").tolist())


def test_float16_overflow_is_not_stored_as_infinity(tmp_path):
    rows = planted_rows()
    rows[RESIDUAL][128, 0] = 70_000.0
    with pytest.raises(UserError, match="bfloat16"):
        make_store(tmp_path / "store.zarr", rows, dtype="float16")


def test_a_store_of_another_run_is_not_overwritten(folder):
    with pytest.raises(UserError, match="in the way"):
        StoreWriter.create(folder, planted_layout(planted_rows(), dtype="float32"))


def test_two_writers_of_one_shard_cannot_interleave(tmp_path):
    rows = planted_rows()
    writer = StoreWriter.create(tmp_path / "store.zarr", planted_layout(rows))
    other = StoreWriter.attach(tmp_path / "store.zarr")
    tokens = planted_tokens(5000).part(0, 2048)
    with (
        writer.open_shard(0, tokens),
        pytest.raises(UserError, match="another process"),
        other.open_shard(0, tokens),
    ):
        pass


def test_too_few_rows_and_wrong_shapes_leave_no_record(tmp_path):
    rows = planted_rows()
    writer = StoreWriter.create(tmp_path / "store.zarr", planted_layout(rows))
    tokens = planted_tokens(5000).part(0, 2048)
    with pytest.raises(UserError, match="too few rows"):
        writer.write_shard(0, tokens, [{k: v[:100] for k, v in rows.items()}])
    with pytest.raises(UserError, match="wrong shape"):
        writer.write_shard(0, tokens, [{k: v[:100, :7] for k, v in rows.items()}])
    with pytest.raises(UserError, match="more rows"):
        writer.write_shard(0, tokens, [{k: v[:3000] for k, v in rows.items()}])
    assert writer.missing_shards() == [0, 1, 2]
    assert not list((tmp_path / "store.zarr").rglob("*.partial"))


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_place_that_cannot_be_written_is_explained(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(UserError, match="cannot write here"):
        StoreWriter.create(tmp_path / "locked" / "store.zarr", planted_layout(planted_rows()))


def test_what_killed_writers_left_is_gone_when_the_store_is_finished(tmp_path):
    folder = tmp_path / "store.zarr"
    rows = planted_rows()
    writer = StoreWriter.create(folder, planted_layout(rows))
    leftovers = [
        folder / "zarr.json.123-0.partial",
        folder / "records" / "000000.json.123-1.partial",
        folder / "sites" / MLP / "rows" / "c" / "1" / "0.123-2.partial",
    ]
    for path in leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    fill_shards(writer, rows, planted_tokens(5000))
    writer.finish()
    assert not list(folder.rglob("*.partial"))
    assert not (folder / "locks").exists()
