"""A store on S3, GCS or Azure, through obstore.

A PUT is atomic, so a file is there whole or not at all; files are built locally and uploaded in
parts. Records are put with "only if it is not there yet". A writer claims a shard by an object that
it renews every minute; one not renewed for five minutes belongs to a dead writer and is taken over,
by a PUT that demands the version that was seen. Credentials and endpoints come from the environment
(`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_…`, `AZURE_…`).

Local files that are built before they are uploaded.
"""

from __future__ import annotations

import os
import tempfile
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import from_url

from featureflow.errors import UserError

_RENEW_SECONDS = 60.0
_STALE_SECONDS = 300.0


class ObjectPlace:
    """A prefix of a bucket."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._lost: set[str] = set()
        with self._explained():
            self._store: Any = from_url(self.url)

    def read(self, name: str) -> bytes:
        with self._explained():
            return bytes(self._store.get(name).bytes())

    def read_into(self, name: str, offset: int, buffers: list[memoryview]) -> int:
        """Fill the buffers from one ranged GET; fewer bytes than asked for mean that the object
        ends there."""
        wanted = sum(len(buffer) for buffer in buffers)
        with self._explained():
            content = memoryview(self._store.get_range(name, start=offset, length=wanted))
        taken = 0
        for buffer in buffers:
            part = content[taken : taken + len(buffer)]
            buffer[: len(part)] = part
            taken += len(part)
        return taken

    def sizes(self, prefix: str = "") -> dict[str, int]:
        with self._explained():
            return {
                entry["path"]: int(entry["size"])
                for page in self._store.list(prefix or None)
                for entry in page
            }

    def size(self, name: str) -> int | None:
        try:
            with self._explained():
                return int(self._store.head(name)["size"])
        except FileNotFoundError:
            return None

    def temporary(self, name: str) -> Path:
        return staging_file(name)

    def publish(self, temporary: Path, name: str) -> None:
        self._refuse_lost_claims()
        try:
            with self._explained():
                self._store.put(name, temporary)
        finally:
            temporary.unlink(missing_ok=True)

    def create(self, name: str, content: bytes) -> bool:
        self._refuse_lost_claims()
        try:
            with self._explained():
                self._store.put(name, content, mode="create")
        except AlreadyExistsError:
            return False
        return True

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError), self._explained():
            self._store.delete(name)

    def sweep(self, names: list[str]) -> None:
        """Nothing to do: an upload that was cut off leaves no object."""

    def sweep_all(self) -> None:
        """Nothing to do, as above."""

    @contextmanager
    def claimed(self, name: str) -> Iterator[bool]:
        """Hold a claim; yields False if a living writer holds it."""
        claim, me = f"{name}.lock", f"{os.getpid()}-{uuid.uuid4()}".encode()
        version = self._take(claim, me)
        if version is None:
            yield False
            return
        done = threading.Event()
        keeper = threading.Thread(target=self._renew, args=(claim, me, version, done), daemon=True)
        keeper.start()
        try:
            yield True
        finally:
            done.set()
            keeper.join()
            if claim not in self._lost:
                self.remove(claim)
            self._lost.discard(claim)

    def _take(self, claim: str, me: bytes) -> dict[str, str] | None:
        """The version of our claim, None if another's is alive."""
        try:
            with self._explained():
                return _version_of(self._store.put(claim, me, mode="create"))
        except AlreadyExistsError:
            pass
        try:
            with self._explained():
                found = self._store.head(claim)
                if (datetime.now(UTC) - found["last_modified"]).total_seconds() < _STALE_SECONDS:
                    return None
                return _version_of(self._store.put(claim, me, mode=_version_of(found)))
        except (PreconditionError, FileNotFoundError):
            return None

    def _renew(self, claim: str, me: bytes, version: dict[str, str], done: threading.Event) -> None:
        while not done.wait(_RENEW_SECONDS):
            try:
                version = _version_of(self._store.put(claim, me, mode=version))
            except (PreconditionError, FileNotFoundError):
                self._lost.add(claim)
                return
            except Exception:  # a network that fails for a moment: the next renewal tells
                continue

    def _refuse_lost_claims(self) -> None:
        if self._lost:
            raise UserError(
                "another writer took over the shard while this one was not heard of",
                where=f"{self.url}/{min(self._lost)}",
                fix="let the other writer finish, or stop it and run again",
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Errors of the network and of credentials as UserError; those with a meaning here pass."""
        try:
            yield
        except (FileNotFoundError, AlreadyExistsError, PreconditionError):
            raise
        except (BaseError, OSError, ValueError) as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                "the object store does not answer as it should",
                where=self.url,
                found=first,
                fix="check the bucket's name and the credentials and endpoint in the environment",
            ) from error


def _version_of(answer: Mapping[str, Any]) -> dict[str, str]:
    """What a conditional PUT has to name, out of the answer to a PUT or HEAD: S3 and Azure compare
    the entity tag, GCS the generation, without which obstore refuses the PUT."""
    return {key: answer[key] for key in ("e_tag", "version") if answer.get(key) is not None}


def staging_file(name: str) -> Path:
    """A new temporary file for a place that is not a folder."""
    descriptor, path = tempfile.mkstemp(prefix="featureflow-", suffix="-" + name.rpartition("/")[2])
    os.close(descriptor)
    return Path(path)
