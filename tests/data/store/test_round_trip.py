"""What goes into a store comes out of it: for us, for zarr-python and for tensorstore."""

import json

import numpy as np
import pytest
import tensorstore
import torch
import zarr

from data.store import ActivationStore
from data.store.checks import verify_store
from featureflow.errors import UserError
from pipeline.context import RunContext
from tests.data.store.made import MLP, N_CONTEXT, RESIDUAL, make_store, planted_rows


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


def fraction_lost(store, rows, name):
    found, true = store.read(name, 0, store.n_rows), rows[name].numpy()
    return ((found - true) ** 2).sum() / ((true - true.mean(axis=0)) ** 2).sum()


@pytest.mark.parametrize("n_quiet", [1024, 700, 2000])
def test_int8_follows_a_dimension_that_wakes_up_late(tmp_path, n_quiet):
    """Spread measured on the first chunk of a shard alone would lose 92 % of the variance."""
    rows = {MLP: torch.randn(16_384, 64, generator=torch.Generator().manual_seed(0))}
    rows[MLP][:n_quiet, 7] = 0
    choices = {"dtype": "int8", "shard_rows": 16_384, "chunk_rows": 1024}
    store = make_store(tmp_path / "store.zarr", rows, **choices)
    assert fraction_lost(store, rows, MLP) < 1e-3
    report = verify_store(store.url, True, RunContext())
    assert report.is_sound
    assert 0 < report.variance_lost[MLP] < 1e-3
    assert report.variance_lost[MLP] >= fraction_lost(store, rows, MLP) * 0.9


def test_int8_keeps_rows_that_statistics_leave_out(tmp_path):
    """A dimension that only flagged rows have (here the first of each context)."""
    rows = planted_rows()
    rows[RESIDUAL][:, 3] = 0
    rows[RESIDUAL][::N_CONTEXT, 3] = 500
    store = make_store(tmp_path / "store.zarr", rows, dtype="int8")
    found = store.read(RESIDUAL, 0, store.n_rows)
    assert fraction_lost(store, rows, RESIDUAL) < 0.05  # the massive rows keep their coarse scale
    assert np.abs(found[1::N_CONTEXT, 3]).max() < 1e-3


def test_int8_is_refused_where_it_loses_too_much(tmp_path):
    """A row's scale follows its one large number: 32 spreads against noise of a tenth of one."""
    n = 2048
    spikes = torch.zeros(n, n // 2)
    spikes[torch.arange(n), torch.arange(n) % (n // 2)] = 320.0
    noise = torch.randn(n, n // 2, generator=torch.Generator().manual_seed(0))
    rows = {**planted_rows(n=n), MLP: spikes + noise}
    with pytest.raises(UserError, match="int8") as error:
        make_store(tmp_path / "store.zarr", rows, dtype="int8", chunk_rows=n)
    assert MLP in str(error.value)
    assert "bfloat16" in str(error.value.fix)


def test_an_int8_store_of_before_is_refused(tmp_path):
    make_store(tmp_path / "store.zarr", planted_rows(), dtype="int8")
    file = tmp_path / "store.zarr" / "zarr.json"
    document = json.loads(file.read_text())
    del document["attributes"]["featureflow"]["standard_of"]
    file.write_text(json.dumps(document))
    with pytest.raises(UserError, match="first chunk") as error:
        ActivationStore.open(tmp_path / "store.zarr")
    assert "collect" in str(error.value.fix)


def test_tokens_and_documents_come_back(tmp_path):
    store = make_store(tmp_path / "store.zarr", planted_rows())
    tokens = store.tokens()
    assert tokens.id.tolist() == list(range(store.n_rows))
    assert tokens.documents[3].title == "document 3"
    assert ActivationStore.open(tmp_path / "store.zarr").provenance["corpus"] == "planted"
