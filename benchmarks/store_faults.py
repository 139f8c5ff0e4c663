"""What happens to an activation store when things go wrong: every fault really made, its outcome seen, a table printed.

    python benchmarks/store_faults.py [--kills 100] [--small] [--markdown FILE]

Collection runs a small model with random weights in a child process that is killed with SIGKILL at random moments.
After every kill each recorded shard is checked byte by byte; after every completed run the store is compared with one
that was never disturbed. Then files are removed, cut, emptied, flipped and swapped; the disk is filled (a small tmpfs,
or a limit on file size without the right to mount); the folder is made read-only; two writers start at once. The output
is JSON lines, one a fault.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from data.corpus import BundledText
from data.language_model import LanguageModel
from data.model_spec import Random
from data.packing import pack_corpus
from data.store import ActivationStore, SiteLayout, StoreLayout, StoreWriter
from data.store.checks import problems_of_shard, verify_store
from data.store.collection import collect_shards
from data.store.places import LocalPlace
from data.store.records import read_record
from pipeline.run import RunContext
from sae.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Collection:
    """One collection that can be run again and again into different folders."""

    model: LanguageModel
    layout: StoreLayout
    parts: list
    documents: tuple

    def run(self, url: Path) -> None:
        writer = StoreWriter.create(url, self.layout)
        parts = [self.parts[shard] for shard in writer.missing_shards()]
        sites = self.model.sites()
        collect_shards(self.model, writer, parts, sites, batch_rows=256, rows_done=lambda n: None)
        writer.finish(self.documents)


def make_collection(*, n_tokens: int) -> Collection:
    model = LanguageModel.open(Random(n_layers=2, d_model=32, n_heads=2, d_mlp=32))
    packed = pack_corpus(
        BundledText(), model.tokenizer, n_context=32, n_tokens=n_tokens, seed=0, validation_fraction=0.2
    )
    layout = StoreLayout(
        sites=tuple(SiteLayout(name=site.name, width=model.d_model) for site in model.sites()),
        dtype="bfloat16",
        n_rows=packed.n_rows,
        n_context=32,
        shard_rows=1024,
        chunk_rows=128,
        validation_start=packed.validation_start,
    )
    table = packed.table()
    parts = [(shard, table.part(*layout.rows_of_shard(shard))) for shard in range(layout.n_shards)]
    return Collection(model=model, layout=layout, parts=parts, documents=table.documents)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, default=None, help="also write the table of outcomes here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    collection = make_collection(n_tokens=6000 if options.small else 20_000)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = list(iter_outcomes(collection, Path(folder), n_kills=options.kills, seed=options.seed))
    if options.markdown is not None:
        options.markdown.write_text(as_markdown(outcomes), encoding="utf-8")
    return 0 if all(outcome["as_wanted"] for outcome in outcomes) else 1


def iter_outcomes(collection: Collection, folder: Path, *, n_kills: int, seed: int) -> Iterator[dict]:
    reference = folder / "undisturbed.zarr"
    seconds = timed_in_child(collection, reference)
    for outcome in (
        kills(collection, reference, folder / "killed", n_kills=n_kills, seconds=seconds, seed=seed),
        *corruptions(reference, folder / "corrupt"),
        full_disk(collection, reference, folder / "full"),
        read_only(collection, folder / "read-only"),
        two_writers(collection, reference, folder / "two.zarr"),
    ):
        print(json.dumps(outcome), flush=True)
        yield outcome


def kills(collection: Collection, reference: Path, folder: Path, *, n_kills: int, seconds: float, seed: int) -> dict:
    """SIGKILL at random moments; every run is taken up again until it completes."""
    generator = random.Random(seed)
    wanted, n_done, n_torn, n_different, n_completed = bytes_of(reference), 0, 0, 0, 0
    url = folder / "store.zarr"
    while n_done < n_kills:
        child = start(collection, url)
        time.sleep(generator.uniform(0, 0.7 * seconds))
        if os.waitpid(child, os.WNOHANG)[0] == 0:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            n_done += 1
        n_torn += count_torn(collection.layout, url)
        if is_complete(url) or n_done >= n_kills:
            collection_in_child(collection, url)
            n_different += bytes_of(url) != wanted
            n_completed += 1
            shutil.rmtree(url)
    found = f"{n_torn} torn shards visible; {n_completed} runs completed, {n_different} with other bytes"
    return {
        "fault": f"kill -9 at {n_kills} random moments of collection",
        "outcome": found,
        "as_wanted": n_torn == 0 and n_different == 0,
    }


def count_torn(layout: StoreLayout, url: Path) -> int:
    """Recorded shards whose bytes are not as recorded."""
    place = LocalPlace(url)
    records = [read_record(place, shard) for shard in range(layout.n_shards)]
    return sum(
        any(place.size(name) != each.size for name, each in record.files.items())
        or bool(problems_of_shard(str(url), layout, record))
        for record in records
        if record is not None
    )


def corruptions(reference: Path, folder: Path) -> list[dict]:
    """Damage one file of a finished store; it must be refused, by size when opened, by checksum when read in full."""
    name = "sites/blocks.0.hook_resid_post/rows/c/1/0"
    faults: dict[str, Callable[[Path], object]] = {
        "chunk file missing": lambda path: path.unlink(),
        "chunk file emptied": lambda path: path.write_bytes(b""),
        "chunk file cut to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "one bit flipped in a row": flip,
        "chunk file of another shard": lambda path: shutil.copy(path.parent.parent / "0" / "0", path),
        "shard record missing": lambda path: (path.parents[5] / "records" / "000001.json").unlink(),
        "shard record changed": lambda path: flip(path.parents[5] / "records" / "000001.json"),
        "completion record missing": lambda path: (path.parents[5] / "records" / "complete.json").unlink(),
        "an older schema": lambda path: replace_text(path.parents[5] / "zarr.json", '"schema": 1', '"schema": 0'),
    }
    outcomes = []
    for fault, damage in faults.items():
        shutil.copytree(reference, folder)
        damage(folder / name)
        outcomes.append({"fault": fault, **refusal(folder)})
        shutil.rmtree(folder)
    return outcomes


def refusal(folder: Path) -> dict:
    """How the damage is seen: when the store is opened, or at the latest when the bytes are read."""
    try:
        store = ActivationStore.open(folder)
    except UserError as error:
        return {"outcome": f"refused when opened: {error.problems[0].what}", "as_wanted": error.mend is not None}
    try:
        store.read("blocks.0.hook_resid_post", 0, store.n_rows)
        seen = "not seen when read"
    except UserError as error:
        seen = f"refused when read: {error.problems[0].what}"
    problems = verify_store(folder, full=True, context=RunContext()).problems
    return {"outcome": f"{seen}; full verification: {len(problems)} problem(s)", "as_wanted": bool(problems)}


def full_disk(collection: Collection, reference: Path, folder: Path) -> dict:
    """Fill the disk in the middle of collection, then make room and go on."""
    folder.mkdir()
    size = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    with small_disk(folder, size // 2) as (kind, grow):
        failed = message_in_child(collection, folder / "store.zarr", limit=None if kind == "tmpfs" else 20_000)
        torn = count_torn(collection.layout, folder / "store.zarr")
        grow()
        collection_in_child(collection, folder / "store.zarr")
        same = bytes_of(folder / "store.zarr") == bytes_of(reference)
    return {
        "fault": f"disk full ({kind})",
        "outcome": f"stops: {failed}; {torn} torn shards; with room again {'the same' if same else 'OTHER'} bytes",
        "as_wanted": same and torn == 0 and "cannot write" in failed,
    }


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """A tmpfs of `size` bytes, and how to make it larger; without the right to mount, a limit on the size of a file."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        yield "limit on file size", lambda: None
        return
    try:
        yield "tmpfs", lambda: subprocess.run(["mount", "-o", f"remount,size={8 * size}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def read_only(collection: Collection, folder: Path) -> dict:
    """A folder that may not be written: without rights, or for the superuser a file where a folder should be."""
    folder.mkdir()
    if os.geteuid() == 0:
        (folder / "store.zarr").mkdir()
        (folder / "store.zarr" / "sites").write_text("in the way")
    else:
        folder.chmod(0o500)
    failed = message_in_child(collection, folder / "store.zarr")
    folder.chmod(0o700)
    return {
        "fault": "the folder cannot be written",
        "outcome": f"stops: {failed}",
        "as_wanted": "cannot write" in failed,
    }


def two_writers(collection: Collection, reference: Path, url: Path) -> dict:
    """Two processes collect into one store at the same time."""
    children = [start(collection, url) for _ in range(2)]
    for child in children:
        os.waitpid(child, 0)
    torn = count_torn(collection.layout, url)
    collection_in_child(collection, url)
    same = bytes_of(url) == bytes_of(reference)
    return {
        "fault": "two writers at once",
        "outcome": f"{torn} torn shards; the store ends with {'the same' if same else 'OTHER'} bytes",
        "as_wanted": same and torn == 0,
    }


def start(collection: Collection, url: Path, *, message: int | None = None, limit: int | None = None) -> int:
    """Collect in a forked child; its UserError, if any, is written to the descriptor `message`."""
    child = os.fork()
    if child:
        return child
    status = 0
    try:
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        collection.run(url)
    except UserError as error:
        status = 1
        if message is not None:
            os.write(message, f"{error.problems[0].what} ({error.problems[0].found})".encode())
    finally:
        os._exit(status)


def message_in_child(collection: Collection, url: Path, *, limit: int | None = None) -> str:
    reading, writing = os.pipe()
    child = start(collection, url, message=writing, limit=limit)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as stream:
        return stream.read().decode()


def collection_in_child(collection: Collection, url: Path) -> None:
    _, status = os.waitpid(start(collection, url), 0)
    if status:
        sys.exit(f"an undisturbed collection into {url} failed")


def timed_in_child(collection: Collection, url: Path) -> float:
    started = time.monotonic()
    collection_in_child(collection, url)
    return time.monotonic() - started


def is_complete(url: Path) -> bool:
    return (url / "records" / "complete.json").is_file()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def replace_text(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


def as_markdown(outcomes: list[dict]) -> str:
    rows = [f"| {each['fault']} | {each['outcome']} | {'yes' if each['as_wanted'] else 'NO'} |" for each in outcomes]
    return "\n".join(["| fault | outcome | as wanted |", "|---|---|---|", *rows, ""])


if __name__ == "__main__":
    sys.exit(main())
