"""Where a store lies: a local folder or an object store, behind the few operations that the store
needs.

A place reads a byte range into a buffer, lists sizes, and publishes a finished file under its name
at once: locally by rename of a file that is already flushed to disk, on an object store by one PUT
(which is atomic). Every file is built locally first, so memory stays bounded and both places hold
the same bytes.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from featureflow.errors import UserError

_COUNTER = itertools.count()
_OPEN_FILES = 256
_IOVECTORS = 512
POINTER = "featureflow_store"


class Place(Protocol):
    """Names are relative, with `/`. `url` names the place for people and for opening it again in
    another process."""

    url: str

    def read(self, name: str) -> bytes: ...
    def read_into(self, name: str, offset: int, buffers: list[memoryview]) -> int: ...
    def sizes(self, prefix: str = "") -> dict[str, int]: ...
    def size(self, name: str) -> int | None: ...
    def temporary(self, name: str) -> Path: ...
    def publish(self, temporary: Path, name: str) -> None: ...
    def create(self, name: str, content: bytes) -> bool: ...
    def remove(self, name: str) -> None: ...
    def sweep(self, names: list[str]) -> None: ...
    def sweep_all(self) -> None: ...
    def claimed(self, name: str) -> AbstractContextManager[bool]: ...


def open_place(url: str | Path) -> Place:
    """A place by path or URL (`s3://bucket/folder`, `gs://…`). Credentials come from the
    environment only.

    A file, made by `write_pointer`, stands for the place whose URL it holds."""
    text = str(url).removeprefix("file://")
    if "://" not in text:
        path = Path(text)
        return open_place(_read_pointer(path)) if path.is_file() else LocalPlace(path)
    from data.store.objects import ObjectPlace

    return ObjectPlace(text)


def write_pointer(path: Path, url: str) -> None:
    """Let `path` stand for a store elsewhere."""
    path.write_text(json.dumps({POINTER: url}) + "\n", encoding="utf-8")


def _read_pointer(path: Path) -> str:
    try:
        url = json.loads(path.read_text(encoding="utf-8"))[POINTER]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            "this file is no activation store", where=str(path), expected="a folder or a URL"
        ) from error
    if not isinstance(url, str) or "://" not in url:
        raise UserError(
            "this file points nowhere", where=str(path), found=str(url), expected="a URL"
        )
    return url


@contextmanager
def explained_writes(url: str) -> Iterator[None]:
    """A full disk, a read-only folder or a quota as UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            "cannot write here",
            where=error.filename or url,
            found=error.strerror or str(error),
            fix="free space, or choose another folder or its permissions; what is finished is kept",
        ) from error


def write_bytes(place: Place, name: str, content: bytes) -> None:
    """Publish a small file: built beside, flushed, then visible at once."""
    temporary = place.temporary(name)
    with temporary.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    place.publish(temporary, name)


class LocalPlace:
    """A folder. Descriptors of files that are read stay open, the least recently used are
    closed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.url = str(root)
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._descriptors)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def read_into(self, name: str, offset: int, buffers: list[memoryview]) -> int:
        """Fill the buffers, in order, from `offset` on; returns how many bytes there were."""
        with self._descriptor(name) as descriptor:
            total = 0
            while buffers:
                n = os.preadv(descriptor, buffers[:_IOVECTORS], offset + total)
                if n == 0:
                    break
                total += n
                buffers = _drop(buffers, n)
        return total

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Name and size of every file below `prefix`."""
        found = {}
        top = self.root / prefix
        stack = [(os.fspath(top), prefix.strip("/"))] if top.is_dir() else []
        while stack:
            folder, at = stack.pop()
            with os.scandir(folder) as entries:
                for entry in entries:
                    name = f"{at}/{entry.name}" if at else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        stack.append((entry.path, name))
                    else:
                        found[name] = entry.stat().st_size
        return found

    def size(self, name: str) -> int | None:
        try:
            return (self.root / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def temporary(self, name: str) -> Path:
        """A new name beside `name`, so that publishing is a rename on one file system."""
        path = self.root / f"{name}.{os.getpid()}-{next(_COUNTER)}.partial"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def publish(self, temporary: Path, name: str) -> None:
        target = self.root / name
        temporary.replace(target)
        with self._lock:
            stale = self._descriptors.pop(name, None)
        if stale is not None:
            os.close(stale)

    def create(self, name: str, content: bytes) -> bool:
        """Publish a file that must not be there yet; False if it is. Atomic between processes."""
        temporary = self.temporary(name)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        try:
            os.link(temporary, self.root / name)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder((self.root / name).parent)
        return True

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    def sweep(self, names: list[str]) -> None:
        """Remove what killed writers left beside these names."""
        for name in names:
            target = self.root / name
            if target.parent.is_dir():
                for leftover in target.parent.glob(f"{target.name}.*.partial"):
                    leftover.unlink(missing_ok=True)

    def sweep_all(self) -> None:
        """Remove what killed writers left anywhere."""
        for leftover in self.root.rglob("*.partial"):
            leftover.unlink(missing_ok=True)

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Hold an exclusive claim; yields False if another living process holds it. The system
        frees it on death."""
        import fcntl

        path = self.root / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(descriptor)

    def close(self) -> None:
        with self._lock:
            _close_all(self._descriptors)

    @contextmanager
    def _descriptor(self, name: str) -> Iterator[int]:
        with self._lock:
            descriptor = self._descriptors.pop(name, None)
        if descriptor is None:
            descriptor = os.open(self.root / name, os.O_RDONLY)
        try:
            yield descriptor
        finally:
            self._keep(name, descriptor)

    def _keep(self, name: str, descriptor: int) -> None:
        surplus = []
        with self._lock:
            if name in self._descriptors:
                surplus.append(descriptor)
            else:
                self._descriptors[name] = descriptor
            while len(self._descriptors) > _OPEN_FILES:
                surplus.append(self._descriptors.popitem(last=False)[1])
        for each in surplus:
            os.close(each)


def _close_all(descriptors: OrderedDict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


def _drop(buffers: list[memoryview], n: int) -> list[memoryview]:
    remaining = list(buffers)
    while remaining and n >= len(remaining[0]):
        n -= len(remaining.pop(0))
    if remaining and n:
        remaining[0] = remaining[0][n:]
    return remaining


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
