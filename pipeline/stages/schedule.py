"""The pipeline as a graph of artifacts: which stages are needed, which are current, and running the
rest.

1. a stage's inputs are the fields of its `Inputs`; following them gives the stages above it;
2. its digest follows from its config, the digests of its inputs and what `outside_digests` says of
   the world;
3. an artifact on disk with that digest is current and its stage returns at once; otherwise the
   stage runs, and goes on with what a killed run of the same digest left, unless it is forced: then
   it starts anew. First the checksums of its inputs are compared (a second a gigabyte or so; a
   store compares its own as it is read).

While a stage runs, memory that it frees is kept for what it allocates next (sae/kernels/memory.py).

A changed section of a recipe therefore reruns that stage and what lies below it, and nothing above.
"""

from __future__ import annotations

import dataclasses
import os
import time
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from featureflow.errors import Command, UserError
from featureflow.files import replace_folder
from pipeline.artifact import Artifact, digest_of
from pipeline.context import RunContext
from pipeline.stages import STAGES, StageName
from pipeline.stages.recipe import Recipe
from sae.kernels.memory import kept_memory

_SHARED = ("collect", "train", "evaluate", "link")


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What came of one stage: its artifact, whether it had to run, and how long that took."""

    stage: str
    artifact: Artifact
    was_current: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Events:
    """Called as a run goes on: `started` only for a stage that really runs, `finished` for every
    stage."""

    started: Callable[[str], None] = lambda stage: None
    finished: Callable[[StageResult], None] = lambda result: None


def stages_above(stage: str) -> tuple[str, ...]:
    """The stages whose artifacts `stage` needs, directly or not, in running order, itself last."""
    wanted: set[str] = set()
    _collect_above(stage, wanted)
    return tuple(name for name in STAGES if name in wanted)


def run_recipe(
    recipe: Recipe,
    *,
    to: str,
    root: Path,
    context_of: Callable[[str], RunContext],
    events: Events | None = None,
    force: tuple[str, ...] = (),
    shared: Path | None = None,
) -> list[StageResult]:
    """Bring every stage up to and including `to` up to date. Artifacts lie in `root/<stage>`; one
    that the run `shared` has already as it is wanted here is linked to instead of made (collect to
    link: later ones are written into)."""
    events = events or Events()
    results: list[StageResult] = []
    for stage in stages_above(to):
        inputs = {result.stage: result.artifact for result in results}
        if stage not in force:
            _share(stage, recipe.configs[stage], inputs, root, shared)
        result = _run_stage(
            stage, recipe.configs[stage], inputs, root, context_of, events, stage in force
        )
        results.append(result)
        events.finished(result)
    return results


def run_single(
    recipe: Recipe,
    stage: str,
    *,
    root: Path,
    context_of: Callable[[str], RunContext],
    events: Events | None = None,
    force: bool = False,
    shared: Path | None = None,
) -> StageResult:
    """Run one stage on the artifacts that are there; a missing or outdated input is an error that
    names its command."""
    events = events or Events()
    inputs: dict[str, Artifact] = {}
    for above in stages_above(stage)[:-1]:
        module = StageName(above).module
        fix = Command("run", to=above)
        _share(above, recipe.configs[above], inputs, root, shared)
        artifact = Artifact.open(root / above, kind=module.KIND, schema=module.SCHEMA, fix=fix)
        expected = _digest(module, recipe.configs[above], inputs)
        if artifact.digest != expected:
            raise UserError(
                f"the {above} artifact was made by another recipe, text or version",
                where=str(artifact.path),
                expected=f"digest {expected[:12]}",
                found=f"digest {artifact.digest[:12]}",
                fix=fix,
            )
        inputs[above] = artifact
    result = _run_stage(stage, recipe.configs[stage], inputs, root, context_of, events, force)
    events.finished(result)
    return result


def _run_stage(
    stage: str,
    config: Any,
    available: Mapping[str, Artifact],
    root: Path,
    context_of: Callable[[str], RunContext],
    events: Events,
    force: bool,
) -> StageResult:
    module = StageName(stage).module
    out = root / stage
    if not force and Artifact.is_current(out, _digest(module, config, available)):
        artifact = Artifact.open(out, kind=module.KIND, schema=module.SCHEMA)
        return StageResult(stage=stage, artifact=artifact, was_current=True, seconds=0.0)
    if force:
        Artifact.discard_partial(out)
    events.started(stage)
    started = time.monotonic()
    inputs = module.Inputs(
        **{name: available[name] for name in _input_names(module) if name in available}
    )
    for name in _input_names(module):
        available[name].verify()
    with kept_memory():
        artifact = module.run(config, inputs, out, context_of(stage))
    return StageResult(
        stage=stage, artifact=artifact, was_current=False, seconds=time.monotonic() - started
    )


def _share(
    stage: str, config: Any, available: Mapping[str, Artifact], root: Path, shared: Path | None
) -> None:
    """Let `root/<stage>` point to the artifact of the run `shared`, if it is current there and not
    here."""
    if shared is None or stage not in _SHARED or shared.resolve() == root.resolve():
        return
    digest = _digest(StageName(stage).module, config, available)
    place, theirs = root / stage, shared / stage
    if Artifact.is_current(place, digest) or not Artifact.is_current(theirs, digest):
        return
    root.mkdir(parents=True, exist_ok=True)
    link = root / f"{stage}.link"
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(theirs.resolve(), root.resolve()), target_is_directory=True)
    replace_folder(link, place)


def _digest(module: ModuleType, config: Any, available: Mapping[str, Artifact]) -> str:
    inputs = {name: available[name].digest for name in _input_names(module) if name in available}
    outside = module.outside_digests(config) if hasattr(module, "outside_digests") else {}
    return digest_of(module.KIND, module.SCHEMA, config, {**inputs, **outside})


def _input_names(module: ModuleType) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(module.Inputs))


def _collect_above(stage: str, wanted: set[str]) -> None:
    wanted.add(stage)
    module = StageName(stage).module
    hints = typing.get_type_hints(module.Inputs)
    for name in _input_names(module):
        if name not in STAGES:
            raise TypeError(f"{module.__name__}.Inputs.{name}: {hints[name]} is no stage")
        if name not in wanted:
            _collect_above(name, wanted)
