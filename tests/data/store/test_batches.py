"""Shuffled batches: every kept row once an epoch, the same rows at every site, and the same order
after a restart."""

import hashlib
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.store import FLAG_BOS, FLAG_SINK, ActivationStore, RowFilters
from data.store.statistics import histogram_edges
from data.store.windows import EpochPlan, ShuffleChoices
from featureflow.errors import UserError
from tests.data.store.made import MLP, N_CONTEXT, RESIDUAL, make_store, planted_rows


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("batches") / "store.zarr", planted_rows())


@settings(max_examples=60, deadline=None)
@given(
    kept=st.sets(st.integers(0, 900), min_size=40),
    batch_size=st.integers(1, 40),
    window_blocks=st.integers(1, 9),
    block_rows=st.sampled_from([1, 7, 64]),
    seed=st.integers(0, 5),
)
def test_an_epoch_holds_each_row_at_most_once_and_leaves_out_less_than_a_batch(
    kept, batch_size, window_blocks, block_rows, seed
):
    rows = np.array(sorted(kept))
    plan = EpochPlan(
        rows,
        ShuffleChoices(
            seed=seed, batch_size=batch_size, window_blocks=window_blocks, block_rows=block_rows
        ),
        epoch=2,
    )
    served = Counter(int(row) for batch in range(plan.n_batches) for row in plan.rows_of(batch))
    assert set(served) <= kept
    assert max(served.values()) == 1
    assert sum(served.values()) == len(rows) // batch_size * batch_size


@settings(max_examples=30, deadline=None)
@given(world=st.integers(1, 4), seed=st.integers(0, 5))
def test_ranks_share_the_rows_without_overlap_and_have_equally_many_batches(world, seed):
    rows = np.arange(0, 5000, 3)
    plans = [
        EpochPlan(
            rows,
            ShuffleChoices(
                seed=seed, batch_size=16, window_blocks=4, block_rows=50, rank=rank, world=world
            ),
            epoch=0,
        )
        for rank in range(world)
    ]
    assert len({plan.n_batches for plan in plans}) == 1
    served = [
        int(row) for plan in plans for batch in range(plan.n_batches) for row in plan.rows_of(batch)
    ]
    assert len(served) == len(set(served))


@pytest.mark.parametrize("reuse_buffers", [False, True])
@pytest.mark.parametrize("window_rows", [256, 1024, 100_000])
def test_batches_hold_the_planned_rows_at_every_site(store, window_rows, reuse_buffers):
    everything = {name: store.read(name, 0, store.n_rows) for name in (RESIDUAL, MLP)}
    choices = {"batch_size": 300, "seed": 1, "n_epochs": 2, "window_rows": window_rows}
    n = 0
    with store.batches([RESIDUAL, MLP], reuse_buffers=reuse_buffers, **choices) as reader:
        for batch in reader:
            epoch, index = divmod(n, reader.plan(0).n_batches)
            rows = reader.rows_of(epoch, index)
            for name, values in batch.items():
                assert batch[name].dtype == torch.float32
                assert np.array_equal(values.numpy(), everything[name][rows])
            n += 1
    assert n == 2 * (len(store.kept_rows("train")) // 300)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_every_stored_dtype_is_read_in_batches_as_by_read(tmp_path, dtype):
    store = make_store(tmp_path / "store.zarr", planted_rows(), dtype=dtype)
    everything = store.read(RESIDUAL, 0, store.n_rows)
    reader = store.batches([RESIDUAL], batch_size=512, seed=0, n_epochs=1)
    for index, batch in enumerate(reader):
        assert np.array_equal(batch[RESIDUAL].numpy(), everything[reader.rows_of(0, index)])


def test_a_batch_larger_than_its_windows_holds_the_planned_rows(store):
    """Each batch spans several windows, so that a window is read anew while the batch before is
    gathered from it."""
    everything = store.read(RESIDUAL, 0, store.n_rows)
    reader = store.batches([RESIDUAL], batch_size=1300, seed=3, n_epochs=3, window_rows=256)
    for n, batch in enumerate(reader):
        epoch, index = divmod(n, reader.plan(0).n_batches)
        assert np.array_equal(batch[RESIDUAL].numpy(), everything[reader.rows_of(epoch, index)])


def test_epochs_and_seeds_differ_and_the_same_seed_repeats(store):
    reader = store.batches([MLP], batch_size=512, seed=5)
    again = store.batches([MLP], batch_size=512, seed=5)
    other = store.batches([MLP], batch_size=512, seed=6)
    assert np.array_equal(reader.rows_of(0, 0), again.rows_of(0, 0))
    assert not np.array_equal(reader.rows_of(0, 0), reader.rows_of(1, 0))
    assert not np.array_equal(reader.rows_of(0, 0), other.rows_of(0, 0))


@pytest.mark.parametrize(
    ("rows", "choices", "digest"),
    [
        (
            np.arange(0, 9000, 3),
            {"batch_size": 700, "window_blocks": 5, "block_rows": 64},
            "a57137ba29d067f2",
        ),
        (
            np.arange(5000),
            {"batch_size": 128, "window_blocks": 4, "block_rows": 128, "world": 3},
            "ea804b461c2ff79b",
        ),
    ],
)
def test_the_order_is_that_of_the_version_that_saved_a_state(rows, choices, digest):
    """A state of an older version, or of another numpy, would go on with other rows."""
    plan = EpochPlan(rows, ShuffleChoices(seed=3, **choices), epoch=2)
    order = np.concatenate([plan.rows_of(batch) for batch in range(plan.n_batches)]).astype("<i8")
    assert hashlib.sha256(order.tobytes()).hexdigest().startswith(digest)


def test_the_first_window_of_the_next_epoch_is_read_while_this_one_is_trained_on(
    store, monkeypatch
):
    read = []
    whole = ActivationStore.read_stored
    monkeypatch.setattr(
        ActivationStore,
        "read_stored",
        lambda self, site, chunk, out: (whole(self, site, chunk, out), read.append(chunk)),
    )
    with store.batches([MLP], batch_size=500, seed=0, window_rows=100_000) as reader:
        next(reader)
        a_window = len(reader.plan(0).blocks_of(0))
        deadline = time.monotonic() + 10
        while len(read) < 2 * a_window and time.monotonic() < deadline:
            time.sleep(0.01)
    assert sorted(read) == sorted(2 * reader.plan(0).blocks_of(0).tolist())


@pytest.mark.parametrize("stop_after", [0, 1, 6, 7, 8, 13])
def test_a_restored_reader_continues_with_exactly_the_next_batch(store, stop_after):
    choices = {"batch_size": 500, "seed": 2, "n_epochs": 2, "window_rows": 700}
    whole = [batch[MLP] for batch in store.batches([MLP], **choices)]
    with store.batches([MLP], **choices) as first:
        head = [next(first)[MLP] for _ in range(stop_after)]
        state = first.state()
    second = store.batches([MLP], **choices)
    second.restore(state)
    tail = [batch[MLP] for batch in second]
    assert len(whole) == 16
    assert all(torch.equal(a, b) for a, b in zip(whole, head + tail, strict=True))


def test_a_state_of_other_choices_is_refused(store):
    state = store.batches([MLP], batch_size=500, seed=2).state()
    with pytest.raises(UserError) as caught:
        store.batches([MLP], batch_size=400, seed=3).restore(state)
    assert len(caught.value.problems) == 2


def test_splits_share_no_document(store):
    documents = store.tokens().document
    train, validation = store.kept_rows("train"), store.kept_rows("validation")
    assert train.max() < store.validation_start <= validation.min()
    assert not set(train.tolist()) & set(validation.tolist())
    assert len(documents) == store.n_rows


def test_filters_leave_out_what_they_name(store):
    tokens = store.tokens()
    plain = store.kept_rows("train")
    assert not (tokens.flags[plain] & FLAG_BOS).any()
    with_bos = store.kept_rows("train", RowFilters(drop_bos=False, drop_sinks=False))
    assert len(with_bos) == store.validation_start
    middle = store.kept_rows("train", RowFilters(min_position=3, max_position=5))
    assert set((middle % N_CONTEXT).tolist()) == {3, 4, 5}


def test_massive_tokens_are_flagged_as_sinks_and_kept_out_of_the_statistics(tmp_path):
    rows = planted_rows()
    rows[RESIDUAL][777] *= 50
    store = make_store(tmp_path / "store.zarr", rows, dtype="float32")
    assert store.tokens().flags[777] == FLAG_SINK
    kept = np.flatnonzero(store.tokens().flags == 0)
    true = rows[RESIDUAL].numpy()[kept].astype(np.float64)
    found = store.statistics(RESIDUAL)
    assert found.n == len(kept)
    assert np.allclose(found.mean, true.mean(axis=0), rtol=1e-5, atol=1e-5)
    assert np.allclose(found.variance, true.var(axis=0), rtol=1e-4)
    norms = np.linalg.norm(true, axis=1)
    assert found.median_norm == pytest.approx(np.median(norms), rel=1e-6)
    expected, _ = np.histogram(norms, bins=histogram_edges())
    assert np.array_equal(found.norm_histogram, expected)
    far = store.kept_rows("train", RowFilters(max_norm_ratio=1.0), sites=[RESIDUAL])
    assert 0.4 < len(far) / len(store.kept_rows("train")) < 0.6


def test_too_few_rows_for_a_batch_are_explained(store):
    with pytest.raises(UserError, match="too few rows"):
        store.batches([MLP], batch_size=10_000, seed=0)
    with pytest.raises(UserError, match="no site"):
        store.batches(["blocks.9.hook_mlp_out"], batch_size=10, seed=0)


def test_closing_early_leaves_no_threads(store):
    import threading

    before = threading.active_count()
    reader = store.batches([RESIDUAL], batch_size=64, seed=0)
    next(reader)
    reader.close()
    assert threading.active_count() == before
