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
from collections.abc import Callable, Iterable
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
from pipeline.stages.lenses import LENSES, StageResult, look_through
from pipeline.stages.recipe import Recipe
from sae.kernels.memory import kept_memory

_SHARED = ("collect", "train", "link", "describe", "steer")


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
    context: RunContext,
    events: Events | None = None,
    force: tuple[str, ...] = (),
    shared: Path | None = None,
) -> list[StageResult]:
    """Bring every stage up to and including `to` up to date. Artifacts lie in `root/<stage>`; one
    that the run `shared` has already as it is wanted here is linked to instead of made (all but the
    atlas, which shows what lies beside it)."""
    road = _Road(root=root, context=context, events=events or Events(), shared=shared)
    results: list[StageResult] = []
    for stage in stages_above(to):
        if stage == "steer" != to and Run.of(road.available).store.is_of_any_module:
            continue  # nothing to steer: the module writes no text
        if stage not in force:
            road.share(stage, recipe.configs[stage])
        results += road.run(stage, recipe.configs[stage], force=stage in force)
    return results


def run_single(
    recipe: Recipe,
    stage: str,
    *,
    root: Path,
    context: RunContext,
    events: Events | None = None,
    force: bool = False,
    shared: Path | None = None,
) -> list[StageResult]:
    """Run one stage on the artifacts that are there; a missing or outdated input is an error that
    names its command."""
    road = _Road(root=root, context=context, events=events or Events(), shared=shared)
    needed: set[str] = set()
    _collect_above(stage, needed, optional=False)
    for above in stages_above(stage)[:-1]:
        config, fix = recipe.configs[above], Command("run", to=above)
        if above == LENSES:
            road.add_findings(Run.of(road.available), config.lenses if above in needed else (), fix)
            continue
        road.share(above, config)
        try:
            road.take(above, config, fix)
        except UserError:
            if above in needed:
                raise
    return road.run(stage, recipe.configs[stage], force=force)


@dataclass(frozen=True, kw_only=True)
class _Road:
    """A run on its way: where it lies, and the artifacts that are `available` so far, findings as
    `lenses/<name>`."""

    root: Path
    context: RunContext
    events: Events
    shared: Path | None
    available: dict[str, Artifact] = dataclasses.field(default_factory=dict)

    def take(self, stage: str, config: Any, fix: Command) -> None:
        """Use the artifact of a stage with this config. Raises UserError when it is not there."""
        module = StageName(stage).module
        artifact = Artifact.open(self.root / stage, kind=module.KIND, schema=module.SCHEMA, fix=fix)
        expected = self._digest(module, config)
        if artifact.digest != expected:
            raise UserError(
                f"the {stage} artifact was made by another recipe, text or version",
                where=str(artifact.path),
                expected=f"digest {expected[:12]}",
                found=f"digest {artifact.digest[:12]}",
                fix=fix,
            )
        self.available[stage] = artifact

    def share(self, stage: str, config: Any) -> None:
        """Let `root/<stage>` point to the artifact of the run `shared`, if it is current there and
        not here."""
        if self.shared is not None and stage in _SHARED:
            digest = self._digest(StageName(stage).module, config)
            if not Artifact.is_current(self.root / stage, digest):
                Artifact.borrow(self.root / stage, self.shared / stage, digest)

    def run(self, stage: str, config: Any, *, force: bool) -> list[StageResult]:
        """One result; of `lenses` one a lens. What was made is available then."""
        if section_of(stage) == LENSES:
            return self._run_lenses(config, force=force)
        module, out, seconds = StageName(stage).module, self.root / stage, None
        if not force and Artifact.is_current(out, self._digest(module, config)):
            artifact = Artifact.open(out, kind=module.KIND, schema=module.SCHEMA)
        else:
            if force:
                Artifact.discard_partial(out)
            self.events.started(stage)
            started = time.monotonic()
            for needed in self._needed(module).values():
                needed.verify()
            with kept_memory():
                artifact = module.run(config, self._inputs(module), out, self.context)
            seconds = time.monotonic() - started
        self.available[stage] = artifact
        result = StageResult(stage, artifact, seconds is None, seconds or 0.0)
        self.events.finished(result)
        return [result]

    def _run_lenses(self, config: Any, *, force: bool) -> list[StageResult]:
        run, results = Run.of(dict(self.available), context=self.context), []
        with kept_memory():
            for result in look_through(
                config.lenses, run, force=force, shared=self.shared, starting=self.events.started
            ):
                results.append(result)
                self.events.finished(result)
        self.add_findings(run, config.lenses)
        return results

    def add_findings(self, run: Run, wanted: Iterable[str], fix: Command | None = None) -> None:
        """Every finding that fits the run is available then. Raises UserError when one that the
        recipe wants is not among them."""
        found = fitting(run)
        if missing := [name for name in wanted if name not in found]:
            what = "these lenses have not looked at the run as it is now"
            raise UserError(what, where=str(run.root / LENSES), found=", ".join(missing), fix=fix)
        self.available.update({f"{LENSES}/{name}": artifact for name, artifact in found.items()})

    def _digest(self, module: ModuleType, config: Any) -> str:
        given = self._needed(module)
        inputs = {name: artifact.digest for name, artifact in given.items()}
        if hasattr(module, "outside_digests"):
            inputs |= module.outside_digests(config)
        if hasattr(module, "digests_beside"):
            inputs |= module.digests_beside(self.root, given)
        return digest_of(module.KIND, module.SCHEMA, config, inputs)

    def _needed(self, module: ModuleType) -> dict[str, Artifact]:
        """The artifacts that a stage is made from, findings by their place."""
        names = {f.name for f in dataclasses.fields(module.Inputs)}
        return {n: found for n, found in self.available.items() if n.partition("/")[0] in names}

    def _inputs(self, module: ModuleType) -> Any:
        """Its `Inputs`: an artifact a stage, of `lenses` a mapping from the names of lenses."""
        takes_lenses = LENSES in {f.name for f in dataclasses.fields(module.Inputs)}
        given: dict[str, Any] = {LENSES: {}} if takes_lenses else {}
        for place, artifact in self._needed(module).items():
            stage, _, lens = place.partition("/")
            if lens:
                given[stage][lens] = artifact
            else:
                given[stage] = artifact
        return module.Inputs(**given)


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
