"""The lenses of a recipe, each brought up to date: what it finds lies in `lenses/<name>`.

    [lenses]
    names = ["reconstruction", "loss-recovered", "frontier"]     # what runs; this is the default

    [lenses.groups]                                              # runs too, with these options
    n_tokens = 4096

A lens whose finding is current is left alone, so the stage itself has no artifact. `evaluate` is
this stage with the evaluation lenses only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field
from typing_extensions import Doc

from featureflow.errors import Problem, UserError
from featureflow.settings import Settings
from pipeline.artifact import SCHEMAS, Artifact
from pipeline.lenses.base import EVALUATION, LensConfig, find_lens, run_lens
from pipeline.run import Run

LENSES = "lenses"


class Config(Settings):
    """Which lenses look at the run."""

    names: Annotated[tuple[str, ...], Doc("lenses that run (featureflow lens list)")] = EVALUATION
    options: Annotated[
        dict[str, LensConfig],
        Doc("of one lens, written as --lenses.<name>.<field>; a lens with options runs too"),
    ] = Field(default_factory=dict)

    @property
    def lenses(self) -> dict[str, LensConfig]:
        """Every lens that runs, with its options."""
        names = dict.fromkeys((*self.names, *self.options))
        return {name: self.options.get(name) or find_lens(name).Config() for name in names}

    @classmethod
    def read(cls, raw: object, where: str, problems: list[Problem]) -> Self | None:
        """The section of a recipe: `names`, and one table a lens."""
        tables = dict(raw) if isinstance(raw, Mapping) else {}
        names = {"names": tables.pop("names")} if "names" in tables else {}
        chosen = super().read(names if isinstance(raw, Mapping) else raw, where, problems)
        read = {
            name: options_of(name, table, f"{where}.{name}", problems)
            for name, table in tables.items()
        }
        if chosen is None:
            return None
        for name in chosen.names:
            _known(name, f"{where}.names", problems)
        return chosen.replace(options={name: each for name, each in read.items() if each})


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What lenses look at."""

    collect: Artifact
    train: Artifact
    link: Artifact
    describe: Artifact | None = None


@dataclass(frozen=True)
class StageResult:
    """What came of one stage, or of one lens (`lenses/<name>`): its artifact, whether it had to
    run, and how long that took."""

    stage: str
    artifact: Artifact
    was_current: bool
    seconds: float


def look_through(
    lenses: Mapping[str, LensConfig],
    run: Run,
    *,
    force: bool = False,
    shared: Path | None = None,
    starting: Callable[[str], None] = lambda name: None,
) -> Iterator[StageResult]:
    """Bring each lens up to date, those that others need first; a finding that the run in `shared`
    has as it is wanted is linked to. `starting` is told what really runs. Raises UserError."""
    for name in sorted(lenses, key=_depth):
        ran: list[str] = []
        started = time.monotonic()

        def note(place: str = f"{LENSES}/{name}", ran: list[str] = ran) -> None:
            ran.append(place)
            starting(place)

        artifact = run_lens(name, run, lenses[name], force=force, shared=shared, starting=note)
        seconds = time.monotonic() - started if ran else 0.0
        yield StageResult(f"{LENSES}/{name}", artifact, not ran, seconds)


def options_of(name: str, raw: object, where: str, problems: list[Problem]) -> LensConfig | None:
    """A lens' options, checked. What is wrong with them is added to `problems`."""
    lens = _known(name, where, problems)
    return lens and lens.Config.read(raw, where, problems)


def _known(name: str, where: str, problems: list[Problem]) -> Any:
    try:
        return find_lens(name)
    except UserError as error:
        [problem] = error.problems
        problems.append(Problem(what=problem.what, where=where, expected=problem.expected))
        return None


def _depth(name: str) -> int:
    """How many lenses must look before this one, in a row."""
    found = find_lens(name).NEEDS
    return 1 + max((_depth(need) for need in found if need not in SCHEMAS), default=0)
