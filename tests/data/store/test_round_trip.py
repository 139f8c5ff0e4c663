"""What goes into a store comes out of it: for us, for zarr-python and for tensorstore."""

import numpy as np
import pytest
import tensorstore
import torch
import zarr

from data.store import ActivationStore
from tests.data.store.made import RESIDUAL, make_store, planted_rows


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_are_read_back_as_rounded_to_the_stored_dtype(tmp_path, dtype):
    rows = planted_rows()
    store = make_store(tmp_path / "store.zarr", rows, dtype=dtype)
    for name, values in rows.items():
        expected = values.to(getattr(torch, dtype)).float().numpy()
        assert np.array_equal(store.read(name, 0, store.n_rows), expected)


def test_any_part_of_the_rows_can_be_read(tmp_path):
    rows = planted_rows()
    store = make_store(tmp_path / "store.zarr", rows, dtype="float32")
    for start, stop in [
        (0, 1),
        (3, 3),
        (255, 257),
        (500, 2100),
        (2047, 2049),
        (store.n_rows - 1, store.n_rows),
    ]:
        assert np.array_equal(store.read(RESIDUAL, start, stop), rows[RESIDUAL][start:stop].numpy())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_two_other_engines_read_the_same_numbers(tmp_path, dtype):
    store = make_store(tmp_path / "store.zarr", planted_rows(), dtype=dtype)
    folder = tmp_path / "store.zarr" / "sites" / RESIDUAL / "rows"
    by_zarr = zarr.open_array(folder, mode="r")[:]
    by_tensorstore = (
        tensorstore.open({"driver": "zarr3", "kvstore": f"file://{folder}"})
        .result()
        .read()
        .result()
    )
    assert np.array_equal(by_zarr, by_tensorstore)
    values = (by_zarr.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else by_zarr
    assert np.array_equal(values.astype(np.float32), store.read(RESIDUAL, 0, store.n_rows))


def test_int8_loses_less_than_a_ten_thousandth_of_the_variance(tmp_path):
    rows = planted_rows(n=6000, width=256)
    store = make_store(tmp_path / "store.zarr", rows, dtype="int8")
    kept = store.kept_rows("train")
    found, true = store.read(RESIDUAL, 0, store.n_rows)[kept], rows[RESIDUAL].numpy()[kept]
    lost = ((found - true) ** 2).sum() / ((true - true.mean(axis=0)) ** 2).sum()
    assert lost <= 1e-4


def test_tokens_and_documents_come_back(tmp_path):
    store = make_store(tmp_path / "store.zarr", planted_rows())
    tokens = store.tokens()
    assert tokens.id.tolist() == list(range(store.n_rows))
    assert tokens.documents[3].title == "document 3"
    assert ActivationStore.open(tmp_path / "store.zarr").provenance["corpus"] == "planted"
