"""Files that are whole or not there: written beside, flushed, renamed; folders put in place by a
rename; digests of files."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from featureflow.errors import Problem

_LFS = b"version https://git-lfs.github.com/spec/"


@contextmanager
def written_atomically(path: Path) -> Iterator[Path]:
    """Yield a place beside `path` to write to; it becomes `path` at the end, on disk. A reader sees
    the old file or the new one, never a half; after an exception nothing is left."""
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        with beside.open("rb") as stream:
            os.fsync(stream.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text as a whole."""
    with written_atomically(path) as beside:
        beside.write_text(text, encoding="utf-8")


def digest_of_file(path: Path) -> str:
    """The sha256 of a file's bytes, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is the few lines that git leaves where git-lfs was not installed."""
    with path.open("rb") as stream:
        return stream.read(len(_LFS)) == _LFS


def lfs_problem(path: Path) -> Problem:
    """What to say about such a file."""
    return Problem(
        what="a git-lfs pointer, not the file itself",
        where=str(path),
        expected="the file, as `git lfs pull` in its repository brings it",
    )


def replace_folder(new: Path, place: Path) -> None:
    """Put folder `new` at `place`. The old folder is moved aside first and removed last."""
    old = place.with_name(place.name + ".old")
    remove_folder(old)
    if place.exists() or place.is_symlink():
        place.rename(old)
    new.rename(place)
    remove_folder(old)


def recover_interrupted_replace(place: Path) -> None:
    """A kill between the two renames of `replace_folder` leaves only `<place>.old`: put it back."""
    old = place.with_name(place.name + ".old")
    if old.exists() and not place.exists():
        old.rename(place)


def remove_folder(folder: Path) -> None:
    """Remove a folder with all in it, or nothing; of a link to one (a stage shared with another
    run) the link alone."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)
