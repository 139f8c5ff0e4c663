"""Activations of others come in with every number in its place."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
import zarr
from safetensors.torch import save_file

from data.store import ActivationStore, SiteLayout, StoreLayout, write_activations
from data.store.importing import import_activations
from featureflow.errors import UserError
from pipeline.context import RunContext

HERE = RunContext()
SITE = "blocks.3.hook_resid_post"


def planted(n: int = 600, width: int = 12) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((n, width)).astype(np.float32)


def imported(source, url, **choices):
    choices = {"dtype": "float32", "chunk_rows": 64, "shard_rows": 256, **choices}
    assert import_activations(source, url, HERE, **choices).is_sound
    return ActivationStore.open(url)


def write_saelens_cache(folder, rows, n_context):
    """As `CacheActivationsRunner` leaves it: two Arrow streams in the order of state.json, not of
    their names."""
    folder.mkdir()
    contexts = rows.reshape(-1, n_context, rows.shape[1])
    ids = np.arange(len(rows), dtype=np.int32).reshape(-1, n_context)
    half = len(contexts) // 2
    for name, part in (("data-b.arrow", slice(0, half)), ("data-a.arrow", slice(half, None))):
        columns = {SITE: contexts[part].tolist(), "token_ids": ids[part].tolist()}
        types = {SITE: pa.list_(pa.list_(pa.float32())), "token_ids": pa.list_(pa.int32())}
        table = pa.table({key: pa.array(value, types[key]) for key, value in columns.items()})
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as writer,
        ):
            writer.write_table(table, max_chunksize=4)
    state = {"_data_files": [{"filename": "data-b.arrow"}, {"filename": "data-a.arrow"}]}
    (folder / "state.json").write_text(json.dumps(state))


def test_a_saelens_cache_keeps_its_contexts_and_tokens(tmp_path):
    rows = planted()
    write_saelens_cache(tmp_path / "cache", rows, n_context=20)
    store = imported(
        tmp_path / "cache", tmp_path / "store.zarr", first_is_bos=True, validation_fraction=0.1
    )
    assert store.n_context == 20
    assert np.array_equal(store.read(SITE, 0, store.n_rows), rows)
    assert store.tokens().id.tolist() == list(range(600))
    assert store.validation_start == 540
    assert not (store.kept_rows("train") % 20 == 0).any()


def test_safetensors_of_one_site_follow_each_other_in_the_order_of_numbers(tmp_path):
    rows = planted()
    (tmp_path / "in").mkdir()
    for k in range(12):
        part = torch.from_numpy(rows[50 * k : 50 * (k + 1)]).to(torch.bfloat16)
        save_file({"L3": part, "meta": torch.zeros(3)}, tmp_path / "in" / f"part-{k}.safetensors")
    store = imported(tmp_path / "in", tmp_path / "store.zarr", dtype="bfloat16", n_context=50)
    assert store.names == (SITE,)
    expected = torch.from_numpy(rows).to(torch.bfloat16).float().numpy()
    assert np.array_equal(store.read(SITE, 0, store.n_rows), expected)


def test_npy_files_of_any_model_come_in_under_their_own_names(tmp_path):
    first, second = planted().reshape(30, 20, 12), planted(600, 7)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "mid_block.npy", first)
    np.save(tmp_path / "in" / "up_block_0.npy", second[:100])
    np.save(tmp_path / "in" / "up_block_1.npy", second[100:])
    store = imported(tmp_path / "in", tmp_path / "store.zarr")
    assert store.names == ("mid_block", "up_block")
    assert store.sites == ()
    assert np.array_equal(store.read("mid_block", 0, 600), first.reshape(600, 12))
    assert np.array_equal(store.read("up_block", 90, 110), second[90:110])
    batch = next(iter(store.batches(["up_block"], batch_size=32, seed=0)))
    assert batch["up_block"].shape == (32, 7)


def test_a_compressed_zarr_array_of_another_writer_comes_in(tmp_path):
    rows = planted()
    group = zarr.create_group(tmp_path / "in.zarr")
    array = group.create_array("hidden", shape=rows.shape, chunks=(100, 12), dtype="float32")
    array[:] = rows
    store = imported(tmp_path / "in.zarr", tmp_path / "store.zarr", rename={"hidden": "L3"})
    assert np.array_equal(store.read(SITE, 0, 600), rows)


def test_what_cannot_be_imported_is_explained(tmp_path):
    with pytest.raises(UserError, match="nothing here to import"):
        import_activations(tmp_path / "none", tmp_path / "store.zarr", HERE)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing here can be imported"):
        import_activations(tmp_path / "empty", tmp_path / "store.zarr", HERE)
    np.save(tmp_path / "empty" / "a.npy", planted(10))
    np.save(tmp_path / "empty" / "b.npy", planted(11))
    with pytest.raises(UserError, match="differ in length"):
        import_activations(tmp_path / "empty", tmp_path / "store.zarr", HERE)
    np.save(
        tmp_path / "empty" / "b.npy", np.array([{"code": "runs"}], dtype=object), allow_pickle=True
    )
    with pytest.raises(UserError, match="not an array"):
        import_activations(tmp_path / "empty", tmp_path / "store.zarr", HERE)


def test_a_stream_of_unknown_length_is_stored_whole(tmp_path):
    rows = planted(1000)
    layout = StoreLayout(
        sites=(SiteLayout(name="embedding", width=12),),
        dtype="float32",
        n_rows=None,
        n_context=1,
        shard_rows=256,
        chunk_rows=64,
    )
    parts = ((({"embedding": rows[i : i + 37]}), None) for i in range(0, 1000, 37))
    write_activations(tmp_path / "store.zarr", parts, layout=layout)
    store = ActivationStore.open(tmp_path / "store.zarr")
    assert np.array_equal(store.read("embedding", 0, 1000), rows)
    with pytest.raises(UserError, match="no activations"):
        write_activations(tmp_path / "nothing.zarr", [], layout=layout)


def test_no_context_is_in_both_splits_where_the_last_one_is_short(tmp_path):
    np.save(tmp_path / "L3.npy", planted(603))
    store = imported(
        tmp_path / "L3.npy",
        tmp_path / "store.zarr",
        n_context=20,
        shard_rows=320,
        validation_fraction=0.1,
    )
    document = store.tokens().document
    train, validation = document[store.kept_rows("train")], document[store.kept_rows("validation")]
    assert not set(train) & set(validation)
    assert len(set(validation)) == 3
    assert len(train) + len(validation) == 603


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_source_that_changed_under_the_same_name_is_not_taken_for_what_is_stored(
    tmp_path, suffix
):
    source, url = tmp_path / f"L3{suffix}", tmp_path / "store.zarr"

    def write(rows):
        np.save(source, rows) if suffix == ".npy" else save_file(
            {"L3": torch.from_numpy(rows)}, source
        )

    write(planted())
    imported(source, url)
    assert np.array_equal(imported(source, url).read(SITE, 0, 600), planted())
    write(planted() + 1)
    with pytest.raises(UserError, match="another activation store"):
        imported(source, url)


def test_a_longer_stream_over_a_finished_store_leaves_no_row_of_padding(tmp_path):
    layout = StoreLayout(
        sites=(SiteLayout(name="embedding", width=12),),
        dtype="float32",
        n_rows=None,
        n_context=1,
        shard_rows=256,
        chunk_rows=64,
    )
    for n in (290, 300, 310):
        write_activations(
            tmp_path / "store.zarr", [({"embedding": planted(n)}, None)], layout=layout
        )
        store = ActivationStore.open(tmp_path / "store.zarr")
        assert store.n_rows == n
        assert np.array_equal(store.read("embedding", 0, n), planted(n))
