"""Artifacts: what a stage leaves behind, and the only way to open it.

An artifact is a folder with `manifest.json`. The manifest is written last and the whole folder
renamed into place, so

1. `Artifact.create(out, …)` works in `<out>.partial`, beside the final place; the previous artifact
   stays whole;
2. on success it writes the manifest (with size and checksum of every file) and renames; on failure
   the partial folder stays, and a later `create` with the same digest finds it and resumes, with
   another digest it is swept; while one process makes it, another that wants the same place is
   refused;
3. `Artifact.open(path, kind=…)` reads the manifest, checks kind, schema and the size of every file,
   and refuses anything else with every problem at once. "The folder exists" never means "complete".

The digest names what an artifact *should* contain: `sha256` over the canonical JSON of kind,
schema, config and the digests of its inputs. It is known before the work is done; equal digests
mean the stage has nothing to do. The code is not in it (`SCHEMA` is raised when a stage's meaning
changes), but `made_by.code` says which code wrote the artifact and `made_by.resumed_from` which
other code an earlier, killed run had (docs/decisions/0002-artifacts-and-digests.md).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from featureflow.errors import Command, Fix, Problem, UserError
from featureflow.files import (
    digest_of_file,
    recover_interrupted_replace,
    replace_folder,
    write_text_atomically,
)
from pipeline.made_by import code_digest, made_by

MANIFEST = "manifest.json"
SCHEMAS: Mapping[str, int] = {
    "collect": 2,
    "train": 1,
    "link": 3,
    "describe": 1,
    "steer": 4,
    "atlas": 2,
}
"""The schema of each stage's artifact: raised when what it means changes, so that older ones are
refused."""
MARKER = ".digest"
_KEYS = ("kind", "schema", "digest", "config", "inputs", "summary", "files", "made_by")


def canonical_json(value: object) -> str:
    """JSON with sorted keys and no spaces; models become objects, paths strings, tuples
    lists."""
    return json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def digest_of(kind: str, schema: int, config: object, inputs: Mapping[str, str]) -> str:
    """The name of an artifact before it exists: sha256, hexadecimal."""
    text = canonical_json(
        {"kind": kind, "schema": schema, "config": config, "inputs": dict(inputs)}
    )
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A finished artifact. `summary` holds its headline numbers, `inputs` the digests of what it
    was made from."""

    path: Path
    kind: str
    schema: int
    digest: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]
    summary: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    made_by: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """The path of one recorded file; a name that is not in the manifest (or leaves the folder)
        is refused."""
        if name not in self.files:
            raise UserError(
                "the artifact has no such file",
                where=f"{self.path}/{name}",
                expected=", ".join(self.files),
            )
        return self.path / name

    @classmethod
    def open(cls, path: Path, *, kind: str, schema: int, fix: Fix | None = None) -> Artifact:
        """Read and validate. `fix` is the command that would make it; it is part of every error
        raised here."""
        path = Path(path)
        fix = fix or (Command("run", to=kind) if kind in SCHEMAS else Command(kind))
        document = _read_manifest(path, fix)
        problems = tuple(_problems_of_identity(document, kind, schema))
        problems += tuple(_problems_of_files(path, document.get("files", {})))
        if problems:
            raise UserError(f"{path} is not a usable {kind} artifact", problems=problems, fix=fix)
        return cls(path=path, **{name: document[name] for name in _KEYS})

    @classmethod
    def is_current(cls, path: Path, digest: str) -> bool:
        """Whether a complete artifact with this digest lies at `path`. Never raises."""
        try:
            document = _read_manifest(Path(path), "")
            return document.get("digest") == digest and not _problems_of_files(
                Path(path), document.get("files", {})
            )
        except (UserError, AttributeError, OSError):  # no manifest, or not one that can be read
            return False

    @classmethod
    def borrow(cls, place: Path, theirs: Path, digest: str) -> bool:
        """Let `place` point to the artifact at `theirs`, of another run, if that has this digest;
        whether it does."""
        if place.resolve() == theirs.resolve() or not cls.is_current(theirs, digest):
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        link = place.with_name(f"{place.name}.link")
        link.unlink(missing_ok=True)
        target = os.path.relpath(theirs.resolve(), place.parent.resolve())
        link.symlink_to(target, target_is_directory=True)
        replace_folder(link, place)
        return True

    @classmethod
    @contextmanager
    def create(
        cls, out: Path, *, kind: str, schema: int, config: object, inputs: Mapping[str, str]
    ) -> Iterator[Draft]:
        """Make an artifact: yield a Draft to fill, then write the manifest and rename. After an
        exception nothing at `out` has changed and the partial folder waits for a resume."""
        out = Path(out)
        with _only_maker(_partial_of(out)):
            draft = Draft._begin(out, kind=kind, schema=schema, config=config, inputs=inputs)
            yield draft
            draft._finish(out)

    @classmethod
    def discard_partial(cls, out: Path) -> None:
        """Forget what an earlier, killed run left, so that the next `create` starts anew."""
        partial = _partial_of(Path(out))
        if partial.is_dir():
            with _only_maker(partial):
                _empty(partial)

    @property
    def _command(self) -> tuple[str, ...]:
        """What makes it: a stage, or a lens by its name."""
        return ("lens", self.path.name) if self.kind == "lens" else (self.kind,)

    def verify(self) -> None:
        """Recompute every checksum. Raises UserError naming each damaged file."""
        problems = []
        for name, entry in self.files.items():
            place, expected = self.path / name, entry.get("sha256")
            if expected is not None and (found := digest_of_file(place)) != expected:
                what = "checksum differs"
                problems.append(
                    Problem(what=what, where=str(place), expected=expected, found=found)
                )
        if problems:
            fix = Command(*self._command, force=True)
            raise UserError(f"{self.path} is damaged", problems=tuple(problems), fix=fix)


@dataclass(kw_only=True)
class Draft:
    """An artifact being made. Write files under `path`; what an earlier, killed run left there may
    be reused.

    Folders named in `externally_checked` (a Zarr store keeps checksums of its own) are recorded by
    size only.
    """

    path: Path
    kind: str
    schema: int
    digest: str
    config: Any
    inputs: Mapping[str, str]
    summary: dict[str, Any] = field(default_factory=dict)
    externally_checked: tuple[str, ...] = ()
    resumed_from: tuple[str, ...] = ()
    started: float = field(default_factory=time.time)

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    def write_metrics(self, record: Mapping[str, float | int | str]) -> None:
        """Append one flat record to `metrics.jsonl`."""
        with self.metrics_path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(_plain(record)) + "\n")

    @classmethod
    def _begin(
        cls, out: Path, *, kind: str, schema: int, config: object, inputs: Mapping[str, str]
    ) -> Draft:
        digest = digest_of(kind, schema, config, inputs)
        partial = _partial_of(out)
        with _explained(partial):
            earlier = _read_marker(partial)
            if earlier[:1] != [digest]:
                _empty(partial)
                earlier = [digest]
            codes = [*earlier[1:], *([] if code_digest() in earlier[1:] else [code_digest()])]
            write_text_atomically(partial / MARKER, "\n".join([digest, *codes]))
        return cls(
            path=partial,
            kind=kind,
            schema=schema,
            digest=digest,
            config=_plain(config),
            inputs=dict(inputs),
            resumed_from=tuple(code for code in codes if code != code_digest()),
        )

    def _finish(self, out: Path) -> None:
        (self.path / MANIFEST).unlink(missing_ok=True)
        document = {
            "kind": self.kind,
            "schema": self.schema,
            "digest": self.digest,
            "config": self.config,
            "inputs": self.inputs,
            "summary": _plain(self.summary),
            "files": _record_files(self.path, self.externally_checked),
            "made_by": {
                **made_by(),
                "resumed_from": list(self.resumed_from),
                "seconds": round(time.time() - self.started, 3),
            },
        }
        write_text_atomically(
            self.path / MANIFEST, json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        )
        replace_folder(self.path, out)
        (out / MARKER).unlink(missing_ok=True)  # last: a kill before the rename must find it


def _partial_of(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


@contextmanager
def _explained(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "free space or choose another --artifacts folder"
        raise UserError("cannot write here", where=str(place), found=str(error), fix=fix) from error


@contextmanager
def _only_maker(partial: Path) -> Iterator[None]:
    """Hold the partial folder, made if need be, for this process. A kill lets go of it; where
    folders cannot be locked (Windows, some network disks) nothing is held."""
    with _explained(partial):
        partial.mkdir(parents=True, exist_ok=True)
        try:
            held = os.open(partial, os.O_RDONLY)
        except PermissionError:
            held = None
    try:
        if held is not None and not _locked(held):
            fix = "wait for it, end it, or choose another --artifacts folder"
            raise UserError("another process is making this artifact", where=str(partial), fix=fix)
        yield
    finally:
        if held is not None:
            os.close(held)


def _locked(folder: int) -> bool:
    try:
        import fcntl

        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True
    return True


def _empty(folder: Path) -> None:
    """Remove what is in the folder, the folder itself stays: it is what is locked. The marker goes
    first, so that a kill half-way leaves nothing that looks like a draft to resume."""
    (folder / MARKER).unlink(missing_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _read_marker(partial: Path) -> list[str]:
    """The digest that the partial folder is for, then the code of every run that worked on it;
    empty for none."""
    marker = partial / MARKER
    return marker.read_text(encoding="utf-8").split() if marker.is_file() else []


def _read_manifest(path: Path, fix: Fix) -> dict[str, Any]:
    recover_interrupted_replace(path)
    manifest = path / MANIFEST
    if not manifest.is_file():
        what = "unfinished: it has no manifest" if path.exists() else "there is no artifact here"
        raise UserError(what, where=str(path), expected=str(manifest), fix=fix)
    try:
        document = json.loads(manifest.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            "the manifest is not JSON", where=str(manifest), found=str(error), fix=fix
        ) from error
    if not isinstance(document, dict):
        raise UserError(
            "the manifest is not an object",
            where=str(manifest),
            found=type(document).__name__,
            fix=fix,
        )
    return document


def _problems_of_identity(document: Mapping[str, Any], kind: str, schema: int) -> Iterator[Problem]:
    for name in _KEYS:
        if name not in document:
            yield Problem(what="missing key", where=f"{MANIFEST}: {name}")
    if document.get("kind", kind) != kind:
        yield Problem(what="another kind of artifact", expected=kind, found=str(document["kind"]))
    elif document.get("schema", schema) != schema:
        yield Problem(
            what="written by another version",
            expected=f"schema {schema}",
            found=f"schema {document['schema']}",
        )


def _problems_of_files(path: Path, files: Mapping[str, Any]) -> list[Problem]:
    root = path.resolve()
    problems = []
    for name, entry in files.items():
        target = (root / name).resolve()
        if not target.is_relative_to(root):
            problems.append(Problem(what="a path that leaves the artifact", where=name))
        elif not target.is_file():
            problems.append(Problem(what="file missing", where=str(path / name)))
        elif target.stat().st_size != entry.get("size"):
            problems.append(
                Problem(
                    what="size differs",
                    where=str(path / name),
                    expected=str(entry.get("size")),
                    found=str(target.stat().st_size),
                )
            )
    return problems


def _record_files(root: Path, externally_checked: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    files = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        if name in (MANIFEST, MARKER) or name.endswith(".tmp"):
            continue
        external = any(
            name == prefix or name.startswith(prefix.rstrip("/") + "/")
            for prefix in externally_checked
        )
        files[name] = {
            "size": path.stat().st_size,
            "sha256": None if external else digest_of_file(path),
        }
    return files


def _plain(value: object) -> Any:
    """Models, dataclasses, paths, mappings and sequences as JSON values; anything else that JSON
    lacks is an error. A model's field that is excluded (it changes no result) is left out."""
    if isinstance(value, BaseModel):
        fields = type(value).model_fields.items()
        return {name: _plain(getattr(value, name)) for name, f in fields if not f.exclude}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if hasattr(value, "item"):  # a NumPy or torch scalar
        return value.item()
    raise TypeError(f"{type(value).__name__} has no plain form")
