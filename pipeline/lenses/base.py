"""Lenses: an analysis is one file that turns a run into a finding.

1. A lens is a module of this folder, of a folder named by `add_folder`, or of another package
   that names it in the entry point group `featureflow.lenses`. `sae_match.py` is `sae-match`.
2. It has a docstring (question, steps, cost, source), `TITLE` (one line), `NEEDS` (stages, and
   other lenses whose finding it reads), `Config` (a LensConfig) and `look(run, config) -> Finding`,
   which reads the run and nothing else. If it wants to, also `GROUP` ("evaluation", "paper"),
   `VERSION` (raised when its finding changes its meaning) and `outside_digests(config)`.
3. `run_lens` brings its artifact `<run>/lenses/<name>` up to date: a digest over the options and
   what it needs names it, so a second call is free. A lens that it needs is run first.

Options are fields of the Config: `featureflow lens NAME --help` is made from them.
"""

from __future__ import annotations

import difflib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Annotated, Any

from annotated_types import Ge
from typing_extensions import Doc

from data.tokens import RowFilters
from featureflow.errors import Command, UserError
from featureflow.files import write_text_atomically
from featureflow.plugins import loaders
from featureflow.settings import Settings
from pipeline.artifact import SCHEMAS, Artifact, digest_of
from pipeline.findings import FOLDER, KIND, SCHEMA, open_finding, write_finding
from pipeline.run import Run

EVALUATION = ("reconstruction", "loss-recovered", "frontier")
"""What `featureflow evaluate` runs, and a recipe that names no lenses."""
_PARTS: Mapping[str, Any] = {
    "TITLE": str,
    "NEEDS": tuple,
    "Config": type,
    "look": Callable,
    "__doc__": str,
}
_KEPT = ".kept"
_added: list[Path] = []
_kept_in: ContextVar[Path | None] = ContextVar("kept_in", default=None)


class LensConfig(Settings):
    """The options of a lens: `name: Annotated[type, bounds, Doc("one line")] = default`."""


class Seeded(LensConfig):
    """Of a lens that draws something, or makes intervals."""

    seed: Annotated[int, Ge(0), Doc("of all that is drawn, and of intervals")] = 0


class Sampled(Seeded):
    """Of a lens that reads a part of the store's rows."""

    filters: Annotated[RowFilters, Doc("which rows count as ordinary")] = RowFilters()


def add_folder(folder: str | Path) -> None:
    """Look for lenses in this folder too, for as long as this process runs."""
    _added.append(Path(folder))


def add_file(path: str | Path) -> str:
    """Look for a lens in this file too; returns its name. Raises UserError when there is no such
    file."""
    path = Path(path)
    if not path.is_file():
        raise UserError("there is no such file", where=str(path), fix=Command("lens", "list"))
    _added.append(path)
    return _name_of(path.stem)


def lens_names() -> tuple[str, ...]:
    """Every lens that can be named, in alphabetical order."""
    return tuple(sorted(_loaders()))


def find_lens(name: str) -> ModuleType:
    """The lens of this name. Raises UserError when there is none, or when parts of it are
    missing."""
    loaders = _loaders()
    if name not in loaders:
        near = difflib.get_close_matches(name, loaders, n=1)
        raise UserError(
            f"there is no lens {name!r}",
            expected=f"did you mean {near[0]!r}?" if near else ", ".join(sorted(loaders)),
            fix=Command("lens", "list"),
        )
    lens = loaders[name]()
    missing = [
        part for part, kind in _PARTS.items() if not isinstance(getattr(lens, part, None), kind)
    ]
    if missing:
        found = ", ".join("a docstring" if part == "__doc__" else part for part in missing)
        raise UserError(
            f"the module of the lens {name!r} lacks {found}",
            where=str(lens.__file__),
            expected="a docstring, TITLE, NEEDS (a tuple), Config and look(run, config)",
        )
    return lens


def run_lens(
    name: str,
    run: Run,
    config: LensConfig | None = None,
    *,
    force: bool = False,
    shared: Path | None = None,
    starting: Callable[[], None] = lambda: None,
) -> Artifact:
    """The finding's artifact, made if it is not there as it is wanted; `starting` is called only
    then. One that the run in the folder `shared` has as it is wanted is linked to. Raises
    UserError."""
    lens = find_lens(name)
    config = lens.Config() if config is None else config
    inputs = {need: _needed(run, need) for need in lens.NEEDS}
    contents = contents_of(name, config, {need: found.digest for need, found in inputs.items()})
    out, digest = run.root / FOLDER / name, digest_of(**contents)
    if force:
        Artifact.discard_partial(out)
    elif Artifact.is_current(out, digest) or (
        shared and Artifact.borrow(out, shared / FOLDER / name, digest)
    ):
        return open_finding(run.root, name)
    starting()
    for artifact in inputs.values():
        artifact.verify()
    with Artifact.create(out, **contents) as draft:
        token = _kept_in.set(draft.path / _KEPT)
        try:
            finding = lens.look(run, config)
        finally:
            _kept_in.reset(token)
        write_finding(finding, draft.path, name=name, title=lens.TITLE)
        draft.summary.update(finding.headline)
        shutil.rmtree(draft.path / _KEPT, ignore_errors=True)
    return open_finding(run.root, name)


def contents_of(name: str, config: LensConfig, needs: Mapping[str, str]) -> dict[str, Any]:
    """What names a lens' artifact: kind, schema, config, and the digests of what it needs."""
    lens = find_lens(name)
    options: dict[str, Any] = {"lens": name, "version": getattr(lens, "VERSION", 1)}
    options["options"] = config.model_dump(mode="json")
    if hasattr(lens, "outside_digests"):
        options["outside"] = lens.outside_digests(config)
    return {"kind": KIND, "schema": SCHEMA, "config": options, "inputs": dict(needs)}


def fitting(run: Run) -> dict[str, Artifact]:
    """The findings in the run's folder that were made from the run's artifacts as they are now."""
    found = {}
    for path in sorted((run.root / FOLDER).glob("*/manifest.json")):
        with suppress(UserError):
            found[path.parent.name] = open_finding(run.root, path.parent.name)
    digests = {name: artifact.digest for name, artifact in run.artifacts.items()}

    def fits(artifact: Artifact) -> bool:
        known = digests | {name: other.digest for name, other in found.items()}
        return artifact.inputs.items() <= known.items()

    while wrong := [name for name, artifact in found.items() if not fits(artifact)]:
        for name in wrong:
            del found[name]
    return found


def _needed(run: Run, name: str) -> Artifact:
    """The artifact of a stage; of a lens the finding that is there and fits the run, whatever its
    options, else made with the options' defaults."""
    if name in SCHEMAS:
        return run.artifact(name)
    return fitting(run).get(name) or run_lens(name, run)


def kept(name: str, compute: Callable[[], Any]) -> Any:
    """`compute()`, a JSON value. A lens that was killed finds what it had computed, under this
    name, when it runs again with the same options on the same artifacts."""
    folder = _kept_in.get()
    if folder is None:
        return compute()
    file = folder / f"{name}.json"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        write_text_atomically(file, json.dumps(compute()))
    return json.loads(file.read_text(encoding="utf-8"))


def _loaders() -> dict[str, Callable[[], ModuleType]]:
    """How to import the module of each lens. Raises UserError for two of one name."""
    loaders: dict[str, Callable[[], ModuleType]] = {}
    for name, load in _found():
        if name in loaders:
            raise UserError(f"two lenses are named {name!r}", fix="rename one of the modules")
        loaders[name] = load
    return loaders


def _found() -> Iterator[tuple[str, Callable[[], ModuleType]]]:
    for module in iter_modules([str(Path(__file__).parent)]):
        if not module.ispkg and module.name != "base":
            yield _name_of(module.name), partial(import_module, f"pipeline.lenses.{module.name}")
    for place in dict.fromkeys(_added):
        for path in sorted(place.glob("[!_]*.py")) if place.is_dir() else [place]:
            yield _name_of(path.stem), partial(_import_file, path)
    for name, load in loaders("lenses").items():
        yield _name_of(name), load


def _name_of(module: str) -> str:
    return module.replace("_", "-")


def _import_file(path: Path) -> ModuleType:
    name = f"featureflow_lens_{path.stem}"
    if name not in sys.modules:
        module = sys.modules[name] = ModuleType(name)
        module.__file__ = str(path)
        SourceFileLoader(name, str(path)).exec_module(module)
    return sys.modules[name]
