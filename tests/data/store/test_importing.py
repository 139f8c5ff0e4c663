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
    with pytest.raises(UserError, match="meta") as error:
        imported(tmp_path / "in", tmp_path / "store.zarr")
    assert len(error.value.problems) == 12
    choices = {"dtype": "bfloat16", "n_context": 50, "ignore": ("meta",)}
    store = imported(tmp_path / "in", tmp_path / "store.zarr", **choices)
    assert store.names == (SITE,)
    expected = torch.from_numpy(rows).to(torch.bfloat16).float().numpy()
    assert np.array_equal(store.read(SITE, 0, store.n_rows), expected)


def test_npy_files_of_any_model_come_in_under_their_own_names(tmp_path):
    first, second = planted().reshape(30, 20, 12), planted(600, 7)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "mid_block.npy", first)
    np.save(tmp_path / "in" / "patches_0.npy", second[:100])
    np.save(tmp_path / "in" / "patches_1.npy", second[100:])
    store = imported(tmp_path / "in", tmp_path / "store.zarr")
    assert store.names == ("mid_block", "patches")
    assert [site.short for site in store.sites] == ["M0.mid_block", "M1.patches"]
    assert np.array_equal(store.read("mid_block", 0, 600), first.reshape(600, 12))
    assert np.array_equal(store.read("patches", 90, 110), second[90:110])
    batch = next(iter(store.batches(["patches"], batch_size=32, seed=0)))
    assert batch["patches"].shape == (32, 7)


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


def refused(source, *, of=1, **choices):
    """The problems of a source, all in one error; nothing is left where the store would be."""
    url = source.parent / "refused.zarr"
    with pytest.raises(UserError) as error:
        import_activations(source, url, HERE, **choices)
    assert not url.exists()
    assert len(error.value.problems) == of
    return str(error.value)


@pytest.mark.parametrize("shards", [None, (200, 12)])
def test_chunks_that_were_never_written_are_no_zeros(tmp_path, shards):
    group = zarr.create_group(tmp_path / "in.zarr")
    for name in ("L3", "L4"):
        array = group.create_array(
            name, shape=(600, 12), chunks=(100, 12), shards=shards, dtype="float32"
        )
        array[: 500 if name == "L4" else 600] = 1 + planted()[: 500 if name == "L4" else 600]
    assert "1 of 6" in refused(tmp_path / "in.zarr")
    files = sorted(
        each for each in (tmp_path / "in.zarr" / "L3" / "c").rglob("*") if each.is_file()
    )
    files[1].unlink()
    found = refused(tmp_path / "in.zarr", of=2)
    assert "L3" in found
    assert "L4" in found


def test_arrays_of_another_rank_or_kind_are_not_dropped(tmp_path):
    group = zarr.create_group(tmp_path / "in.zarr")
    arrays = {
        "L3": planted(),
        "ids": np.ones((600, 12), np.int32),
        "norms": planted()[:, 0],
        "deep/L4": planted(),
    }
    for name, values in arrays.items():
        group.create_array(name, data=values)
    found = refused(tmp_path / "in.zarr", of=2)
    assert "ids" in found
    assert "norms" in found
    with pytest.raises(UserError, match="not usable as a site"):
        import_activations(tmp_path / "in.zarr", tmp_path / "x", HERE, ignore=("ids", "norms"))
    left_out = ("ids", "norms", "deep/L4")
    assert imported(tmp_path / "in.zarr", tmp_path / "s.zarr", ignore=left_out).names == (SITE,)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"L3-0": 5, "L3-2": 5}, "also 1"),
        ({"L3-2": 5, "L3-3": 5}, "also 1"),
        ({"L3-00001-of-00003": 5, "L3-00002-of-00003": 5}, "also 3"),
        ({"L3": 5, "L3-0": 5}, "no series"),
        ({"L3-1": 5, "L3-01": 5}, "no series"),
        ({"a/L3": 5, "b/L3": 5}, "no series"),
        ({"L3-0": 5, "L3-1": 6, "L4-0": 6, "L4-1": 5}, "other rows at each site"),
        ({"L3": 5, "blocks.3.hook_resid_post": 5}, "two arrays of one site"),
        ({"L3": 5, "L4": 6}, "differ in length"),
        ({"resid_post_11": 5, "resid_post_12": 5}, "missing"),
        ({"resid_post_0": 5, "resid_post_1": 5}, "are these layers"),
        ({"layer_0": 5, "layer_1": 5}, "are these layers"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(tmp_path, files, expected):
    for name, n in files.items():
        place = tmp_path / "in" / f"{name}.npy"
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place, planted(n))
    with pytest.raises(UserError, match="does not fit together") as error:
        import_activations(tmp_path / "in", tmp_path / "store.zarr", HERE)
    assert expected in str(error.value)


def _zarr_group(folder, names=("L3",), **options):
    group = zarr.create_group(folder, zarr_format=options.pop("zarr_format", 3))
    for name in names:
        array = group.create_array(
            name, shape=(600, 12), chunks=(100, 12), **{"dtype": "float32", **options}
        )
        array[:] = planted() + float(name[1:])
    return folder


@pytest.mark.parametrize("options", [{}, {"dtype": ">f4", "order": "F"}])
def test_zarr_of_version_2_comes_in_and_a_chunk_that_is_missing_there_is_seen(tmp_path, options):
    source = _zarr_group(tmp_path / "in.zarr", zarr_format=2, **options)
    found = imported(source, tmp_path / "store.zarr").read(SITE, 0, 600)
    assert np.array_equal(found, planted() + 3)
    (source / "L3" / "2.0").unlink()
    assert "1 of 6" in refused(source)


def test_zarr_arrays_that_consolidated_metadata_do_not_name_are_there(tmp_path):
    source = _zarr_group(tmp_path / "in.zarr")
    with pytest.warns(UserWarning, match="Consolidated"):
        zarr.consolidate_metadata(source)
    group = zarr.open_group(source, mode="r+", use_consolidated=False)
    group.create_array("L4", data=planted() + 4)
    store = imported(source, tmp_path / "store.zarr")
    assert np.array_equal(store.read("blocks.4.hook_resid_post", 0, 600), planted() + 4)


def test_a_damaged_zarr_group_is_refused_whatever_is_damaged(tmp_path):
    for number, (damaged, content, expected) in enumerate(
        [
            ("L4/zarr.json", None, "neither group nor array"),
            ("L4/zarr.json", b"{", "that can be read"),
            ("L4/c/1/0", b"\x28", "a chunk cannot be read"),
        ]
    ):
        source = _zarr_group(tmp_path / f"{number}.zarr", ("L3", "L4"))
        file = source / damaged
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(UserError) as error:
            import_activations(source, tmp_path / f"out{number}.zarr", HERE)
        assert expected in str(error.value)


def test_zarr_groups_lie_side_by_side_or_beside_what_is_refused(tmp_path):
    for name in ("L3", "L4"):
        _zarr_group(tmp_path / "in" / f"{name}.zarr", (name,))
    store = imported(tmp_path / "in", tmp_path / "store.zarr")
    assert np.array_equal(store.read("blocks.4.hook_resid_post", 0, 600), planted() + 4)
    np.save(tmp_path / "in" / "L5.npy", planted())
    (tmp_path / "in" / "L6.npy.gz").write_bytes(b"x")
    found = refused(tmp_path / "in", of=2)
    assert all(each in found for each in ("L5.npy", "L6.npy.gz"))


def test_npy_of_any_byte_order_and_layout_comes_in(tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "L3.npy", planted().astype(">f4"))
    np.save(tmp_path / "in" / "L4.npy", np.asfortranarray(planted().reshape(30, 20, 12)))
    store = imported(tmp_path / "in", tmp_path / "store.zarr")
    for name in store.names:
        assert np.array_equal(store.read(name, 0, 600), planted())


def test_rows_and_contexts_are_not_joined_into_one_site(tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "L3-0.npy", planted(60).reshape(3, 20, 12))
    np.save(tmp_path / "in" / "L3-1.npy", planted(50))
    assert "differ in rank" in refused(tmp_path / "in")


def test_what_is_ignored_is_not_complained_of_and_what_is_not_there_cannot_be(tmp_path):
    source = _zarr_group(tmp_path / "in.zarr", ("L3", "L4"))
    (source / "L4" / "c" / "2" / "0").unlink()
    assert "1 of 6" in refused(source)
    assert imported(source, tmp_path / "store.zarr", ignore=("L4",)).names == (SITE,)
    assert "L7" in refused(source, ignore=("L4", "L7"))


def test_an_arrow_stream_that_ends_between_two_batches_is_refused(tmp_path):
    """Without the mark of its end pyarrow takes the batches before the cut for the whole."""
    write_saelens_cache(tmp_path / "cache", planted(), n_context=20)
    file = tmp_path / "cache" / "data-b.arrow"
    file.write_bytes(file.read_bytes()[:-8])
    assert "cut off" in refused(tmp_path / "cache")


def test_every_part_holds_every_site(tmp_path):
    (tmp_path / "in").mkdir()
    rows = torch.from_numpy(planted(20))
    save_file({"L3": rows, "L4": rows + 1}, tmp_path / "in" / "part-0.safetensors")
    save_file({"L3": rows}, tmp_path / "in" / "part-1.safetensors")
    assert "part 1 has no rows of this site" in refused(tmp_path / "in", of=3)
    save_file({"L4": rows}, tmp_path / "in" / "part-1.safetensors")
    save_file({"L3": rows}, tmp_path / "in" / "part-0.safetensors")
    assert "part 0 has no rows of this site" in refused(tmp_path / "in", of=2)


def test_files_named_by_layer_are_no_parts(tmp_path):
    (tmp_path / "in").mkdir()
    for layer in (3, 5):
        rows = torch.from_numpy(planted(20)) + layer
        save_file({f"L{layer}": rows}, tmp_path / "in" / f"layer_{layer}.safetensors")
    store = imported(tmp_path / "in", tmp_path / "store.zarr")
    assert np.array_equal(store.read("blocks.5.hook_resid_post", 0, 20), planted(20) + 5)


def test_contexts_and_dtypes_must_agree(tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "L3.npy", planted(60).reshape(3, 20, 12))
    np.save(tmp_path / "in" / "L4.npy", planted(60).reshape(6, 10, 12))
    assert "10, 20 positions" in refused(tmp_path / "in")
    (tmp_path / "in" / "L4.npy").unlink()
    with pytest.raises(UserError, match="another length"):
        import_activations(tmp_path / "in", tmp_path / "store.zarr", HERE, n_context=30)
    np.save(tmp_path / "in" / "L4.npy", np.zeros((60, 12), bool))
    np.save(tmp_path / "in" / "L5.npy", np.zeros((0, 12), np.float32))
    found = refused(tmp_path / "in", of=2)
    assert "bool" in found
    assert "empty" in found


def test_other_formats_beside_and_names_that_are_not_there(tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "L3.npy", planted(60))
    save_file({"L4": torch.zeros(60, 12)}, tmp_path / "in" / "L4.safetensors")
    torch.save({}, tmp_path / "in" / "L5.pt")
    found = refused(tmp_path / "in", of=3, rename={"acts": "L6"})
    assert all(each in found for each in ("L3.npy", "L5.pt", "acts"))


def test_a_saelens_cache_with_a_hole_is_refused(tmp_path):
    write_saelens_cache(tmp_path / "cache", planted(), n_context=20)
    columns = pa.table({SITE: pa.array([[[1.0] * 12] * 20, [[1.0] * 12] * 19])})
    with (
        pa.OSFile(str(tmp_path / "cache" / "data-c.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, columns.schema) as writer,
    ):
        writer.write_table(columns)
    assert "does not name" in refused(tmp_path / "cache")
    state = {"_data_files": [{"filename": f"data-{each}.arrow"} for each in "bacd"]}
    (tmp_path / "cache" / "state.json").write_text(json.dumps(state))
    found = refused(tmp_path / "cache", of=2)
    assert "data-d.arrow" in found
    assert "lists of" in found


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
