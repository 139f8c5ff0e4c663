"""Models and dictionaries are fetched from the Hub by its own client, which talks here to a server
on this machine that answers as the Hub does; afterwards they are found without it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from data.model.language_model import LanguageModel
from data.model.spec import Random

COMMIT = "4" * 40
SCOPE = "google/gemma-scope-2b-pt-res"
MODEL = "someone/a-model"
FILES = tuple(
    f"layer_{layer}/width_16k/average_l0_{l0}/params.npz" for layer in (3, 4) for l0 in (22, 71)
)


class Hub(BaseHTTPRequestHandler):
    """What `huggingface_hub` asks for: a repository's commit and files, and a file."""

    def __init__(self, root: Path, asked: list[str], *args: object) -> None:
        self._root, self._asked = root, asked
        super().__init__(*args)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self._asked.append(f"{self.command} {path}")
        if path.startswith("api/models/"):
            owner, name, kind = path.removeprefix("api/models/").split("/")[:3]
            repository = self._root / owner / name
            files = [p for p in sorted(repository.rglob("*")) if p.is_file()]
            names = [file.relative_to(repository).as_posix() for file in files]
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40}
                for name, file in zip(names, files, strict=True)
            ]
            about = {"id": f"{owner}/{name}", "sha": COMMIT, "private": False, "gated": False}
            about |= {"siblings": [{"rfilename": each} for each in names]}
            self._send(json.dumps(tree if kind == "tree" else about).encode(), {})
            return
        repository_name, _, rest = path.partition("/resolve/")
        file = self._root / repository_name / rest.partition("/")[2]
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(content, {"ETag": etag, "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET

    def _send(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    for name in FILES:
        file = tmp_path / "hub" / SCOPE / name
        file.parent.mkdir(parents=True)
        file.write_text(name)
    model = LanguageModel.open(Random(n_layers=1, d_model=16, n_heads=2), dtype="float32")
    folder = tmp_path / "hub" / MODEL
    model.hf.save_pretrained(folder)
    model.tokenizer.save(folder)
    (folder / "pytorch_model.bin").write_bytes(b"never asked for")
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, tmp_path / "hub", asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def run(code: str, cache: Path, endpoint: str, *, offline: bool) -> str:
    """In a process of its own: the client reads where the Hub is when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "HF_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_OFFLINE": str(int(offline)),
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


RELEASE = f"""
from featureflow.sites import Site
from pipeline.training.imported import Imported, find_imported
choice = Imported(release={SCOPE!r}, l0=80)
print(*find_imported(choice, [Site(3, "resid_post")]).values())
"""
OPENED = f"""
from data.model.language_model import HuggingFace, LanguageModel
from data.model.sources import commit_of_model
model = LanguageModel.open(HuggingFace(name={MODEL!r}), dtype="float32")
print(model.fingerprint, commit_of_model({MODEL!r}, "main"))
"""


def test_the_chosen_dictionary_alone_is_downloaded_and_found_again_offline(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, asked = hub
    found = Path(run(RELEASE, tmp_path / "cache", endpoint, offline=False))
    assert found.read_text() == FILES[1]
    assert COMMIT in found.parts
    fetched = {each.partition("/resolve/")[2][41:] for each in asked if each.startswith("GET ")}
    assert fetched - {""} == {FILES[1]}
    n_asked = len(asked)
    assert Path(run(RELEASE, tmp_path / "cache", endpoint, offline=True)) == found
    assert len(asked) == n_asked
    nearer = run(RELEASE.replace("80", "20"), tmp_path / "cache", endpoint, offline=False)
    assert Path(nearer).read_text() == FILES[0], "what is in the cache is not all there is"


def test_a_model_is_fetched_without_its_pickles_and_is_the_same(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, asked = hub
    expected = LanguageModel.open(Random(n_layers=1, d_model=16, n_heads=2), dtype="float32")
    found = run(OPENED, tmp_path / "cache", endpoint, offline=False)
    assert found.split() == [expected.fingerprint, COMMIT]
    assert not any("pytorch_model.bin" in each for each in asked if "/resolve/" in each)
    assert run(OPENED, tmp_path / "cache", endpoint, offline=True) == found
