"""The same store on an S3 server: a real one, started here."""

import pytest

from data.store import ActivationStore, StoreWriter
from data.store.objects import ObjectPlace
from data.store.places import write_pointer
from sae.errors import UserError
from tests.data.store.made import (
    MLP,
    RESIDUAL,
    fill_shards,
    make_store,
    planted_documents,
    planted_layout,
    planted_rows,
    planted_tokens,
)

moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket():
    import boto3

    server = moto_server.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "tester",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }.items():
        patch.setenv(name, value)
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(Bucket="activations")
    yield "s3://activations"
    patch.undo()
    server.stop()


def test_every_object_has_the_bytes_of_the_local_file(bucket, tmp_path):
    rows = planted_rows()
    make_store(tmp_path / "store.zarr", rows)
    make_store(f"{bucket}/same", rows)
    place = ObjectPlace(f"{bucket}/same")
    local = {
        p.relative_to(tmp_path / "store.zarr").as_posix(): p
        for p in (tmp_path / "store.zarr").rglob("*")
        if p.is_file()
    }
    assert set(place.sizes()) == set(local)
    assert all(place.read(name) == path.read_bytes() for name, path in local.items())


def test_rows_and_batches_come_from_the_bucket(bucket, tmp_path):
    rows = planted_rows()
    here = make_store(tmp_path / "store.zarr", rows)
    there = make_store(f"{bucket}/read", rows)
    assert (there.read(MLP, 100, 3000) == here.read(MLP, 100, 3000)).all()
    choices = {"batch_size": 500, "seed": 3, "n_epochs": 1}
    for ours, theirs in zip(here.batches([RESIDUAL], **choices), there.batches([RESIDUAL], **choices), strict=True):
        assert (ours[RESIDUAL] == theirs[RESIDUAL]).all()


def test_a_pointer_file_stands_for_the_bucket(bucket, tmp_path):
    make_store(f"{bucket}/pointed", planted_rows())
    write_pointer(tmp_path / "store.zarr", f"{bucket}/pointed")
    assert ActivationStore.open(tmp_path / "store.zarr").n_rows == 5000


def test_a_missing_object_and_a_cut_one_are_refused(bucket):
    store = make_store(f"{bucket}/cut", planted_rows())
    name = store.layout.rows_array(store.layout.sites[0]).file_of(1)
    store.place.remove(name)
    with pytest.raises(UserError, match="cannot be trusted") as caught:
        ActivationStore.open(f"{bucket}/cut")
    assert "shard 1" in str(caught.value)
    with pytest.raises(UserError, match="file missing"):
        store.read(RESIDUAL, 2048, 2049)


def test_a_second_writer_of_a_shard_is_turned_away_while_the_first_lives(bucket):
    rows = planted_rows()
    layout = planted_layout(rows)
    first, second = (StoreWriter.create(f"{bucket}/two", layout) for _ in range(2))
    tokens = planted_tokens(5000).part(0, 2048)
    with first.open_shard(0, tokens) as writing:
        with pytest.raises(UserError, match="another process"), second.open_shard(0, tokens):
            pass
        writing.append({name: each[:2048] for name, each in rows.items()})
        writing.commit()
    fill_shards(second, rows, planted_tokens(5000))
    second.finish(planted_documents(5000))
    assert ActivationStore.open(f"{bucket}/two").n_rows == 5000


def test_the_claim_of_a_dead_writer_is_taken_over(bucket, monkeypatch):
    place = ObjectPlace(f"{bucket}/stale")
    place.create("locks/000000.lock", b"a writer that died")
    with place.claimed("locks/000000") as held:
        assert not held
    monkeypatch.setattr("data.store.objects._STALE_SECONDS", -1.0)
    with place.claimed("locks/000000") as held:
        assert held
    assert place.size("locks/000000.lock") is None


def test_a_writer_whose_claim_was_taken_over_publishes_nothing_more(bucket, monkeypatch):
    import time

    monkeypatch.setattr("data.store.objects._RENEW_SECONDS", 0.05)
    monkeypatch.setattr("data.store.objects._STALE_SECONDS", -1.0)
    slow, quick = ObjectPlace(f"{bucket}/lost"), ObjectPlace(f"{bucket}/lost")
    with slow.claimed("locks/000000"):
        assert quick._take("locks/000000.lock", b"quick") is not None
        deadline = time.monotonic() + 10
        while not slow._lost and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(UserError, match="took over"):
            slow.create("records/000000.json", b"{}")


def test_a_bucket_that_is_not_there_is_explained(bucket):
    with pytest.raises(UserError):
        ActivationStore.open("s3://no-such-bucket/store")
