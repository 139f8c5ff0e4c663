"""A folder for things made once and kept: converted models, checksums. `$FEATUREFLOW_CACHE`, or
`~/.cache/featureflow`.

`make_once` builds a folder beside its place and renames it there, so that a folder that exists is
complete and two processes that build the same one do no harm: the first rename wins and the other's
work is thrown away.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants

from featureflow.errors import UserError
from featureflow.files import digest_of_file, write_text_atomically

_SMALL = 1 << 20  # hashed faster than looked up


def cache_folder() -> Path:
    """Where converted models are kept; not created here. Raises UserError without a home."""
    place = os.path.expanduser(os.environ.get("FEATUREFLOW_CACHE") or "~/.cache/featureflow")
    if place.startswith("~"):
        raise UserError(
            "there is no home folder to keep models in",
            where=place,
            fix="set FEATUREFLOW_CACHE to a folder of yours",
        )
    return Path(place)


def make_once(place: Path, build: Callable[[Path], None]) -> Path:
    """`place`, built by `build(folder)` if it is not there. A failed build leaves nothing
    behind."""
    if place.is_dir():
        return place
    beside = place.with_name(f"{place.name}.{uuid.uuid4().hex}.partial")
    try:
        beside.mkdir(parents=True)
        build(beside)
        _rename_unless_there(beside, place)
    except OSError as error:
        raise UserError(
            "cannot write the cache",
            where=str(place),
            found=str(error),
            fix="free disk space, or set FEATUREFLOW_CACHE to a folder that can be written",
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return place


def sha256_of(path: Path) -> str:
    """The checksum of a whole file. It is remembered by place, size and times of change, so asking
    again costs nothing; a cache that cannot be written costs time, not the run."""
    stat = path.stat()
    seen = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
    memo = cache_folder() / "checksums" / f"{hashlib.sha256(seen.encode()).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(memo.read_text())["sha256"])
    found = digest_of_file(path)
    with suppress(OSError):
        memo.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(memo, json.dumps({"sha256": found}))
    return found


def readable_digest(path: Path) -> str:
    """sha256 of a file, remembered for large ones. Raises UserError if it cannot be read."""
    try:
        if path.stat().st_size > _SMALL:
            return sha256_of(path)
        return digest_of_file(path)
    except OSError as error:
        raise UserError(
            "the file cannot be read", where=str(path), found=error.strerror or str(error)
        ) from error


def _rename_unless_there(beside: Path, place: Path) -> None:
    try:
        beside.rename(place)
    except OSError:
        if not place.is_dir():
            raise


def hub_snapshot(name: str, revision: str) -> Path | None:
    """What lies of a model's repository in the Hub's cache, whole or not; None for nothing. The
    Hub's own client takes a repository of which some files were asked for to be incomplete."""
    place = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    reference = place / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    folder = place / "snapshots" / commit
    return folder if folder.is_dir() else None
