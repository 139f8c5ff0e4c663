"""Collection and verification on real Dask workers: the same bytes as here, also when workers
die."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import dask
import numpy as np
import pytest
from distributed import Client, LocalCluster

from data.model.language_model import LanguageModel
from data.model.spec import Random
from data.store import ActivationStore, SiteLayout, StoreLayout, StoreWriter
from data.store.checks import verify_store
from data.store.cluster import map_shards
from data.store.collection import (
    ModelChoice,
    ShardTask,
    collect_on_cluster,
    collect_shards,
    collect_task,
)
from data.text.corpus import BundledText
from data.text.packing import pack_corpus
from featureflow.errors import UserError
from pipeline.context import RunContext
from tests.data.store.cluster_tasks import always_die, complain, write_or_die
from tests.data.store.made import make_store, planted_documents, planted_layout, planted_rows

pytestmark = pytest.mark.slow
SPEC = Random(n_layers=2, d_model=16, n_heads=2, d_mlp=32)


@dataclass(frozen=True)
class Made:
    model: LanguageModel
    layout: StoreLayout
    parts: list
    documents: tuple
    choice: ModelChoice


@pytest.fixture(scope="module")
def made():
    model = LanguageModel.open(SPEC)
    packed = pack_corpus(
        BundledText(), model.tokenizer, n_context=32, n_tokens=6000, seed=0, validation_fraction=0.2
    )
    layout = StoreLayout(
        sites=tuple(SiteLayout(name=site.name, width=16) for site in model.sites()),
        dtype="bfloat16",
        n_rows=packed.n_rows,
        n_context=32,
        shard_rows=1024,
        chunk_rows=128,
        validation_start=packed.validation_start,
    )
    table = packed.table()
    parts = [(shard, table.part(*layout.rows_of_shard(shard))) for shard in range(layout.n_shards)]
    choice = ModelChoice(spec=SPEC, dtype="bfloat16", device="cpu", fingerprint=model.fingerprint)
    return Made(model=model, layout=layout, parts=parts, documents=table.documents, choice=choice)


@pytest.fixture(scope="module")
def here(made, tmp_path_factory):
    url = tmp_path_factory.mktemp("here") / "store.zarr"
    writer = StoreWriter.create(url, made.layout)
    collect_shards(
        made.model, writer, made.parts, made.model.sites(), batch_rows=256, rows_done=lambda n: None
    )
    writer.finish(made.documents)
    return url


@pytest.fixture(scope="module", autouse=True)
def importable_tests():
    """Workers are new processes that get this one's search path: it must lead to this package of
    tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[3]))
        yield


@pytest.fixture(scope="module")
def machines(importable_tests):
    with LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
    ) as cluster:
        yield RunContext(scheduler=cluster.scheduler_address)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def collect(made, url, machines):
    writer = StoreWriter.create(url, made.layout)
    parts = [made.parts[shard] for shard in writer.missing_shards()]
    done = collect_on_cluster(
        writer,
        parts,
        model=made.choice,
        sites=made.model.sites(),
        batch_rows=256,
        machines=machines,
    )
    shards = [each.shard for each in done]
    writer.finish(made.documents)
    return shards


def test_workers_write_the_same_bytes_as_one_process(made, here, machines, tmp_path):
    shards = collect(made, tmp_path / "store.zarr", machines)
    assert sorted(shards) == list(range(made.layout.n_shards))
    assert bytes_of(tmp_path / "store.zarr") == bytes_of(here)


def test_a_worker_with_several_threads_collects_one_shard_at_a_time(made, here, tmp_path):
    """The threads of one worker share its model, whose hooks see whatever forward pass is
    running."""
    writer = StoreWriter.create(tmp_path / "store.zarr", made.layout)
    common = {
        "model": made.choice,
        "sites": made.model.sites(),
        "batch_rows": 64,
        "n_threads": None,
    }
    tasks = [
        ShardTask(
            url=writer.place.url, shard=shard, tokens=tokens, allow_non_finite=False, **common
        )
        for shard, tokens in made.parts
    ]
    with ThreadPoolExecutor(3) as threads:
        assert [each.shard for each in threads.map(collect_task, tasks)] == list(
            range(made.layout.n_shards)
        )
    writer.finish(made.documents)
    assert bytes_of(tmp_path / "store.zarr") == bytes_of(here)


def test_a_cluster_verifies_and_computes_over_a_store(here, machines):
    assert verify_store(here, full=True, context=machines).is_sound
    store = ActivationStore.open(here)
    site = store.sites[0]
    with Client(machines.scheduler):
        found = store.as_dask(site).mean(axis=0).compute()
    assert np.allclose(found, store.read(site, 0, store.n_rows).mean(axis=0), atol=1e-5)


def test_a_worker_killed_in_a_shard_changes_nothing_in_the_end(machines, tmp_path):
    make_store(tmp_path / "undisturbed.zarr", planted_rows())
    url = tmp_path / "store.zarr"
    writer = StoreWriter.create(url, planted_layout(planted_rows()))
    assert sorted(
        map_shards(write_or_die, [(str(url), shard) for shard in range(3)], machines)
    ) == [0, 1, 2]
    assert (tmp_path / "died").exists()
    writer.finish(planted_documents(5000))
    assert bytes_of(url) == bytes_of(tmp_path / "undisturbed.zarr")


def test_a_user_error_of_a_worker_arrives_whole(machines):
    with pytest.raises(UserError, match="this cannot be") as caught:
        list(map_shards(complain, [0, 1, 2], machines))
    assert caught.value.fix == "nothing"
    assert caught.value.problems[0].where == "shard 2"


def test_workers_that_die_again_and_again_end_in_a_clear_error():
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None
        ) as cluster,
        pytest.raises(UserError, match="died again and again"),
    ):
        list(map_shards(always_die, [0], RunContext(scheduler=cluster.scheduler_address)))


def test_another_model_on_a_worker_is_refused(made, machines, tmp_path):
    writer = StoreWriter.create(tmp_path / "store.zarr", made.layout)
    other = ModelChoice(spec=SPEC, dtype="bfloat16", device="cpu", fingerprint="another")
    with pytest.raises(UserError, match="another model"):
        list(
            collect_on_cluster(
                writer,
                made.parts,
                model=other,
                sites=made.model.sites(),
                batch_rows=256,
                machines=machines,
            )
        )


def test_a_scheduler_that_is_not_there_is_explained(monkeypatch):
    monkeypatch.setattr("data.store.cluster._CONNECT_SECONDS", 1)
    with pytest.raises(UserError, match="no Dask scheduler answers"):
        list(map_shards(complain, [0], RunContext(scheduler="tcp://127.0.0.1:9")))


@contextmanager
def real_cluster(folder: Path, port: int):
    """A scheduler and a worker, each a process of its own as on a cluster; yields the scheduler's
    process."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    address = f"tcp://127.0.0.1:{port}"
    scheduler_command = [
        "scheduler",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-dashboard",
        "--no-show",
    ]
    worker_command = [
        "worker",
        address,
        "--nthreads",
        "1",
        "--no-dashboard",
        "--death-timeout",
        "30",
    ]
    with ExitStack() as stack:
        processes = []
        for name, command in (("scheduler", scheduler_command), ("worker", worker_command)):
            log = stack.enter_context(
                (folder / f"{name}-{len(list(folder.iterdir()))}.log").open("wb")
            )
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *command],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            stack.callback(end_group, process)
            processes.append(process)
        with Client(address, timeout=60) as client:
            client.wait_for_workers(1, timeout=60)
        yield processes[0]


def end_group(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.mark.timeout(180)
def test_a_scheduler_that_dies_in_a_collection_ends_in_a_clear_error_and_the_next_run_resumes(
    made, here, tmp_path
):
    url, port, done = tmp_path / "store.zarr", free_port(), []
    machines = RunContext(scheduler=f"tcp://127.0.0.1:{port}")
    writer = StoreWriter.create(url, made.layout)
    with (
        real_cluster(tmp_path, port) as scheduler,
        dask.config.set({"distributed.comm.timeouts.connect": "3s"}),
        pytest.raises(UserError, match="scheduler is gone") as caught,
    ):
        for each in collect_on_cluster(
            writer,
            made.parts,
            model=made.choice,
            sites=made.model.sites(),
            batch_rows=256,
            machines=machines,
        ):
            done.append(each.shard)
            end_group(scheduler)
    assert "run again" in caught.value.fix
    assert done
    assert len(done) < made.layout.n_shards
    with pytest.raises(UserError, match="not finished"):
        ActivationStore.open(url)
    with real_cluster(tmp_path, port):
        resumed = collect(made, url, machines)
    assert not set(resumed) & set(done)
    assert bytes_of(url) == bytes_of(here)
