"""The same store on an S3 server and on Azure's emulator: real servers, started here."""

import base64
import hmac
import json
import shutil
import socket
import subprocess
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import pytest

from data.store import ActivationStore, StoreWriter
from data.store.checks import verify_store
from data.store.objects import ObjectPlace
from data.store.places import write_pointer
from featureflow.errors import UserError
from pipeline.context import RunContext
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

AZURITE = Path(__file__).parents[3] / ".emulators/node_modules/azurite/dist/src/blob/main.js"
ACCOUNT, KEY = "tester", base64.b64encode(b"a key for tests, of no other use").decode()


@contextmanager
def s3():
    import boto3

    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    with environment(
        AWS_ACCESS_KEY_ID="tester",
        AWS_SECRET_ACCESS_KEY="tester",
        AWS_REGION="us-east-1",
        AWS_ENDPOINT_URL=endpoint,
        AWS_ALLOW_HTTP="true",
    ):
        boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").create_bucket(
            Bucket="activations"
        )
        yield "s3://activations"
    server.stop()


@contextmanager
def azure():
    """Azurite, Microsoft's emulator: `make emulators` installs it."""
    if not AZURITE.exists() or shutil.which("node") is None:
        pytest.skip("Azurite is not installed (make emulators)")
    port = free_port()
    command = [
        "node",
        AZURITE,
        "--blobHost",
        "127.0.0.1",
        "--blobPort",
        str(port),
        "--inMemoryPersistence",
    ]
    url = f"http://127.0.0.1:{port}"
    with environment(
        AZURITE_ACCOUNTS=f"{ACCOUNT}:{KEY}",
        AZURE_STORAGE_USE_EMULATOR="true",
        AZURE_STORAGE_ACCOUNT_NAME=ACCOUNT,
        AZURE_STORAGE_ACCOUNT_KEY=KEY,
        AZURITE_BLOB_STORAGE_URL=url,
        AZURE_ALLOW_HTTP="true",
    ):
        process = subprocess.Popen(
            [*command, "--silent", "--skipApiVersionCheck"], stdout=subprocess.DEVNULL
        )
        try:
            create_container(f"{url}/{ACCOUNT}/activations")
            yield "az://activations"
        finally:
            process.kill()
            process.wait()


def create_container(url: str) -> None:
    """obstore makes no containers, so this signs one request (the Shared Key scheme of Azure's
    reference)."""
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    signed = "PUT" + 12 * "\n" + "".join(f"{name}:{value}\n" for name, value in headers.items())
    signed += f"/{ACCOUNT}{urlsplit(url).path}\nrestype:container"
    signature = base64.b64encode(
        hmac.digest(base64.b64decode(KEY), signed.encode(), "sha256")
    ).decode()
    headers |= {"Authorization": f"SharedKey {ACCOUNT}:{signature}", "Content-Type": ""}
    request = Request(f"{url}?restype=container", method="PUT", data=b"", headers=headers)
    deadline = time.monotonic() + 30
    while True:
        try:
            urlopen(request, timeout=10).close()
            return
        except URLError as error:
            if isinstance(error, HTTPError) or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextmanager
def environment(**values: str):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module", params=[s3, azure], ids=["s3", "azure"])
def bucket(request):
    with request.param() as url:
        yield url


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
    for ours, theirs in zip(
        here.batches([RESIDUAL], **choices), there.batches([RESIDUAL], **choices), strict=True
    ):
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


def test_what_is_created_once_is_not_created_again(bucket):
    first, second = ObjectPlace(f"{bucket}/once"), ObjectPlace(f"{bucket}/once")
    assert first.create("records/000000.json", b"the first writer's")
    assert not second.create("records/000000.json", b"the second writer's")
    assert second.read("records/000000.json") == b"the first writer's"


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
        ActivationStore.open(f"{urlsplit(bucket).scheme}://no-such-bucket/store")


def test_an_interrupted_store_is_taken_up_where_it_stopped(bucket):
    rows = planted_rows()
    layout, tokens = planted_layout(rows), planted_tokens(5000)
    url = f"{bucket}/resumed"
    writer = StoreWriter.create(url, layout)
    with writer.open_shard(0, tokens.part(0, 2048)) as writing:
        writing.append({name: each[:2048] for name, each in rows.items()})
        writing.commit()
    with pytest.raises(UserError, match="not finished"):
        ActivationStore.open(url)
    resumed = StoreWriter.create(url, layout)
    assert 0 not in resumed.missing_shards()
    fill_shards(resumed, rows, tokens)
    resumed.finish(planted_documents(5000))
    assert verify_store(url, full=True, context=RunContext()).is_sound
    assert (
        ActivationStore.open(url).read(MLP, 0, 5000)
        == make_store(f"{bucket}/whole", rows).read(MLP, 0, 5000)
    ).all()


GENERATION = "x-goog-generation"


class GoogleAnswers(BaseHTTPRequestHandler):
    """Answers each PUT with a new generation, as Google's documentation of the XML API says; keeps
    what was asked."""

    asked: list[str | None]

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.asked.append(self.headers.get("x-goog-if-generation-match"))
        self.send_response(200)
        self.send_header("ETag", '"the same for the same bytes"')
        self.send_header(GENERATION, str(100 + len(self.asked)))
        self.send_header("content-length", "0")
        self.end_headers()

    def do_DELETE(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


def test_a_claim_on_gcs_is_renewed_by_the_generation_it_has_seen(tmp_path, monkeypatch):
    """No emulator of GCS that can be installed here speaks the API that obstore uses
    (docs/store.md), so only what a claim sends is looked at: 0, "not there yet", and then the
    generation of each answer before."""
    handler = type("Handler", (GoogleAnswers,), {"asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    account = tmp_path / "account.json"
    facts = {"gcs_base_url": f"http://127.0.0.1:{server.server_port}", "disable_oauth": True}
    account.write_text(
        json.dumps(facts | {"client_email": "", "private_key": "", "private_key_id": ""})
    )
    monkeypatch.setattr("data.store.objects._RENEW_SECONDS", 0.02)
    with environment(GOOGLE_SERVICE_ACCOUNT=str(account), GOOGLE_ALLOW_HTTP="true"):
        place = ObjectPlace("gs://activations/store")
        with place.claimed("locks/000000") as held:
            deadline = time.monotonic() + 10
            while len(handler.asked) < 3 and time.monotonic() < deadline:
                time.sleep(0.01)
            assert held
            assert not place._lost
    server.shutdown()
    assert handler.asked[:3] == ["0", "101", "102"]
