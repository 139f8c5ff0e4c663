"""The pipeline as a graph of artifacts: which stages are needed, which are current, and running the
rest.

1. a stage's inputs are the fields of its `Inputs`; following them gives the stages above it. One
   with a default is made by a whole run, and left out by a stage run alone when it is not there;
2. its digest follows from its config, the digests of its inputs, what `outside_digests` says of the
   world and `digests_beside` of other files of the run;
3. an artifact on disk with that digest is current and its stage returns at once; otherwise the
   stage runs, and goes on with what a killed run of the same digest left, unless it is forced: then
   it starts anew. First the checksums of its inputs are compared (a second a gigabyte or so; a
   store compares its own as it is read).

While a stage runs, memory that it frees is kept for what it allocates next (sae/kernels/memory.py).

A changed section of a recipe therefore reruns that stage and what lies below it, and nothing above.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from featureflow.errors import Command, UserError
from pipeline.artifact import Artifact, digest_of
from pipeline.context import RunContext
from pipeline.lenses.base import fitting
from pipeline.run import Run
from pipeline.stages import ALSO, STAGES, StageName, section_of
from pipeline.stages.lenses import look_through
from pipeline.stages.recipe import Recipe
from sae.kernels.memory import kept_memory

_SHARED = ("collect", "train", "link", "describe", "steer")
LENSES = "lenses"


@dataclass(frozen=True)
class StageResult:
    """What came of one stage, or of one lens (`lenses/<name>`): its artifact, whether it had to
    run, and how long that took."""

    stage: str
    artifact: Artifact
    was_current: bool
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Events:
    """Called as a run goes on: `started` only for what really runs, `finished` for every stage and
    lens."""

    started: Callable[[str], None] = lambda stage: None
    finished: Callable[[StageResult], None] = lambda result: None


def stages_above(stage: str) -> tuple[str, ...]:
    """The stages whose artifacts `stage` needs, directly or not, in running order, itself last."""
    wanted: set[str] = set()
    _collect_above(stage, wanted)
    return tuple(name for name in (*STAGES, *ALSO) if name in wanted)


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
    that the run `shared` has already as it is wanted here is linked to instead of made (all but the
    atlas, which shows what lies beside it)."""
    results: list[StageResult] = []
    available: dict[str, Artifact] = {}
    for stage in stages_above(to):
        config = recipe.configs[stage]
        if stage not in force:
            _share(stage, config, available, root, shared)
        results += _run_stage(
            stage,
            config,
            available,
            root,
            context_of(stage),
            events or Events(),
            force=stage in force,
            shared=shared,
        )
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
) -> list[StageResult]:
    """Run one stage on the artifacts that are there; a missing or outdated input is an error that
    names its command."""
    available: dict[str, Artifact] = {}
    needed: set[str] = set()
    _collect_above(stage, needed, optional=False)
    for above in stages_above(stage)[:-1]:
        fix = Command("run", to=above)
        if above == LENSES:
            wanted = recipe.configs[above].lenses if above in needed else ()
            _add_findings(available, Run.of(available), wanted, fix)
            continue
        _share(above, recipe.configs[above], available, root, shared)
        try:
            available[above] = _current(above, recipe.configs[above], available, root, fix)
        except UserError:
            if above in needed:
                raise
    return _run_stage(
        stage,
        recipe.configs[stage],
        available,
        root,
        context_of(stage),
        events or Events(),
        force=force,
        shared=shared,
    )


def _current(
    stage: str, config: Any, available: Mapping[str, Artifact], root: Path, fix: Command
) -> Artifact:
    """The artifact of a stage with this config. Raises UserError when it is not there."""
    module = StageName(stage).module
    artifact = Artifact.open(root / stage, kind=module.KIND, schema=module.SCHEMA, fix=fix)
    expected = _digest(module, config, available, root)
    if artifact.digest != expected:
        raise UserError(
            f"the {stage} artifact was made by another recipe, text or version",
            where=str(artifact.path),
            expected=f"digest {expected[:12]}",
            found=f"digest {artifact.digest[:12]}",
            fix=fix,
        )
    return artifact


def _run_stage(
    stage: str,
    config: Any,
    available: dict[str, Artifact],
    root: Path,
    context: RunContext,
    events: Events,
    *,
    force: bool,
    shared: Path | None,
) -> list[StageResult]:
    """One result; of `lenses` one a lens. What was made is added to `available`."""
    if section_of(stage) == LENSES:
        return _run_lenses(config, available, context, events, force=force, shared=shared)
    module = StageName(stage).module
    out = root / stage
    if not force and Artifact.is_current(out, _digest(module, config, available, root)):
        artifact, seconds = Artifact.open(out, kind=module.KIND, schema=module.SCHEMA), None
    else:
        if force:
            Artifact.discard_partial(out)
        events.started(stage)
        started = time.monotonic()
        for needed in _needed(module, available).values():
            needed.verify()
        with kept_memory():
            artifact = module.run(config, _inputs(module, available), out, context)
        seconds = time.monotonic() - started
    available[stage] = artifact
    result = StageResult(stage, artifact, seconds is None, seconds or 0.0)
    events.finished(result)
    return [result]


def _run_lenses(
    config: Any,
    available: dict[str, Artifact],
    context: RunContext,
    events: Events,
    *,
    force: bool,
    shared: Path | None,
) -> list[StageResult]:
    run, results = Run.of(dict(available), context=context), []
    with kept_memory():
        for looked in look_through(
            config.lenses,
            run,
            force=force,
            shared=shared,
            starting=lambda name: events.started(f"{LENSES}/{name}"),
        ):
            place = f"{LENSES}/{looked.name}"
            results.append(StageResult(place, looked.artifact, looked.was_current, looked.seconds))
            events.finished(results[-1])
    _add_findings(available, run, config.lenses)
    return results


def _add_findings(
    available: dict[str, Artifact], run: Run, wanted: Iterable[str], fix: Command | None = None
) -> None:
    """Add every finding that fits the run, named `lenses/<name>`. Raises UserError when one that
    the recipe wants is not among them."""
    found = fitting(run)
    if missing := [name for name in wanted if name not in found]:
        what = "these lenses have not looked at the run as it is now"
        raise UserError(what, where=str(run.root / LENSES), found=", ".join(missing), fix=fix)
    available |= {f"{LENSES}/{name}": artifact for name, artifact in found.items()}


def _share(
    stage: str, config: Any, available: Mapping[str, Artifact], root: Path, shared: Path | None
) -> None:
    """Let `root/<stage>` point to the artifact of the run `shared`, if it is current there and not
    here."""
    if shared is not None and stage in _SHARED:
        digest = _digest(StageName(stage).module, config, available, root)
        if not Artifact.is_current(root / stage, digest):
            Artifact.borrow(root / stage, shared / stage, digest)


def _digest(module: ModuleType, config: Any, available: Mapping[str, Artifact], root: Path) -> str:
    given = _needed(module, available)
    inputs = {name: artifact.digest for name, artifact in given.items()}
    outside = module.outside_digests(config) if hasattr(module, "outside_digests") else {}
    beside = module.digests_beside(root, given) if hasattr(module, "digests_beside") else {}
    return digest_of(module.KIND, module.SCHEMA, config, {**inputs, **outside, **beside})


def _needed(module: ModuleType, available: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """The artifacts that a stage is made from, findings by their place."""
    names = _input_names(module)
    return {name: found for name, found in available.items() if name.partition("/")[0] in names}


def _inputs(module: ModuleType, available: Mapping[str, Artifact]) -> Any:
    """Its `Inputs`: an artifact a stage, of `lenses` a mapping from the names of lenses."""
    given: dict[str, Any] = {LENSES: {}} if LENSES in _input_names(module) else {}
    for place, artifact in _needed(module, available).items():
        stage, _, lens = place.partition("/")
        if lens:
            given[stage][lens] = artifact
        else:
            given[stage] = artifact
    return module.Inputs(**given)


def _input_names(module: ModuleType) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(module.Inputs))


def _collect_above(stage: str, wanted: set[str], *, optional: bool = True) -> None:
    wanted.add(stage)
    module = StageName(stage).module
    for field in dataclasses.fields(module.Inputs):
        if field.name not in STAGES:
            raise TypeError(f"{module.__name__}.Inputs.{field.name} is no stage")
        may_be_missing = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if field.name not in wanted and (optional or not may_be_missing):
            _collect_above(field.name, wanted, optional=optional)
